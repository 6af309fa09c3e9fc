"""The tensors of strangers' files: what makes up an adapter is read, what is wrong is named."""

from pathlib import Path

import pytest
import torch

from adapter_files import KOHYA_ATTENTION, Tensors, kohya, pair, peft_pairs, without, write
from lorascope.adapters.files import load_adapter, save_adapter
from lorascope.adapters.parsing import parse_adapter
from lorascope.errors import AdapterError
from random_adapters import ATTENTION


@pytest.mark.parametrize(
    "alpha", [torch.tensor(3), torch.tensor([3]), torch.tensor([3.0]), torch.tensor(3).to(torch.uint8)]
)
def test_an_alpha_of_any_number_is_read(tmp_path: Path, alpha: torch.Tensor) -> None:
    (module,) = load_adapter(write(tmp_path / "a.safetensors", kohya(alpha=alpha))).modules.values()
    assert module.alpha == 3.0


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without(kohya(), "lora_up.weight"), r"has down without up: the file is incomplete"),
        (without(kohya(alpha=torch.tensor(1.0)), "lora_down.weight"), r"has alpha, up without down"),
        (
            {**kohya(), f"{KOHYA_ATTENTION}_to_q.lora_up.weight": torch.ones(6, 5)},
            r"down \[2, 6\] and up \[6, 5\] do not fit together",
        ),
        ({**kohya(), f"{KOHYA_ATTENTION}_to_q.lora_up.weight": torch.ones(6)}, r"up is \[6\]: expected"),
        ({**kohya(), f"{KOHYA_ATTENTION}_to_q.lora_down.weight": torch.ones(0, 6)}, r"down is \[0, 6\]"),
        (
            {**kohya(), f"{KOHYA_ATTENTION}_to_q.lora_mid.weight": torch.ones(4, 4)},
            r"the core lora_mid is \[4, 4\] and down \[2, 6\]: expected \[r, r, kh, kw\]",
        ),
        (
            {
                **kohya(),
                f"{KOHYA_ATTENTION}_to_q.lora_mid.weight": torch.ones(3, 2, 1, 1),
                f"{KOHYA_ATTENTION}_to_q.lora_up.weight": torch.ones(6, 3),
            },
            r"down \[2, 6\] and up \[6, 3\] with a core \[3, 2, 1, 1\] do not fit together",
        ),
        (
            kohya(dora_scale=torch.ones(2, 3)),
            r"dora_scale is \[2, 3\]: expected one number for each of 6 outputs or 6 inputs",
        ),
        (
            kohya(dora_scale=torch.ones(7)),
            r"dora_scale is \[7\]: expected one number for each of 6 outputs or 6 inputs",
        ),
        (
            {key: tensor.to(torch.int8) for key, tensor in kohya().items()},
            r"down holds int8, not floating-point weights",
        ),
        (kohya(alpha=torch.ones(2)), r"alpha must be one finite number, is of shape \[2\]"),
        (
            {**kohya(), **kohya(f"{KOHYA_ATTENTION}_to_out"), **kohya(f"{KOHYA_ATTENTION}_to_out_0")},
            r"two modules of one name: '.*to_out",
        ),
        (
            {
                **kohya(),
                **pair(f"unet.{ATTENTION}.to_q.lora_A.weight", f"unet.{ATTENTION}.to_q.lora_B.weight"),
            },
            rf"two modules of one name: .* are both unet.{ATTENTION}.to_q \(and 1 more\)",
        ),
        (
            kohya("lora_unet_down_blocks_0_nowhere"),
            r"none of its 2 keys names a module, the first is 'lora_unet_down_blocks_0_nowhere",
        ),
        (
            pair("unet.../../etc.lora_A.weight", "unet.../../etc.lora_B.weight"),
            r"none of its 2 keys names a module",
        ),
    ],
)
def test_faults_are_named(tmp_path: Path, tensors: Tensors, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        load_adapter(write(tmp_path / "a.safetensors", tensors))


def ones(name: str = f"{KOHYA_ATTENTION}_to_q", **shapes: tuple[int, ...]) -> Tensors:
    """Tensors of ones by the ends of their keys."""
    return {f"{name}.{ending}": torch.ones(shape) for ending, shape in shapes.items()}


LOHA: dict[str, tuple[int, ...]] = {
    "hada_w1_a": (6, 2),
    "hada_w1_b": (2, 8),
    "hada_w2_a": (6, 2),
    "hada_w2_b": (2, 8),
}
CORES: dict[str, tuple[int, ...]] = {
    "hada_w1_a": (2, 6),
    "hada_w2_a": (2, 6),
    "hada_t1": (2, 2, 3, 3),
    "hada_t2": (2, 2, 3, 3),
}
LOKR: dict[str, tuple[int, ...]] = {"lokr_w1": (2, 2), "lokr_w2_a": (3, 1), "lokr_w2_b": (1, 4)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            without(ones(**LOHA), "w2_a"),
            "has hada_w1_a, hada_w1_b, hada_w2_b without hada_w2_a: the file is inc",
        ),
        (without(ones(**LOHA), "w2_b"), "without hada_w2_b: the file is incomplete"),
        (ones(**LOHA | {"hada_t1": (2, 2, 3, 3)}), "without hada_t2: the file is incomplete"),
        (
            ones(**LOHA | {"hada_w1_a": (6, 3)}),
            r"hada_w1_a \[6, 3\], .* do not fit together: their ranks must",
        ),
        (ones(**LOHA | {"hada_w2_a": (6, 3), "hada_w2_b": (3, 8)}), "do not fit together: their ranks must"),
        (
            ones(**LOHA | {"hada_w2_b": (2, 9)}),
            "its two products are 6 x 8 and 6 x 9: they must be of one size",
        ),
        (
            ones(**LOHA | {"hada_w2_b": (2, 2, 2, 2)}),
            r"hada_w2_b is \[2, 2, 2, 2\]: expected 2 dimensions and",
        ),
        (ones(**LOHA | {"hada_w2_b": (2, 0)}), r"hada_w2_b is \[2, 0\]: expected 2 dimensions and no 0"),
        (ones(**LOHA | CORES | {"hada_t2": (2, 3, 3, 3)}), r"hada_t2 \[2, 3, 3, 3\] do not fit together"),
        (
            ones(**LOHA | CORES | {"hada_t2": (2, 2, 1, 9)}),
            "its two products are 6 x 72 and 6 x 72: they must",
        ),
        (ones(**LOHA | CORES | {"hada_t2": (2, 2)}), r"hada_t2 is \[2, 2\]: expected 4 dimensions"),
        (ones(**LOHA, dora_scale=(6, 1)), "is LoHa with DoRA's dora_scale, which is read of LoRA alone"),
        (ones(**LOHA, alpha=(2,)), r"alpha must be one finite number, is of shape \[2\]"),
        (
            ones(**LOHA, lokr_w1=(2, 2)),
            "tensors of LoHa and of LoKr for one layer: only one of them can be read",
        ),
        (
            ones(hada_w1_a=(2**15, 1), hada_w1_b=(1, 2**14), hada_w2_a=(2**15, 1), hada_w2_b=(1, 2**14)),
            "its tensors mean a weight of 32768 x 16384, which no layer has: a damaged file",
        ),
        (
            ones(lokr_w1=(1, 1), lokr_w2_a=(2, 2**14), lokr_w2_b=(2, 1), lokr_t2=(2, 2, 128, 128)),
            "its tensors mean a weight of 16384 x 16384, which no layer has",
        ),
        (without(ones(**LOKR), "w1"), "has lokr_w2_a, lokr_w2_b without lokr_w1: the file is incomplete"),
        (without(ones(**LOKR), "w2_a"), "has lokr_w1, lokr_w2_b without lokr_w2_a: the file is incomplete"),
        (ones(lokr_w1=(2, 2)), "has lokr_w1 without lokr_w2: the file is incomplete"),
        (
            ones(lokr_w1=(2, 2), lokr_t2=(2, 2, 3, 3)),
            "without lokr_w2_a and lokr_w2_b: the file is incomplete",
        ),
        (ones(**LOKR, lokr_w2=(3, 4)), "has lokr_w2 beside lokr_w2_a: it is whole or a product, not both"),
        (ones(lokr_w1=(2, 2), lokr_w2=(3, 4), lokr_t2=(2, 2, 3, 3)), "has lokr_w2 beside lokr_t2"),
        (ones(**LOKR | {"lokr_w2_b": (2, 4)}), r"lokr_w2_a \[3, 1\], lokr_w2_b \[2, 4\] do not fit together"),
        (
            ones(lokr_w1_a=(2, 3), lokr_w1_b=(3, 2), lokr_w2_a=(3, 1), lokr_w2_b=(1, 4)),
            "their ranks must be eq",
        ),
        (
            ones(lokr_w1=(2, 2), lokr_w2=(3, 4, 9)),
            r"lokr_w2 is \[3, 4, 9\]: expected 2 or 4 dimensions and no 0",
        ),
        (ones(lokr_w1=(4,), lokr_w2=(3, 4)), r"lokr_w1 is \[4\]: expected 2 dimensions and no 0"),
        (ones(**LOKR, dora_scale=(6, 1)), "is LoKr with DoRA's dora_scale"),
        (ones(diff_b=(6,)), "has diff_b without diff: the file is incomplete"),
        (ones(diff=(6, 8, 3)), r"diff is \[6, 8, 3\]: expected 1 or 2 or 4 dimensions and no 0"),
        (ones(diff=(6, 8), diff_b=(8,)), r"the bias's difference is \[8\]: the weight's has 6 outputs"),
        (ones(diff=(6, 8), dora_scale=(6, 1)), "is a full difference with DoRA's dora_scale"),
        (ones(diff=(6, 8), w_norm=(6,)), "two modules of one name: .*diff.*w_norm"),
        (
            {**kohya(), **ones(diff_b=(6,))},
            "has diff_b, down, up: tensors of a full difference and of LoRA for one layer",
        ),
        (
            {f"{KOHYA_ATTENTION}_to_q.diff": torch.ones(6, 8).int()},
            "diff holds int32, not floating-point weights",
        ),
    ],
)
def test_faults_of_other_kinds_are_named(tmp_path: Path, tensors: Tensors, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        load_adapter(write(tmp_path / "a.safetensors", tensors))


@pytest.mark.parametrize(
    ("shapes", "kind", "size", "rank"),
    [
        (LOHA, "loha", (6, 8), 2),
        (LOHA | CORES, "loha", (6, 72), 2),
        (LOKR, "lokr", (6, 8), 1),
        ({"lokr_w1_a": (2, 3), "lokr_w1_b": (3, 2), "lokr_w2": (3, 4, 3, 3)}, "lokr", (6, 72), 3),
        (
            {"lokr_w1": (2, 2), "lokr_w2_a": (2, 3), "lokr_w2_b": (2, 4), "lokr_t2": (2, 2, 3, 3)},
            "lokr",
            (6, 72),
            2,
        ),
        ({"diff": (6, 8), "diff_b": (6,)}, "full", (6, 8), 6),
        ({"w_norm": (6,), "b_norm": (6,)}, "full", (6, 1), 1),
    ],
)
def test_other_kinds_are_read(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], kind: str, size: tuple[int, int], rank: int
) -> None:
    (module,) = load_adapter(write(tmp_path / "a.safetensors", ones(**shapes))).modules.values()
    assert (module.kind, module.matrix_shape, module.rank, module.scale) == (kind, size, rank, 1.0)
    assert module.update().numel() == size[0] * size[1]
    tensors = {**ones(**shapes), f"{KOHYA_ATTENTION}_to_q.alpha": torch.tensor(3.0)}
    (with_alpha,) = load_adapter(write(tmp_path / "b.safetensors", tensors)).modules.values()
    assert with_alpha.scale == (1.0 if kind == "full" else 3.0 / rank)


def test_magnitudes_are_those_of_outputs_or_inputs_by_spelling_and_shape() -> None:
    """[1, n] of a square layer: inputs in LyCORIS' files, outputs in PEFT's."""
    ours = f"{KOHYA_ATTENTION}_to_q.dora_scale"
    for shape, expected in (((6,), (6, 1)), ((6, 1), (6, 1)), ((1, 6), (1, 6)), ((1, 6, 1, 1), (1, 6))):
        (module,) = parse_adapter({**kohya(), ours: torch.ones(shape)}, {}).modules.values()
        assert module.dora_scale is not None and module.dora_scale.shape == expected
    peft = peft_pairs()
    name = f"base_model.model.{ATTENTION}.to_q.lora_magnitude_vector"
    for shape in ((6,), (1, 6), (1, 6, 1, 1)):
        module = parse_adapter({**peft, name: torch.ones(shape)}, {}).modules[f"unet.{ATTENTION}.to_q"]
        assert module.dora_scale is not None and module.dora_scale.shape == (6, 1)


def test_a_core_between_two_matrices_is_multiplied_in() -> None:
    core = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    tensors = {**kohya(), f"{KOHYA_ATTENTION}_to_q.lora_mid.weight": core[..., None, None]}
    (module,) = parse_adapter(tensors, {}).modules.values()
    assert module.mid is None
    torch.testing.assert_close(module.down, core @ tensors[f"{KOHYA_ATTENTION}_to_q.lora_down.weight"])


def test_parsing_never_raises_and_keeps_what_it_can() -> None:
    """For `inspect`: half a pair and unknown keys are left over, the rest is read."""
    tensors = {
        **kohya(),
        **without(kohya(f"{KOHYA_ATTENTION}_to_k"), "lora_up.weight"),
        "weird": torch.ones(1),
    }
    adapter = parse_adapter(tensors, {})
    assert list(adapter.modules) == [f"unet.{ATTENTION}.to_q"] and len(adapter.faults) == 1
    assert adapter.leftover == (f"{KOHYA_ATTENTION}_to_k.lora_down.weight", "weird")


def test_leftover_keys_are_told(tmp_path: Path) -> None:
    adapter = load_adapter(
        write(
            tmp_path / "a.safetensors",
            {**kohya(), "lora_unet_up_blocks_9_odd.lora_down.weight": torch.ones(1, 1)},
        )
    )
    written = save_adapter(adapter, tmp_path / "b.safetensors", "kohya", "fp32")
    assert (
        "1 keys belong to no module and are left out, the first is "
        "'lora_unet_up_blocks_9_odd.lora_down.weight'" in written.notes
    )
