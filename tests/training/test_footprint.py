"""The memory of training, counted without data, against what autograd keeps of real tensors."""

import logging
import time
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from transformers import CLIPTextConfig, CLIPTextModel

from conftest import needs_bf16_attention
from lorascope.adapters.bank import AdapterBank
from lorascope.adapters.targets import Target, resolve_section
from lorascope.arms import Arm
from lorascope.base.attention import Kernel, Shape, set_kernels
from lorascope.base.configs import SD15_DIR, read_configs
from lorascope.base.ldm import build_component
from lorascope.base.loading import Base, load_base
from lorascope.sections import AdapterSection, BaseSection, TargetGroup, TrainSection
from lorascope.seeding import seeded
from lorascope.training.footprint import attend_as_on, estimate_pass, estimate_training, resolve_checkpointing

R4, R8 = (Arm(name=f"r{rank}", rank=rank, alpha=rank, lr=1e-3, seed=0) for rank in (4, 8))
CPU = torch.device("cpu")
SHAPE = (4, 8, 8)
TOLERANCE = {"tiny": 0.03, "pocket": 0.01}  # what is alive but not kept weighs more beside little


def kept_bytes(
    base: Base, targets: list[Target], arms: list[Arm], batch_size: int, shape: tuple[int, int, int]
) -> int:
    """Bytes of the distinct storages that autograd keeps of a real forward pass, frozen parameters and the
    bank's own left out.
    """
    bank = AdapterBank(base.components, targets, arms).attach()
    own = {
        tensor.untyped_storage().data_ptr()
        for part in base.components.values()
        for tensor in part.state_dict().values()
    }
    own |= {bank.parameters.untyped_storage().data_ptr(), bank.gradients.untyped_storage().data_ptr()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    count = batch_size * len(arms)
    noisy = torch.randn(count, *shape, generator=seeded("noisy")).to(base.unet.dtype)
    tokens = torch.zeros(count, base.tokenizer.model_max_length, dtype=torch.long)
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            text = (
                base.text_states(tokens)
                if bank.adapts_text
                else torch.zeros(*tokens.shape, base.text_encoder.config.hidden_size)
            )
            prediction = base.unet(noisy, tokens[:, 0], text.to(base.unet.dtype)).sample
            loss = (prediction.float() - noisy.float()).square().mean()
    finally:
        bank.detach()
    assert loss.isfinite()
    return sum(kept.values())


def own_section(base: Base, **choices: object) -> list[Target]:
    return resolve_section(base.components, AdapterSection.model_validate(choices))


@pytest.mark.parametrize(
    ("plain", "precision"),
    [
        pytest.param(True, "fp32", id="plain-fp32"),
        pytest.param(True, "bf16", id="plain-bf16"),
        pytest.param(False, "fp32", id="fused-fp32"),
        pytest.param(False, "bf16", id="fused-bf16", marks=needs_bf16_attention),
    ],
)
def test_activations_are_those_autograd_keeps_of_the_tiny_base(
    pipeline_folder: Path, precision: str, plain: bool
) -> None:
    base = load_base(BaseSection(model=str(pipeline_folder)), CPU, precision)
    base.unet.set_attn_processor(AttnProcessor() if plain else AttnProcessor2_0())
    for targets, arms, batch_size in (
        (own_section(base), [R4], 1),
        (own_section(base), [R4, R8], 3),
        (own_section(base, targets=("to_q", "conv1", "conv_shortcut")), [R8], 2),
    ):
        expected = estimate_training(base.components, targets, arms, batch_size, SHAPE).activations_bytes
        assert expected == pytest.approx(
            kept_bytes(base, targets, arms, batch_size, SHAPE), rel=TOLERANCE["tiny"]
        )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_the_pocket_base(precision: str) -> None:
    base = load_base(BaseSection(), CPU, precision)
    targets, shape = own_section(base), (4, 16, 16)
    expected = estimate_training(base.components, targets, [R4, R8], 2, shape).activations_bytes
    assert expected == pytest.approx(kept_bytes(base, targets, [R4, R8], 2, shape), rel=TOLERANCE["pocket"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_weights_a_u_net_takes_the_attention_of_its_device(precision: str) -> None:
    base = load_base(BaseSection(), CPU, precision)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(base.unet.config).to(base.unet.dtype)
    attend_as_on("cpu", unet)
    parts = {"unet": unet, "text_encoder": base.text_encoder}
    expected = estimate_training(base.components, own_section(base), [R4], 1, (4, 16, 16))
    assert estimate_training(parts, own_section(base), [R4], 1, (4, 16, 16)) == expected


@pytest.mark.parametrize("kernel", [Kernel("plain"), Kernel("sdpa", 24)], ids=str)
def test_a_chosen_kernel_counts_as_it_is(base: Base, kernel: Kernel) -> None:
    targets = own_section(base)
    shapes = [
        Shape(queries, keys, 2, head_dim, True)
        for queries, head_dim in ((64, 8), (16, 16))
        for keys in (queries, 77)
    ]
    set_kernels(base.unet, dict.fromkeys(shapes, kernel))
    expected = estimate_training(base.components, targets, [R4], 2, SHAPE).activations_bytes
    assert expected == pytest.approx(kept_bytes(base, targets, [R4], 2, SHAPE), rel=TOLERANCE["tiny"])


def test_an_adapted_text_encoder_counts(base: Base) -> None:
    group = TargetGroup(component="text_encoder", targets=("q_proj", "v_proj"))
    targets = own_section(base, groups=[group.model_dump()])
    estimate = estimate_training(base.components, targets, [R4], 2, SHAPE)
    assert estimate.activations_bytes == pytest.approx(
        kept_bytes(base, targets, [R4], 2, SHAPE), rel=TOLERANCE["tiny"]
    )
    assert (
        estimate.activations_bytes
        > estimate_training(base.components, own_section(base), [R4], 2, SHAPE).activations_bytes
    )


def sd15_on_meta() -> dict[str, torch.nn.Module]:
    """U-Net in bf16 and text encoder of Stable Diffusion v1.5, without weights."""
    configs = read_configs(BaseSection(model=str(SD15_DIR)))
    with torch.device("meta"):
        unet, text_encoder = (
            build_component("unet", configs["unet"]),
            CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder"])),
        )
    return {"unet": unet.to(torch.bfloat16), "text_encoder": text_encoder}


def test_stable_diffusion_at_batch_4_512_px_rank_16_fits_in_8_gb() -> None:
    components = sd15_on_meta()
    targets, arm = (
        resolve_section(components, AdapterSection()),
        Arm(name="r16", rank=16, alpha=16, lr=1e-4, seed=0),
    )
    kept = estimate_training(components, targets, [arm], 4, (4, 64, 64))
    assert 3.4 * 2**30 < kept.activations_bytes < 3.7 * 2**30
    assert kept.total_bytes < 7e9
    again = estimate_training(components, targets, [arm], 4, (4, 64, 64), checkpointing=True)
    assert again.training_bytes < kept.training_bytes / 3 and "gradient checkpointing" in again.as_text()
    assert kept.adapters_bytes == 4 * 4 * 5_984_256
    assert kept.weights_bytes == 2 * 859_520_964 + 4 * 123_060_480 + 8 * 77, (
        "and the numbers of the text positions"
    )
    twice = estimate_training(components, targets, [arm, arm], 4, (4, 64, 64))
    assert twice.training_bytes == 2 * kept.training_bytes


@pytest.mark.figures
def test_a_second_arm_is_not_counted_anew() -> None:
    components = sd15_on_meta()
    targets = resolve_section(components, AdapterSection())
    arms = [Arm(name=name, rank=16, alpha=16, lr=1e-4, seed=0) for name in "ab"]
    estimate_training(components, targets, arms[:1], 4, (4, 64, 64))
    started = time.perf_counter()
    estimate_training(components, targets, arms, 4, (4, 64, 64))
    assert time.perf_counter() - started < 0.3


def test_checkpointing_is_for_an_arm_that_does_not_fit_alone(base: Base) -> None:
    targets = own_section(base)
    one = estimate_training(base.components, targets, [R8], 2, SHAPE)
    saving = estimate_training(base.components, targets, [R8], 2, SHAPE, checkpointing=True)
    assert saving.training_bytes < one.training_bytes

    def chosen(budget: int, wanted: bool | None) -> tuple[int, bool]:
        estimate = estimate_pass(base.components, targets, [R8, R4, R4], 2, SHAPE, wanted, budget)
        return estimate.training_bytes, estimate.checkpointing

    assert chosen(one.training_bytes, None) == chosen(1, False) == (3 * one.training_bytes, False)
    assert chosen(one.training_bytes - 1, None) == chosen(10**12, True) == (3 * saving.training_bytes, True)


@pytest.mark.parametrize(
    ("wanted", "share", "checkpointing", "said"),
    [
        (None, 2, False, []),
        (None, 0.99, True, ["gradient checkpointing is on, since one arm would not fit without it"]),
        (True, 2, True, []),
        (
            False,
            0.1,
            False,
            [
                (
                    "will probably not fit: lower train.max_stacked_arms, set train.gradient_checkpointing "
                    "= true, or lower"
                )
            ],
        ),
        (
            None,
            0.01,
            True,
            ["is on", "will probably not fit: lower train.max_stacked_arms, lower train.batch_size"],
        ),
    ],
)
def test_what_is_decided_is_said(
    base: Base,
    wanted: bool | None,
    share: float,
    checkpointing: bool,
    said: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets, section = own_section(base), TrainSection(batch_size=2, gradient_checkpointing=wanted)
    one = estimate_training(base.components, targets, [R8], 2, SHAPE)
    monkeypatch.setattr(
        "lorascope.training.footprint.free_bytes", lambda device: int(share * one.training_bytes / 0.9)
    )
    with caplog.at_level(logging.INFO):
        estimate, decided = resolve_checkpointing(base, targets, [R8, R4], section, SHAPE)
    assert (decided.gradient_checkpointing, estimate.checkpointing, estimate.num_arms) == (
        checkpointing,
        checkpointing,
        2,
    )
    assert "memory   training adds about " in caplog.text and "are free" in caplog.text
    assert all(words in caplog.text for words in said)
    assert ("will probably not fit" in caplog.text) == any("will probably not fit" in words for words in said)


def test_dora_counts_what_it_keeps_beside_lora(base: Base) -> None:
    targets = own_section(base)
    found = {}
    for kind in ("lora", "dora"):
        arm = R8.model_copy(update={"kind": kind})
        estimate = estimate_training(base.components, targets, [arm], 2, SHAPE)
        expected = kept_bytes(base, targets, [arm], 2, SHAPE)
        assert estimate.activations_bytes == pytest.approx(expected, rel=TOLERANCE["tiny"])
        found[kind] = estimate
    assert found["dora"].activations_bytes > found["lora"].activations_bytes
    assert found["dora"].adapters_bytes > found["lora"].adapters_bytes
