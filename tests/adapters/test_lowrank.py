"""Cuts in rank: exact where they can be, the best approximation where not, and honest about the energy."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel

from conftest import make_pipeline_folder
from lorascope.adapters.adapter import Adapter
from lorascope.adapters.files import load_adapter, save_adapter
from lorascope.adapters.lowrank import (
    Checkpoint,
    Target,
    balanced,
    effective_rank,
    extract,
    resize,
    singular_values,
)
from lorascope.adapters.metadata import kohya_metadata
from lorascope.adapters.modules import LoraModule, Module
from lorascope.base.layers import ldm_path, stable_diffusion_layers
from lorascope.base.loading import Base
from lorascope.base.saving import save_ldm
from lorascope.cli.app import main
from lorascope.errors import EXIT_DONE, EXIT_INPUT, AdapterError
from random_adapters import random_full, random_loha, random_lokr

Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(
    rank: int, alpha: float | None = 3.0, size: tuple[int, int] = (24, 40), seed: int = 0
) -> LoraModule:
    draw = generator(seed)
    return LoraModule(
        torch.randn(rank, size[1], generator=draw), torch.randn(size[0], rank, generator=draw), alpha
    )


def convolution(rank: int, tucker: bool = False) -> LoraModule:
    draw = generator(1)
    kernel = (1, 1) if tucker else (3, 3)
    mid = torch.randn(rank, rank, 3, 3, generator=draw) if tucker else None
    return LoraModule(
        torch.randn(rank, 16, *kernel, generator=draw), torch.randn(20, rank, 1, 1, generator=draw), 2.0, mid
    )


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> bool:
    """Within some roundings of fp32, 1.2e-7 each; of a decomposition more, by the whole over what is left."""
    return bool((actual - expected).norm() <= tolerance * expected.norm())


@pytest.mark.parametrize(
    "module", [linear(8), linear(8, None), linear(30), convolution(6), convolution(6, tucker=True)]
)
def test_singular_values_are_those_of_the_whole_update(module: LoraModule) -> None:
    expected = torch.linalg.svdvals(module.update().double().flatten(1))
    ours = singular_values(module)
    assert torch.allclose(ours, expected[: len(ours)], rtol=1e-5, atol=1e-5 * float(expected[0]))


@pytest.mark.parametrize("module", [linear(8), linear(8, None), convolution(6), convolution(6, tucker=True)])
def test_a_cut_is_the_best_approximation_of_its_rank(module: LoraModule) -> None:
    cut = resize(Adapter({CONV: module}, "kohya", {}), Target(rank=3))
    new = cut.adapter.modules[CONV]
    u, s, v = torch.linalg.svd(module.update().flatten(1), full_matrices=False)
    best = (u[:, :3] * s[:3] @ v[:3]).view_as(module.update())
    assert (new.rank, new.scale) == (3, pytest.approx(module.scale))
    assert close(new.update(), best, 1e-5)
    assert cut.energy[CONV] == pytest.approx(float(s[:3].square().sum() / s.square().sum()), rel=1e-5)


def test_full_rank_changes_nothing() -> None:
    adapter = Adapter({Q: linear(8), CONV: convolution(4)}, "kohya", {})
    cut = resize(adapter, Target(rank=8))
    assert cut.adapter.modules == adapter.modules
    assert set(cut.energy.values()) == {1.0}
    assert "2 of 2 modules" in cut.notes[0]


def test_a_cut_to_the_true_rank_is_lossless_to_rounding() -> None:
    small = linear(4)
    wide = LoraModule(
        torch.cat([small.down, small.down]), torch.cat([small.up, small.up], 1), small.alpha
    )  # rank 8 in name only
    cut = resize(Adapter({Q: wide}, "kohya", {}), Target(energy=1 - 1e-9))
    assert cut.adapter.modules[Q].rank == 4
    assert close(cut.adapter.modules[Q].update(), wide.update())


def test_modules_get_ranks_of_their_own_by_energy() -> None:
    flat, steep = linear(8), linear(8, seed=2)
    steep = LoraModule(
        steep.down * torch.tensor([10.0, 1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])[:, None], steep.up, 3.0
    )
    cut = resize(Adapter({Q: flat, CONV: steep}, "kohya", {}), Target(energy=0.9))
    assert cut.adapter.modules[CONV].rank == 1 < cut.adapter.modules[Q].rank
    assert min(cut.energy.values()) >= 0.9
    assert "rank 1 to" in cut.summary()
    assert Target(rank=2, energy=0.9).rank_for(singular_values(flat)) == 2


def test_an_update_of_zero_keeps_rank_one() -> None:
    cut = resize(
        Adapter({Q: LoraModule(torch.randn(4, 8), torch.zeros(8, 4), 4.0)}, "kohya", {}), Target(energy=0.9)
    )
    assert cut.adapter.modules[Q].rank == 1
    assert not cut.adapter.modules[Q].update().any()
    assert cut.energy[Q] == 1.0
    assert effective_rank(torch.zeros(4)) == 0


def test_dora_is_refused() -> None:
    module = LoraModule(torch.randn(4, 8), torch.randn(8, 4), 4.0, dora_scale=torch.ones(8, 1))
    with pytest.raises(AdapterError, match="DoRA"):
        resize(Adapter({Q: module}, "kohya", {}), Target(rank=2))


LOHA = random_loha((20, 16, 3, 3), 3, 2.0, generator(1), core=True)
OTHERS: dict[str, Module] = {
    "LoHa": random_loha((20, 16, 3, 3), 3, 2.0, generator(1)),
    "LoHa with cores": LOHA,
    "LoKr": random_lokr((20, 16, 3, 3), 1, 2.0, generator(1)),
    "full": random_full((20, 16, 3, 3), generator(1)),
    "tall": random_full((40, 12), generator(1)),
}


@pytest.mark.parametrize("module", OTHERS.values(), ids=OTHERS)
def test_other_kinds_become_the_nearest_lora(module: Module) -> None:
    """The best approximation of the update, of scale 1; a convolution's kernel comes from its layer."""
    path = Q if module.kernel == () else CONV
    cut = resize(Adapter({path: module}, "kohya", {}), Target(rank=3))
    new = cut.adapter.modules[path]
    update = module.update().double().flatten(1)
    u, s, v = torch.linalg.svd(update.reshape(module.matrix_shape), full_matrices=False)
    best = u[:, :3] * s[:3] @ v[:3]
    assert isinstance(new, LoraModule) and (new.rank, new.scale) == (3, 1.0)
    assert new.weight_shape == ((20, 16, 3, 3) if path == CONV else (40, 12))
    assert close(new.update().flatten(1), best.float(), 1e-5)
    assert cut.energy[path] == pytest.approx(float(s[:3].square().sum() / s.square().sum()), rel=1e-6)
    torch.testing.assert_close(singular_values(module), s, rtol=1e-6, atol=1e-6 * float(s[0]))
    assert "1 modules of " in cut.notes[-2 if "full" in module.kind else -1]


def test_norms_and_biases_are_left_out_of_a_cut() -> None:
    norm = random_full((8,), generator())
    adapter = Adapter(
        {CONV: OTHERS["full"], f"{CONV}.norm": norm, Q: linear(2)},
        "kohya",
        {"ss_network_module": "lycoris.kohya", "ss_network_args": "{}", "ss_seed": "1"},
    )
    cut = resize(adapter, Target(rank=2))
    assert list(cut.adapter.modules) == [CONV, Q] and cut.adapter.metadata == {"ss_seed": "1"}
    assert cut.notes[1].startswith("1 modules of a full difference became the LoRA nearest")
    assert cut.notes[2] == "1 norms and 1 biases, which no LoRA holds, are left out"
    with pytest.raises(AdapterError, match="it changes norms alone, of which there is no LoRA: keep it"):
        resize(Adapter({f"{CONV}.norm": norm}, "kohya", {}), Target(rank=2))


@pytest.mark.parametrize(("rank", "energy"), [(None, None), (0, None), (None, 0.0), (None, 1.5)])
def test_a_target_must_be_possible(rank: int | None, energy: float | None) -> None:
    with pytest.raises(AdapterError, match="rank|energy"):
        Target(rank, energy)


def tuned_copy(
    folder: Path, destination: Path, updates: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> Path:
    """A copy of a pipeline folder with updates added to weights of its U-Net and text encoder."""
    for component, name in (
        ("unet", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
    ):
        state = safetensors.torch.load_file(folder / component / name)
        for path, update in updates.items():
            part, _, rest = path.partition(".")
            keys = [f"{rest}.weight", f"{rest.removeprefix('text_model.')}.weight"]
            if part == component:
                state[next(key for key in keys if key in state)] += update
        (destination / component).mkdir(parents=True)
        safetensors.torch.save_file(
            {key: value.to(dtype) for key, value in state.items()}, destination / component / name
        )
    return destination


def updates_for(folder: Path) -> dict[str, LoraModule]:
    """Modules of rank 3 for some layers of the tiny pipeline: a Linear, a wide one, convolutions, one of the
    text encoder.
    """
    shapes = Checkpoint(folder).shapes
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    paths = [
        Q,
        Q.replace("attn1.to_q", "ff.net.0.proj"),
        Q.replace("transformer_blocks.0.attn1.to_q", "proj_in"),
        CONV,
        text,
    ]
    modules = {}
    for index, path in enumerate(paths):
        shape, draw = shapes[f"{path}.weight"], generator(index)
        up = torch.randn(shape[0], 3, *[1] * (len(shape) - 2), generator=draw)
        modules[path] = LoraModule(torch.randn(3, *shape[1:], generator=draw) * 0.1, up, 6.0)
    return modules


def test_the_difference_of_a_merged_model_gives_its_adapter_back(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    modules = updates_for(pipeline_folder)
    tuned = tuned_copy(
        pipeline_folder, tmp_path / "tuned", {path: module.update() for path, module in modules.items()}
    )
    cut = extract(Checkpoint(pipeline_folder), Checkpoint(tuned), Target(rank=3))
    assert set(cut.adapter.modules) == set(modules)
    for path, module in cut.adapter.modules.items():
        assert (module.rank, module.scale, module.down.ndim) == (3, 1.0, modules[path].down.ndim)
        assert close(module.update(), modules[path].update(), 1e-5)
        assert cut.energy[path] == pytest.approx(1.0, abs=1e-9)
    assert any("do not differ" in note for note in cut.notes)


def test_energies_of_an_extraction_are_those_of_the_singular_values(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    modules = updates_for(pipeline_folder)
    tuned = tuned_copy(
        pipeline_folder, tmp_path / "tuned", {path: module.update() for path, module in modules.items()}
    )
    cut = extract(Checkpoint(pipeline_folder), Checkpoint(tuned), Target(rank=2))
    for path, module in modules.items():
        squares = torch.linalg.svdvals(module.update().double().flatten(1)).square()
        assert cut.energy[path] == pytest.approx(float(squares[:2].sum() / squares.sum()), rel=1e-5)
    assert f"least in {min(cut.energy, key=cut.energy.__getitem__)}" in cut.summary()


def test_rounding_of_a_coarser_file_is_no_training(pipeline_folder: Path, tmp_path: Path) -> None:
    half = tuned_copy(pipeline_folder, tmp_path / "half", {}, torch.float16)
    for pair in ((pipeline_folder, half), (half, pipeline_folder)):
        with pytest.raises(AdapterError, match="no layer differs"):
            extract(Checkpoint(pair[0]), Checkpoint(pair[1]), Target(rank=2))


def test_changes_that_no_adapter_holds_are_told(pipeline_folder: Path, tmp_path: Path) -> None:
    update = {Q: torch.ones(16, 16), "unet.conv_norm_out": torch.ones(16)}
    cut = extract(
        Checkpoint(pipeline_folder),
        Checkpoint(tuned_copy(pipeline_folder, tmp_path / "tuned", update)),
        Target(rank=1),
    )
    assert any("1 tensors that no LoRA holds" in note for note in cut.notes)


def test_models_that_cannot_be_compared(pipeline_folder: Path, tmp_path: Path) -> None:
    broken = tuned_copy(pipeline_folder, tmp_path / "nan", {Q: torch.full((16, 16), torch.nan)})
    with pytest.raises(AdapterError, match="NaN or infinite"):
        extract(Checkpoint(pipeline_folder), Checkpoint(broken), Target(rank=1))
    other = make_pipeline_folder(tmp_path / "other" / "base")
    UNet2DConditionModel.from_config(
        {**UNet2DConditionModel.load_config(other / "unet"), "cross_attention_dim": 24}
    ).save_pretrained(other / "unet")
    with pytest.raises(AdapterError, match="not the same architecture"):
        extract(Checkpoint(pipeline_folder), Checkpoint(other), Target(rank=1))
    (other / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="holds none of"):
        Checkpoint(other)
    (other / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="adapter"):
        Checkpoint(other)
    safetensors.torch.save_file(
        {"lora_unet_x.lora_down.weight": torch.ones(1, 1)}, tmp_path / "lora.safetensors"
    )
    with pytest.raises(AdapterError, match="adapter"):
        Checkpoint(tmp_path / "lora.safetensors")


def test_single_files_in_the_original_layout(tmp_path: Path) -> None:
    layers = stable_diffusion_layers(channels=(8, 8, 16, 16), text_width=8, text_hidden=16)
    state = {"first_stage_model.encoder.conv_in.weight": torch.ones(1)}
    for path, shape in layers.items():
        part, _, rest = path.partition(".")
        name = (
            f"model.diffusion_model.{ldm_path(rest)}"
            if part == "unet"
            else f"cond_stage_model.transformer.{rest}"
        )
        state[f"{name}.weight"] = torch.randn(shape, generator=generator())
    module = linear(2, size=layers[Q])  # type: ignore[arg-type]
    name = f"model.diffusion_model.{ldm_path(Q.removeprefix('unet.'))}.weight"
    safetensors.torch.save_file(state, tmp_path / "base.safetensors")
    torch.save({"state_dict": {**state, name: state[name] + module.update()}}, tmp_path / "tuned.ckpt")
    base, tuned = Checkpoint(tmp_path / "base.safetensors"), Checkpoint(tmp_path / "tuned.ckpt")
    assert {path.removesuffix(".weight") for path in base.layers} == set(layers)
    cut = extract(base, tuned, Target(energy=0.9999))
    assert set(cut.adapter.modules) == {Q}
    assert cut.adapter.modules[Q].rank == 2
    assert close(cut.adapter.modules[Q].update(), module.update(), 1e-5)


def test_a_checkpoint_file_of_other_blocks_has_the_names_of_its_folder(
    base: Base, pipeline_folder: Path, tmp_path: Path
) -> None:
    save_ldm(base, path := tmp_path / "base.safetensors", torch.float32)
    folder, file = Checkpoint(pipeline_folder), Checkpoint(path)
    assert file.shapes == folder.shapes and all(
        torch.equal(file.tensor(name), folder.tensor(name)) for name in folder.shapes
    )


def test_resize_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = stable_diffusion_layers()
    modules = {path: linear(4, 2.0, size=layers[path]) for path in (Q, Q.replace("to_q", "to_k"))}  # type: ignore[arg-type]
    adapter = Adapter(modules, "kohya", {})
    source, out = tmp_path / "style.safetensors", tmp_path / "small.safetensors"
    save_adapter(
        adapter, source, "kohya", "fp32", kohya_metadata(adapter, "style", {"ss_learning_rate": "0.0001"})
    )
    assert main(["resize", str(source), str(out), "--rank", "2", "--dtype", "fp32"]) == EXIT_DONE
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(out)]
    assert "2 modules, rank 2\nenergy kept: least" in printed.err
    small = load_adapter(out)
    assert {(module.rank, module.scale) for module in small.modules.values()} == {(2, 0.5)}
    expected = {
        "ss_network_dim": "2",
        "ss_network_alpha": "1.0",
        "ss_learning_rate": "0.0001",
        "ss_output_name": "small",
    }
    assert {key: small.metadata[key] for key in expected} == expected
    assert main(["resize", str(source), str(out), "--rank", "2"]) == EXIT_INPUT  # it exists
    assert main(["resize", str(source), str(out), "--rank", "1", "--force"]) == EXIT_DONE
    assert main(["resize", str(source), str(tmp_path / "other.safetensors")]) == EXIT_INPUT
    assert "--rank 16 or --energy 0.95" in capsys.readouterr().err
    full = Adapter({Q: random_full(layers[Q], generator())}, "kohya", {})
    save_adapter(full, source, "kohya", "fp32", kohya_metadata(full, "style"))
    assert main(["resize", str(source), str(out), "--rank", "4", "--force"]) == EXIT_DONE
    assert "1 biases, which no LoRA holds, are left out" in capsys.readouterr().err
    small = load_adapter(out)
    assert small.kinds == ("lora",) and small.metadata["ss_network_module"] == "networks.lora"


def test_extract_from_the_command_line(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modules = updates_for(pipeline_folder)
    tuned = tuned_copy(
        pipeline_folder, tmp_path / "tuned", {path: module.update() for path, module in modules.items()}
    )
    out = tmp_path / "style.safetensors"
    arguments = [
        "extract",
        str(pipeline_folder),
        str(tuned),
        str(out),
        "--energy",
        "0.999",
        "--dtype",
        "fp32",
    ]
    assert main(arguments) == EXIT_DONE
    assert f"{len(modules)} modules, rank 3" in capsys.readouterr().err
    for path, module in load_adapter(out).modules.items():
        assert close(module.update(), modules[path].update(), 1e-5)
    assert (
        main(
            [
                "extract",
                str(pipeline_folder),
                str(pipeline_folder),
                str(tmp_path / "none.safetensors"),
                "--rank",
                "2",
            ]
        )
        == EXIT_INPUT
    )
    assert "no layer differs" in capsys.readouterr().err
    assert not (tmp_path / "none.safetensors").exists()


@pytest.mark.parametrize("shape", [(12, 9), (12, 5, 3, 3), (3, 20)])
def test_balanced_factors_keep_a_small_update_in_half_precision(shape: tuple[int, ...]) -> None:
    """Of large factors that nearly cancel, as those of an adapter less what it started from."""
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(4, *shape[1:], generator=generator)
    up = torch.randn(shape[0], 4, *[1] * (len(shape) - 2), generator=generator)
    moved = down + 1e-3 * torch.randn(down.shape, generator=generator)
    module = LoraModule(torch.cat([moved, down]), torch.cat([up, -up], dim=1), alpha=16.0)
    even = balanced(module)
    assert even.rank == module.rank and even.scale == module.scale
    assert even.down.shape == module.down.shape and even.up.shape == module.up.shape
    norm = float(module.update().norm())
    # fp32 sums of products of numbers a thousand times larger than the update
    assert float((even.update() - module.update()).norm()) < 1e-3 * norm
    halves = {name: tensor.half() for name, tensor in even.tensors().items()}
    assert float((even.with_tensors(halves).update() - even.update()).norm()) < 2e-3 * norm
    rough = {name: tensor.half() for name, tensor in module.tensors().items()}
    assert float((module.with_tensors(rough).update() - module.update()).norm()) > 0.1 * norm
