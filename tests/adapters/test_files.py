"""Adapter files: other programs' loaders give our pictures, round trips lose nothing, strange files are
named.
"""

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from adapter_files import KOHYA_ATTENTION, kohya, write
from lorascope.adapters.adapter import Adapter
from lorascope.adapters.files import Layout, load_adapter, save_adapter
from lorascope.adapters.modules import LohaModule, LokrModule, LoraModule, Module
from lorascope.adapters.names import kohya_name
from lorascope.base.layers import stable_diffusion_layers
from lorascope.errors import AdapterError, WeightsError
from random_adapters import (
    ATTENTION,
    RANK,
    layers_of,
    load_pipeline,
    random_adapter,
    random_full,
    random_loha,
    random_lokr,
    random_module,
    shapes_of,
)


def same(a: Adapter, b: Adapter) -> bool:
    """Whether two adapters hold the same modules, bit for bit and in the same dtypes, and the same alphas."""
    return set(a.modules) == set(b.modules) and all(
        module.effective_alpha == b.modules[path].effective_alpha
        and all(
            torch.equal(tensor, b.modules[path].tensors()[name]) for name, tensor in module.tensors().items()
        )
        and module.tensors().keys() == b.modules[path].tensors().keys()
        for path, module in a.modules.items()
    )


# fp32: 1.2e-7 * sqrt(300) products summed in another order, through 12 layers, times guidance: 4e-5 of values
# about 1.
DRAWN = {"rtol": 1e-3, "atol": 1e-4}


def draw(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    """The latents of a few denoising steps."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        result = pipeline(
            "a red house",
            num_inference_steps=3,
            guidance_scale=5.0,
            generator=generator,
            output_type="latent",
        )
    latents: torch.Tensor = result.images
    return latents


@pytest.fixture(scope="module")
def pipeline(pipeline_folder: Path) -> StableDiffusionPipeline:
    """The tiny pipeline; never change it."""
    return load_pipeline(pipeline_folder)


# -- other programs' loaders ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # PEFT 0.21 asks transformers 5 for it
@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("alpha", [2.0, 4.0, 8.0], ids=["below", "equal", "above"])
@pytest.mark.parametrize("parts", ["unet", "all"])
def test_other_loaders_draw_what_the_adapter_says(
    pipeline: StableDiffusionPipeline,
    pipeline_folder: Path,
    tmp_path: Path,
    layout: Layout,
    alpha: float,
    parts: str,
) -> None:
    """diffusers loads our kohya and diffusers files, PEFT our folder: the same latents as weights with
    alpha/r * up @ down added.
    """
    shapes = {
        path: shape
        for path, shape in shapes_of(pipeline).items()
        if parts == "all" or path.startswith("unet.")
    }
    adapter = random_adapter(shapes, alpha)
    reference = copy.deepcopy(pipeline)
    layers = layers_of(reference)
    with torch.no_grad():
        for path, module in adapter.modules.items():
            product = torch.tensordot(module.up.flatten(1), module.down, dims=1)  # (out, in, ...)
            layers[path].weight += product * (alpha / RANK)
    expected = draw(reference)
    assert not torch.allclose(expected, draw(pipeline), atol=1e-2)

    target = tmp_path / ("folder" if layout == "peft" else "file.safetensors")
    save_adapter(adapter, target, layout, "fp32")
    loaded = load_pipeline(pipeline_folder)
    if layout != "peft":
        loaded.load_lora_weights(str(target))
    elif parts == "unet":
        loaded.unet = PeftModel.from_pretrained(loaded.unet, str(target)).base_model.model
    else:
        loaded.unet = PeftModel.from_pretrained(loaded.unet, str(target / "unet")).base_model.model
        loaded.text_encoder = PeftModel.from_pretrained(
            loaded.text_encoder, str(target / "text_encoder")
        ).base_model.model
    torch.testing.assert_close(draw(loaded), expected, **DRAWN)


def locon(
    pipeline: StableDiffusionPipeline, alpha_of: Callable[[int], float]
) -> tuple[Adapter, torch.Tensor]:
    """An adapter of all U-Net layers, with ranks of their own, and the latents it must give."""
    generator = torch.Generator().manual_seed(9)
    reference = copy.deepcopy(pipeline)
    modules = {}
    for path, layer in reference.unet.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            rank, alpha = 1 + len(modules) % 3, alpha_of(len(modules))
            module = modules[f"unet.{path}"] = random_module(
                tuple(layer.weight.shape), rank, alpha, generator
            )
            layer.weight.data += torch.tensordot(module.up.flatten(1), module.down, dims=1) * alpha / rank
    return Adapter(modules, "kohya", {}), draw(reference)


def drawn_by_diffusers(pipeline_folder: Path, path: Path) -> torch.Tensor:
    loaded = load_pipeline(pipeline_folder)
    loaded.load_lora_weights(str(path))
    return draw(loaded)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_every_kind_of_layer_with_its_own_rank_draws_the_same_in_diffusers(
    pipeline: StableDiffusionPipeline, pipeline_folder: Path, tmp_path: Path, layout: Layout
) -> None:
    """3x3 convolutions, shortcuts, samplers and time embeddings too."""
    adapter, expected = locon(pipeline, lambda _: 1.5)
    save_adapter(adapter, tmp_path / "a.safetensors", layout, "fp32")
    torch.testing.assert_close(
        drawn_by_diffusers(pipeline_folder, tmp_path / "a.safetensors"), expected, **DRAWN
    )


def test_alphas_of_each_modules_own_are_right_in_the_diffusers_file_and_told_in_kohyas(
    pipeline: StableDiffusionPipeline, pipeline_folder: Path, tmp_path: Path
) -> None:
    """diffusers 0.42 ignores kohya's per-module alphas of attention layers: its patterns match no module, and
    PEFT warns.
    """
    adapter, expected = locon(pipeline, lambda index: 1.0 + index % 4)
    save_adapter(adapter, tmp_path / "d.safetensors", "diffusers", "fp32")
    torch.testing.assert_close(
        drawn_by_diffusers(pipeline_folder, tmp_path / "d.safetensors"), expected, **DRAWN
    )
    written = save_adapter(adapter, tmp_path / "k.safetensors", "kohya", "fp32")
    assert any("diffusers misreads" in note for note in written.notes)
    with pytest.warns(RuntimeWarning, match="alpha_pattern keys did not match any targeted module"):
        misread = drawn_by_diffusers(pipeline_folder, tmp_path / "k.safetensors")
    assert not torch.allclose(misread, expected, rtol=1e-2, atol=1e-2)


def test_what_diffusers_cannot_tell_the_kind_of_is_noted(pipeline_folder: Path, tmp_path: Path) -> None:
    """diffusers knows a file with text-encoder modules by some of their names alone: the note stands exactly
    where it refuses.
    """
    pipeline = load_pipeline(pipeline_folder)
    shapes = shapes_of(pipeline)
    for name, layout in (
        (name, layout) for name in ("q_proj", "out_proj", "fc1") for layout in ("kohya", "diffusers")
    ):
        chosen = {
            path: shape
            for path, shape in shapes.items()
            if path.startswith("text_encoder.") and path.endswith(name)
        }
        adapter = random_adapter({**chosen, f"unet.{ATTENTION}.to_q": shapes[f"unet.{ATTENTION}.to_q"]})
        written = save_adapter(adapter, tmp_path / f"{name}-{layout}.safetensors", layout, "fp32")
        try:
            pipeline.load_lora_weights(written.path)
            refused = False
        except ValueError:
            refused = True
        pipeline.unload_lora_weights()
        assert refused == any("diffusers refuses" in note for note in written.notes), (
            name,
            layout,
            written.notes,
        )


# -- round trips ---------------------------------------------------------------------------------------------


def test_round_trips_lose_nothing(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    """kohya, diffusers, peft, kohya: the same bytes, for one alpha and for ranks and alphas of each module's
    own.
    """
    generator = torch.Generator().manual_seed(1)
    shapes = shapes_of(pipeline)
    own = {
        path: random_module(shape, 1 + n % 4, [None, 0.5, 3.0][n % 3], generator)
        for n, (path, shape) in enumerate(shapes.items())
    }
    for number, adapter in enumerate(
        (random_adapter(shapes), random_adapter(shapes, None), Adapter(own, "kohya", {}))
    ):
        folder = tmp_path / str(number)
        save_adapter(adapter, folder / "1.safetensors", "kohya", "fp32", {"ss_v2": "False"})
        save_adapter(load_adapter(folder / "1.safetensors"), folder / "2.safetensors", "diffusers", "fp32")
        save_adapter(load_adapter(folder / "2.safetensors"), folder / "3", "peft", "fp32")
        back = load_adapter(folder / "3")
        assert same(back, adapter) and not back.leftover
        save_adapter(back, folder / "4.safetensors", "kohya", "fp32", {"ss_v2": "False"})
        assert (folder / "4.safetensors").read_bytes() == (folder / "1.safetensors").read_bytes()
        assert [load_adapter(folder / name).layout for name in ("1.safetensors", "2.safetensors", "3")] == [
            "kohya",
            "diffusers",
            "peft",
        ]


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_ranks_alphas_and_modules_survive_every_layout(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("any")
    paths = data.draw(
        st.lists(st.sampled_from(list(stable_diffusion_layers())), min_size=1, max_size=6, unique=True)
    )
    modules = {}
    for path in paths:
        rank = data.draw(st.integers(1, 5))
        alpha = data.draw(st.none() | st.floats(0, 1e4, width=32))
        shape = (3, 2, *stable_diffusion_layers()[path][2:])
        modules[path] = random_module(shape, rank, alpha, torch.Generator().manual_seed(rank))
    adapter = Adapter(modules, "kohya", {})
    for layout in get_args(Layout):
        save_adapter(adapter, folder / f"{layout}.safetensors", layout, "fp32")
        loaded = load_adapter(folder / f"{layout}.safetensors")
        assert same(adapter, loaded) and same(loaded, adapter)


def test_half_precision_tells_its_rounding_and_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    module = random_module((64, 64), 4, 2.0, torch.Generator().manual_seed(0))
    adapter = Adapter({path: module}, "kohya", {})
    for dtype, low, high in (("fp32", 0, 0), ("fp16", 1e-4, 4e-4), ("bf16", 1e-3, 4e-3)):
        written = save_adapter(adapter, tmp_path / f"{dtype}.safetensors", "kohya", dtype)
        assert low <= written.rounding <= high and not written.notes
        assert written.num_bytes == (tmp_path / f"{dtype}.safetensors").stat().st_size
        assert load_adapter(tmp_path / f"{dtype}.safetensors").modules[path].alpha == 2.0
    large = Adapter({path: LoraModule(module.down * 1e6, module.up, 2.0)}, "kohya", {})
    with pytest.raises(
        AdapterError, match=r"down has values up to .*e\+05, beyond fp16's 65504: write bf16 or fp32"
    ):
        save_adapter(large, tmp_path / "large.safetensors", "kohya", "fp16")


def test_an_alpha_beyond_float32_is_refused_where_it_is_a_tensor(tmp_path: Path) -> None:
    module = replace(random_module((6, 5), 2, 1.0, torch.Generator().manual_seed(0)), alpha=4e38)
    adapter = Adapter({f"unet.{ATTENTION}.to_q": module}, "peft", {})
    with pytest.raises(AdapterError, match=r"alpha 4e\+38 is beyond the float32 that kohya files have"):
        save_adapter(adapter, tmp_path / "a.safetensors", "kohya")


def test_a_core_beyond_half_precision_is_multiplied_in_before_rounding(tmp_path: Path) -> None:
    """A core and a down whose product no fp16 holds are refused with a reason, not written as infinite."""
    ones = torch.ones(1, 1, 1, 1)
    large = LoraModule(ones * 300, ones * 1e-3, 1.0, mid=torch.full((1, 1, 3, 3), 300.0))
    adapter = Adapter({"unet.down_blocks.0.resnets.0.conv1": large}, "kohya", {})
    save_adapter(adapter, tmp_path / "k.safetensors", "kohya")
    with pytest.raises(AdapterError, match=r"down has values up to 9e\+04, beyond fp16's 65504"):
        save_adapter(adapter, tmp_path / "p", "peft")


def test_a_product_beyond_half_precision_is_refused_where_its_factors_are_not(tmp_path: Path) -> None:
    path = f"unet.{ATTENTION}.to_q"
    for value, fits in ((120.0, True), (130.0, False)):  # 4 * 130 * 130 = 67,600
        large = Adapter(
            {path: LoraModule(torch.full((4, 6), value), torch.full((6, 4), value), 4.0)}, "kohya", {}
        )
        assert save_adapter(large, tmp_path / "fp32.safetensors", "kohya", "fp32").rounding == 0
        assert torch.isfinite(large.modules[path].up.half() @ large.modules[path].down.half()).all() == fits
        if fits:
            save_adapter(large, tmp_path / "fp16.safetensors", "kohya", "fp16")
        else:
            with pytest.raises(
                AdapterError, match=r"up @ down reaches 6.76e\+04, beyond fp16's 65504.*: write bf16"
            ):
                save_adapter(large, tmp_path / "fp16.safetensors", "kohya", "fp16")


# -- strangers' files ----------------------------------------------------------------------------------------


def test_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="NaN or infinite"):
        load_adapter(
            write(
                tmp_path / "a.safetensors",
                {**kohya(), f"{KOHYA_ATTENTION}_to_q.lora_up.weight": torch.full((6, 2), math.nan)},
            )
        )


def test_a_pickled_lora_is_read(tmp_path: Path) -> None:
    torch.save(kohya(alpha=torch.tensor(1.0)), tmp_path / "a.pt")
    assert load_adapter(tmp_path / "a.pt").modules[f"unet.{ATTENTION}.to_q"].scale == 0.5


# -- LoCon and DoRA ------------------------------------------------------------------------------------------

CONV = "unet.down_blocks.0.resnets.0.conv1"


def tucker(path: str = CONV) -> Adapter:
    generator = torch.Generator().manual_seed(4)
    module = LoraModule(
        torch.randn(3, 5, 1, 1, generator=generator),
        torch.randn(7, 3, 1, 1, generator=generator),
        1.5,
        mid=torch.randn(3, 3, 3, 3, generator=generator),
    )
    return Adapter({path: module}, "kohya", {})


def test_a_tucker_core_is_kept_or_folded_in(tmp_path: Path) -> None:
    """Without a core in the layout the update is the same."""
    adapter = tucker()
    module = adapter.modules[CONV]
    assert module.mid is not None and module.weight_shape == (7, 5, 3, 3)
    written = save_adapter(adapter, tmp_path / "k.safetensors", "kohya", "fp32")
    assert any("diffusers refuses" in note for note in written.notes)
    assert same(load_adapter(tmp_path / "k.safetensors"), adapter)
    written = save_adapter(adapter, tmp_path / "p", "peft", "fp32")
    assert any("peft has no Tucker core" in note for note in written.notes)
    torch.testing.assert_close(
        load_adapter(tmp_path / "p").modules[CONV].update(), module.update(), rtol=1e-4, atol=1e-5
    )


def dora(
    pipeline: StableDiffusionPipeline, folder: Path, names: list[str]
) -> tuple[torch.nn.Module, Adapter]:
    """PEFT's own DoRA adapter: its merged U-Net, and what we read."""
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=names, use_dora=True, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(pipeline.unet), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.1)
    model.save_pretrained(str(folder))
    return model.merge_and_unload(), load_adapter(folder)


def test_dora_is_kept_where_it_can_be(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    _, adapter = dora(pipeline, tmp_path / "theirs", ["to_q", "proj_in"])
    assert {
        module.dora_scale.shape[1:].numel()
        for module in adapter.modules.values()
        if module.dora_scale is not None
    } == {1}
    written = save_adapter(adapter, tmp_path / "a.safetensors", "kohya", "fp32")
    assert any("diffusers drops dora_scale" in note for note in written.notes)
    assert same(load_adapter(tmp_path / "a.safetensors"), adapter)
    save_adapter(load_adapter(tmp_path / "a.safetensors"), tmp_path / "ours", "peft", "fp32")
    ours = safetensors.torch.load_file(tmp_path / "ours" / "adapter_model.safetensors")
    theirs = safetensors.torch.load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[key]) for key, tensor in ours.items()
    )
    with pytest.raises(AdapterError, match="DoRA: diffusers drops dora_scale"):
        save_adapter(adapter, tmp_path / "b.safetensors", "diffusers")


def test_dora_that_peft_has_not_is_refused(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (f"unet.{ATTENTION}.to_{name}" for name in "qk")
    plain = random_module((6, 5), 2, 1.0, generator)
    over_inputs = LoraModule(plain.down, plain.up, 1.0, dora_scale=torch.ones(1, 5))
    with pytest.raises(AdapterError, match="DoRA over inputs, which PEFT does not have"):
        save_adapter(Adapter({first: over_inputs}, "kohya", {}), tmp_path / "a", "peft")
    over_outputs = LoraModule(plain.down, plain.up, 1.0, dora_scale=torch.ones(6, 1))
    with pytest.raises(AdapterError, match="1 of 2 modules are DoRA, PEFT needs all or none"):
        save_adapter(Adapter({first: over_outputs, second: plain}, "kohya", {}), tmp_path / "a", "peft")


# -- files that load and do nothing --------------------------------------------------------------------------


def trained_by_diffusers(
    pipeline: StableDiffusionPipeline, folder: Path, alpha: int, **metadata: Any
) -> torch.Tensor:
    """A file of diffusers' own `save_lora_weights`, as its training scripts leave it, and the latents its
    training had.
    """
    trained = copy.deepcopy(pipeline)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=alpha,
        init_lora_weights=False,
        target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"],
    )
    trained.unet.add_adapter(config)
    layers = peft.utils.get_peft_model_state_dict(trained.unet)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, **metadata)
    return draw(trained)


def test_a_file_of_diffusers_scripts_becomes_one_that_webui_matches_whole(
    pipeline: StableDiffusionPipeline, pipeline_folder: Path, tmp_path: Path
) -> None:
    """AUTOMATIC1111/stable-diffusion-webui #14866 and huggingface/diffusers #6894, of one user: a LoRA of
    diffusers' scripts, converted by diffusers' own script, loads in WebUI and changes nothing, since no key
    is one that WebUI knows.

    Converted here, every module has the name that WebUI makes of it, and the picture is that of the training.
    """
    expected = trained_by_diffusers(pipeline, tmp_path / "theirs", alpha=4)
    source = load_adapter(tmp_path / "theirs" / "pytorch_lora_weights.safetensors")
    save_adapter(source, tmp_path / "ours.safetensors", "kohya", "fp32")
    keys = set(safetensors.torch.load_file(tmp_path / "ours.safetensors"))
    paths = [
        path
        for path, module in layers_of(pipeline).items()
        if path.endswith(("to_q", "to_k", "to_v", "to_out.0", "ff.net.2"))
    ]
    names = {"lora_unet_" + path.removeprefix("unet.").replace(".", "_") for path in paths}
    assert keys == {
        f"{name}.{ending}" for name in names for ending in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    torch.testing.assert_close(
        drawn_by_diffusers(pipeline_folder, tmp_path / "ours.safetensors"), expected, **DRAWN
    )


def test_alpha_survives_where_it_is_known_and_is_one_times_where_it_is_not(
    pipeline: StableDiffusionPipeline, pipeline_folder: Path, tmp_path: Path
) -> None:
    """huggingface/diffusers #6087: saved without its configuration, an adapter loads at another strength than
    it was trained at.
    """
    config = {"r": 4, "lora_alpha": 16, "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"]}
    expected = trained_by_diffusers(pipeline, tmp_path / "whole", 16, unet_lora_adapter_metadata=config)
    whole = load_adapter(tmp_path / "whole" / "pytorch_lora_weights.safetensors")
    assert {module.scale for module in whole.modules.values()} == {4.0}
    save_adapter(whole, tmp_path / "ours.safetensors", "kohya", "fp32")
    torch.testing.assert_close(
        drawn_by_diffusers(pipeline_folder, tmp_path / "ours.safetensors"), expected, **DRAWN
    )
    trained_by_diffusers(pipeline, tmp_path / "lost", 16)
    lost = load_adapter(tmp_path / "lost" / "pytorch_lora_weights.safetensors")
    assert {(module.alpha, module.scale) for module in lost.modules.values()} == {
        (None, 1.0)
    }  # as every reader takes it


def test_ranks_of_their_own_without_alpha_are_written_with_one(
    pipeline: StableDiffusionPipeline, pipeline_folder: Path, tmp_path: Path
) -> None:
    """huggingface/diffusers #14409: mixed ranks without alpha keys got the alpha of whichever module came
    first.
    """
    generator = torch.Generator().manual_seed(2)
    shapes = {path: shape for path, shape in shapes_of(pipeline).items() if path.startswith("unet.")}
    modules = {
        path: random_module(shape, 1 + index % 3, None, generator)
        for index, (path, shape) in enumerate(shapes.items())
    }
    reference = copy.deepcopy(pipeline)
    for path, module in modules.items():
        layers_of(reference)[path].weight.data += torch.tensordot(module.up.flatten(1), module.down, dims=1)
    save_adapter(Adapter(modules, "kohya", {}), tmp_path / "a.safetensors", "diffusers", "fp32")
    torch.testing.assert_close(
        drawn_by_diffusers(pipeline_folder, tmp_path / "a.safetensors"), draw(reference), **DRAWN
    )
    save_adapter(Adapter(modules, "kohya", {}), tmp_path / "k.safetensors", "kohya", "fp32")
    tensors = safetensors.torch.load_file(tmp_path / "k.safetensors")
    assert all(tensors[f"{kohya_name(path)}.alpha"] == module.rank for path, module in modules.items())


def test_weights_that_half_precision_makes_nothing_of_are_told(tmp_path: Path) -> None:
    """kohya-ss/sd-webui-additional-networks #49: unscaled weights of a small alpha underflow in fp16, and the
    file does nothing.
    """
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    module = random_module((64, 64), 4, 2.0, torch.Generator().manual_seed(0))
    small = Adapter({path: LoraModule(module.down * 1e-9, module.up, 2.0)}, "kohya", {})
    assert (
        "256 of 512 weights are below the range of fp16 and became 0"
        in save_adapter(small, tmp_path / "small.safetensors", "kohya").notes
    )


# -- LoHa, LoKr and full differences -------------------------------------------------------------------------

TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
NORM = "unet.down_blocks.0.resnets.0.norm1"


def drawn_modules(
    pipeline: StableDiffusionPipeline, kind: str, core: bool = False, factor: int = -1
) -> dict[str, Module]:
    """Modules of one kind for all of a pipeline's layers, with ranks and alphas of their own; norms too of
    full differences.
    """
    generator = torch.Generator().manual_seed(6)
    modules: dict[str, Module] = {}
    parts = (("unet.", pipeline.unet), ("text_encoder.text_model.", pipeline.text_encoder))
    for prefix, path, layer in ((prefix, *item) for prefix, part in parts for item in part.named_modules()):
        is_norm = isinstance(layer, torch.nn.GroupNorm | torch.nn.LayerNorm)
        if not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and not (is_norm and kind == "full"):
            continue
        shape, rank, alpha = tuple(layer.weight.shape), 1 + len(modules) % 3, 1.0 + len(modules) % 2
        name = prefix + path.removeprefix("text_model.")
        if kind == "full":
            modules[name] = random_full(shape, generator, bias=layer.bias is not None)
        elif kind == "loha":
            has_core = core and shape[2:].count(1) == 0
            modules[name] = random_loha(shape, rank, alpha, generator, core=has_core)
        else:
            modules[name] = random_lokr(shape, rank, alpha, generator, factor, core)
    return modules


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize(("kind", "factor"), [("loha", -1), ("lokr", -1), ("lokr", 4)])
def test_peft_loads_our_loha_and_lokr_to_the_same_update(
    pipeline: StableDiffusionPipeline, tmp_path: Path, kind: str, factor: int, core: bool
) -> None:
    """All layers of U-Net and text encoder, with factors and whole, and the folder comes back as it was."""
    adapter = Adapter(drawn_modules(pipeline, kind, core, factor), "kohya", {})
    save_adapter(adapter, tmp_path / "a", "peft", "fp32")
    for component, part in (("unet", pipeline.unet), ("text_encoder", pipeline.text_encoder)):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # of settings that PEFT does not know
            model = PeftModel.from_pretrained(copy.deepcopy(part), str(tmp_path / "a" / component))
        for path, module in adapter.components()[component].items():
            layer = model.base_model.model.get_submodule(path.removeprefix("text_model."))
            theirs = layer.get_delta_weight("default").detach()
            torch.testing.assert_close(module.update().reshape(theirs.shape), theirs, rtol=1e-4, atol=1e-5)
    back = load_adapter(tmp_path / "a")
    assert set(back.modules) == set(adapter.modules) and not back.leftover
    for path, module in back.modules.items():
        tensors = adapter.modules[path].tensors()
        assert module.tensors().keys() == tensors.keys() and module.scale == adapter.modules[path].scale
        assert all(torch.equal(part, tensors[name]) for name, part in module.tensors().items())


@pytest.mark.parametrize("kind", ["loha", "lokr", "full"])
@pytest.mark.parametrize("core", [False, True])
def test_other_kinds_come_back_from_kohya_files(
    pipeline: StableDiffusionPipeline, tmp_path: Path, kind: str, core: bool
) -> None:
    adapter = Adapter(drawn_modules(pipeline, kind, core), "kohya", {})
    written = save_adapter(adapter, tmp_path / "a.safetensors", "kohya", "fp32")
    assert any("WebUI, Forge and ComfyUI read it; diffusers and sd-scripts" in note for note in written.notes)
    back = load_adapter(tmp_path / "a.safetensors")
    assert not back.leftover and back.layout == "kohya" and same(back, adapter) and same(adapter, back)
    with pytest.raises(AdapterError, match="diffusers' load_lora_weights reads LoRA alone: write kohya"):
        save_adapter(adapter, tmp_path / "b.safetensors", "diffusers")


def test_other_kinds_have_lycoris_names(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    path, name = f"unet.{ATTENTION}.to_q", f"{KOHYA_ATTENTION}_to_q"
    norm = kohya_name(NORM)
    for modules, expected in (
        (
            {path: random_loha((6, 8), 2, 1.0, generator)},
            ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"],
        ),
        ({path: random_lokr((6, 8), None, 1.0, generator)}, ["lokr_w1", "lokr_w2"]),
        ({path: random_lokr((6, 8), 1, 1.0, generator)}, ["lokr_w1", "lokr_w2_a", "lokr_w2_b"]),
        ({path: random_full((6, 8), generator)}, ["diff", "diff_b"]),
        ({path: random_full((6, 8), generator, bias=False)}, ["diff"]),
    ):
        adapter = Adapter(modules, "kohya", {})
        save_adapter(adapter, tmp_path / "a.safetensors", "kohya", "fp32")
        alpha = [] if adapter.kinds == ("full",) else ["alpha"]
        keys = set(safetensors.torch.load_file(tmp_path / "a.safetensors"))
        assert keys == {f"{name}.{ending}" for ending in [*expected, *alpha]}
    for bias in (True, False):  # WebUI refuses one without the other
        save_adapter(
            Adapter({NORM: random_full((6,), generator, bias)}, "kohya", {}),
            tmp_path / "a.safetensors",
            "kohya",
            "fp32",
        )
        tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
        assert tensors.keys() == {f"{norm}.w_norm", f"{norm}.b_norm"}
        assert tensors[f"{norm}.b_norm"].any() == bias


def test_a_folder_of_full_differences_needs_no_configuration(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    """The configuration of an adapter that was there before goes, since it is not theirs."""
    adapter = Adapter(
        {
            path: module
            for path, module in drawn_modules(pipeline, "full").items()
            if path.startswith("unet.")
        },
        "kohya",
        {},
    )
    save_adapter(random_adapter({f"unet.{ATTENTION}.to_q": (6, 8)}), tmp_path / "a", "peft")
    assert (tmp_path / "a" / "adapter_config.json").exists()
    written = save_adapter(adapter, tmp_path / "a", "peft", "fp32")
    assert "PEFT has no full differences: lorascope reads this folder" in written.notes[0]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["adapter_model.safetensors"]
    assert same(load_adapter(tmp_path / "a"), adapter)
    text = Adapter({TEXT: adapter.modules[f"unet.{ATTENTION}.to_q"]}, "kohya", {})
    save_adapter(text, tmp_path / "b", "peft", "fp32")
    assert same(load_adapter(tmp_path / "b"), text)
    save_adapter(
        Adapter({f"unet.{ATTENTION}.to_q": random_loha((6, 8), 2, 1.0, torch.Generator())}, "kohya", {}),
        tmp_path / "c",
        "peft",
    )
    metadata_gone = safetensors.torch.load_file(tmp_path / "c" / "adapter_model.safetensors")
    safetensors.torch.save_file(metadata_gone, tmp_path / "c" / "adapter_model.safetensors")
    (tmp_path / "c" / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match="so alpha is unknown"):
        load_adapter(tmp_path / "c")


def test_peft_folders_are_of_one_kind(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    loha, full = random_loha((6, 8), 2, 1.0, generator), random_full((6,), generator)
    with pytest.raises(
        AdapterError, match="unet: has LoHa and a full difference, PEFT takes one kind of adap"
    ):
        save_adapter(
            Adapter({f"unet.{ATTENTION}.to_q": loha, NORM: full}, "kohya", {}), tmp_path / "a", "peft"
        )
    mixed = Adapter({f"unet.{ATTENTION}.to_q": loha, TEXT: random_module((6, 8), 2, 1.0, generator)}, "", {})
    save_adapter(mixed, tmp_path / "b", "peft", "fp32")
    assert same(load_adapter(tmp_path / "b"), mixed)


def test_products_of_other_kinds_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    path = f"unet.{ATTENTION}.to_q"
    large, ones = torch.full((6, 2), 200.0), torch.ones(2, 8)
    core = torch.full((2, 2, 3, 3), 200.0)
    for module, product in (
        (LohaModule(large, ones, large, ones, 1.0), r"\(w1_a @ w1_b\) \* \(w2_a @ w2_b\) reaches 1.6e\+05"),
        (LohaModule(large.T, ones, large.T, ones, 1.0, core, core), "w2_b. reaches 2.56e"),
        (LokrModule(1.0, w1=large, w2_a=large, w2_b=ones), r"kron\(w1, w2\) reaches 8e\+04"),
    ):
        with pytest.raises(AdapterError, match=product):
            save_adapter(Adapter({path: module}, "kohya", {}), tmp_path / "a.safetensors", "kohya", "fp16")
    fits = LohaModule(large / 100, ones, large / 100, ones, 1.0)
    save_adapter(Adapter({path: fits}, "kohya", {}), tmp_path / "a.safetensors", "kohya", "fp16")


def test_nan_of_other_kinds_is_refused(tmp_path: Path) -> None:
    bad = torch.full((6, 8), math.nan)
    with pytest.raises(WeightsError, match="NaN or infinite"):
        load_adapter(write(tmp_path / "a.safetensors", {f"{KOHYA_ATTENTION}_to_q.diff": bad}))


def test_pefts_scale_of_whole_factors_is_kept(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    """PEFT multiplies LoKr by alpha / r also where nothing is a product, LyCORIS does not."""
    config = peft.LoKrConfig(
        r=64, alpha=16, target_modules=["to_q"], init_weights=False, alpha_pattern={"attn2.to_q": 32}
    )
    model = peft.get_peft_model(copy.deepcopy(pipeline.unet), config)
    model.save_pretrained(str(tmp_path / "a"))
    adapter = load_adapter(tmp_path / "a")
    assert adapter.kinds == ("lokr",) and not any(module.has_scale for module in adapter.modules.values())
    save_adapter(adapter, tmp_path / "k.safetensors", "kohya", "fp32")
    for found in (adapter, load_adapter(tmp_path / "k.safetensors")):
        for path, module in found.modules.items():
            layer = model.base_model.model.get_submodule(path.removeprefix("unet."))
            theirs = layer.get_delta_weight("default").detach()
            torch.testing.assert_close(module.update().reshape(theirs.shape), theirs)
