"""Adapter files: other programs' loaders give our pictures, round trips lose nothing, strange files are
named.
"""

import copy
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from lorascope.adapters.files import (
    Adapter,
    Layout,
    LoraModule,
    foreign_kind,
    kohya_name,
    load_adapter,
    parse_adapter,
    save_adapter,
)
from lorascope.base.layers import stable_diffusion_layers
from lorascope.errors import AdapterError, WeightsError
from random_adapters import (
    ATTENTION,
    RANK,
    layers_of,
    load_pipeline,
    plain_lora_modules,
    random_adapter,
    random_module,
    shapes_of,
)

Tensors = dict[str, torch.Tensor]


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


# -- names ---------------------------------------------------------------------------------------------------


def small_tensors(paths: list[str]) -> Tensors:
    """kohya tensors of rank 1 for these modules, of one channel."""
    tensors = {}
    for path in paths:
        name = kohya_name(path)
        tensors |= {
            f"{name}.lora_down.weight": torch.ones(1, 1),
            f"{name}.lora_up.weight": torch.ones(1, 1),
            f"{name}.alpha": torch.tensor(2.0),
        }
    return tensors


def test_stable_diffusion_has_192_and_72_modules() -> None:
    paths = list(plain_lora_modules())
    assert sum(path.startswith("unet.") for path in paths) == 192
    assert sum(path.startswith("text_encoder.") for path in paths) == 72
    kinds = {
        part: sum(f".{part}" in path for path in paths)
        for part in ("attn1.", "attn2.", "ff.", "proj_in", "proj_out")
    }
    assert kinds == {"attn1.": 64, "attn2.": 64, "ff.": 32, "proj_in": 16, "proj_out": 16}
    assert kohya_name("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0") == (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    )
    assert kohya_name("unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj") == (
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj"
    )


def test_every_name_comes_back_and_diffusers_reads_each_as_we_do() -> None:
    """Our names of all layers, LoCon's too, through our parser and through diffusers' converter of kohya
    files.
    """
    paths = list(stable_diffusion_layers())
    assert len(paths) == len({kohya_name(path) for path in paths})
    adapter = parse_adapter(small_tensors(paths), {})
    assert set(adapter.modules) == set(paths) and not adapter.leftover and not adapter.faults
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(small_tensors(paths))
    theirs = {
        name.replace(".processor.", ".").replace(".to_out_lora", ".to_out.0_lora").replace("_lora.", ".lora.")
        for name in converted
    }
    text = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out.0": "out_proj"}
    read = set()
    for name in theirs:
        path = name.split(".lora")[0]
        for short, full in text.items():
            if path.startswith("text_encoder."):
                path = path.removesuffix(f".to_{short}") + (
                    f".{full}" if path.endswith(f".to_{short}") else ""
                )
        read.add(path)
    assert read == set(paths)
    assert len(alphas) == len(paths)


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


def test_a_layer_without_a_kohya_name_is_refused(tmp_path: Path) -> None:
    adapter = Adapter(
        {"unet.class_embedding.linear_1": LoraModule(torch.ones(1, 2), torch.ones(2, 1), None)}, "peft", {}
    )
    with pytest.raises(
        AdapterError, match="no layer of a Stable Diffusion v1 model.*write peft or diffusers"
    ):
        save_adapter(adapter, tmp_path / "a.safetensors", "kohya")


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


# -- hashes --------------------------------------------------------------------------------------------------


def test_hashes_are_those_that_the_programs_compute(tmp_path: Path) -> None:
    """sd-scripts' definition, from the file: the legacy hash is taken where the header has the `ss_` metadata
    alone.
    """
    metadata = {"ss_v2": "False", "ss_output_name": "größe", "modelspec.title": "style", "note": "x" * 5000}
    paths = [path for path, shape in stable_diffusion_layers().items() if "attn1.to_q" in path]
    adapter = random_adapter(
        dict.fromkeys(paths, (320, 320)), rank=32
    )  # 1.3 MB: beyond where the legacy hash begins
    save_adapter(adapter, tmp_path / "a.safetensors", "kohya", "fp32", metadata)
    content = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    found = json.loads(content[8 : 8 + length])["__metadata__"]
    assert {key: found[key] for key in metadata} == metadata
    assert found["sshs_model_hash"] == hashlib.sha256(content[8 + length :]).hexdigest()
    assert found["modelspec.hash_sha256"] == "0x" + found["sshs_model_hash"]
    training = {key: value for key, value in found.items() if key.startswith("ss_")}
    plain = safetensors.torch.save(safetensors.torch.load_file(tmp_path / "a.safetensors"), training)
    assert len(plain) > 0x110000
    assert found["sshs_legacy_hash"] == hashlib.sha256(plain[0x100000:0x110000]).hexdigest()[:8]


# -- strangers' files ----------------------------------------------------------------------------------------

KOHYA_ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1"


def pair(down: str, up: str, rank: int = 2, channels: int = 6) -> Tensors:
    generator = torch.Generator().manual_seed(len(down))
    return {
        down: torch.randn(rank, channels, generator=generator),
        up: torch.randn(channels, rank, generator=generator),
    }


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("down", "up", "path", "layout"),
    [
        (
            f"{KOHYA_ATTENTION}_to_q.lora_down.weight",
            f"{KOHYA_ATTENTION}_to_q.lora_up.weight",
            f"unet.{ATTENTION}.to_q",
            "kohya",
        ),
        (
            f"{KOHYA_ATTENTION}_to_out.lora_down.weight",
            f"{KOHYA_ATTENTION}_to_out.lora_up.weight",
            f"unet.{ATTENTION}.to_out.0",
            "kohya",
        ),
        (
            f"unet.{ATTENTION}.to_q.lora_A.weight",
            f"unet.{ATTENTION}.to_q.lora_B.weight",
            f"unet.{ATTENTION}.to_q",
            "diffusers",
        ),
        (
            f"unet.{ATTENTION}.to_q.lora.down.weight",
            f"unet.{ATTENTION}.to_q.lora.up.weight",
            f"unet.{ATTENTION}.to_q",
            "diffusers lora.down/up",
        ),
        (
            f"{ATTENTION}.processor.to_out_lora.down.weight",
            f"{ATTENTION}.processor.to_out_lora.up.weight",
            f"unet.{ATTENTION}.to_out.0",
            "diffusers attention processors",
        ),
        (
            "text_encoder.text_model.encoder.layers.3.self_attn.to_q_lora.down.weight",
            "text_encoder.text_model.encoder.layers.3.self_attn.to_q_lora.up.weight",
            "text_encoder.text_model.encoder.layers.3.self_attn.q_proj",
            "diffusers lora.down/up",
        ),
        (
            "text_encoder.encoder.layers.3.mlp.fc1.lora_linear_layer.down.weight",
            "text_encoder.encoder.layers.3.mlp.fc1.lora_linear_layer.up.weight",
            "text_encoder.text_model.encoder.layers.3.mlp.fc1",
            "diffusers lora.down/up",
        ),
        (
            "lora_te1_text_model_encoder_layers_3_mlp_fc1.lora_down.weight",
            "lora_te1_text_model_encoder_layers_3_mlp_fc1.lora_up.weight",
            "text_encoder.text_model.encoder.layers.3.mlp.fc1",
            "kohya",
        ),
        (
            f"base_model.model.{ATTENTION}.to_q.lora_A.default.weight",
            f"base_model.model.{ATTENTION}.to_q.lora_B.default.weight",
            f"unet.{ATTENTION}.to_q",
            "peft",
        ),
    ],
)
def test_every_spelling_is_read(tmp_path: Path, down: str, up: str, path: str, layout: str) -> None:
    tensors = pair(down, up)
    adapter = load_adapter(write(tmp_path / "a.safetensors", tensors))
    assert list(adapter.modules) == [path] and adapter.layout == layout and not adapter.leftover
    module = adapter.modules[path]
    assert torch.equal(module.down, tensors[down]) and torch.equal(module.up, tensors[up])
    assert module.alpha is None and module.scale == 1.0


def test_diffusers_mixed_save_is_read_whole(tmp_path: Path) -> None:
    """Attention processors beside `lora.down/up` layers, of which diffusers 0.42 itself loads only a part."""
    tensors = {
        **pair(
            f"unet.{ATTENTION}.processor.to_q_lora.down.weight",
            f"unet.{ATTENTION}.processor.to_q_lora.up.weight",
        ),
        **pair(
            "unet.mid_block.attentions.0.proj_in.lora.down.weight",
            "unet.mid_block.attentions.0.proj_in.lora.up.weight",
        ),
    }
    adapter = load_adapter(write(tmp_path / "a.safetensors", tensors))
    assert set(adapter.modules) == {f"unet.{ATTENTION}.to_q", "unet.mid_block.attentions.0.proj_in"}
    assert adapter.layout == "diffusers attention processors + diffusers lora.down/up"
    assert adapter.modules["unet.mid_block.attentions.0.proj_in"].down.shape == (2, 6, 1, 1)


def peft_folder(folder: Path, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir()
    write(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8, **config})
    )
    return folder


def peft_pairs() -> Tensors:
    return {
        **pair(
            f"base_model.model.{ATTENTION}.to_q.lora_A.weight",
            f"base_model.model.{ATTENTION}.to_q.lora_B.weight",
        ),
        **pair(
            f"base_model.model.{ATTENTION}.to_k.lora_A.weight",
            f"base_model.model.{ATTENTION}.to_k.lora_B.weight",
            rank=3,
        ),
    }


def test_a_peft_configuration_says_alpha(tmp_path: Path) -> None:
    config = {"rank_pattern": {"to_k": 3}, "alpha_pattern": {r"^.*": 1}, "use_rslora": True}
    with pytest.raises(AdapterError, match="alpha_pattern must map plain module names to numbers"):
        load_adapter(peft_folder(tmp_path / "regex", peft_pairs(), **config))
    adapter = load_adapter(
        peft_folder(tmp_path / "rs", peft_pairs(), **{**config, "alpha_pattern": {"attn1.to_k": 6}})
    )
    scales = {path.rpartition(".")[2]: module.scale for path, module in adapter.modules.items()}
    assert scales == pytest.approx({"to_q": 8 / 2**0.5, "to_k": 6 / 3**0.5})
    save_adapter(adapter, tmp_path / "plain", "peft", "fp32")  # the same strength without rsLoRA
    again = load_adapter(tmp_path / "plain")
    assert {path.rpartition(".")[2]: module.scale for path, module in again.modules.items()} == pytest.approx(
        scales
    )


def test_a_real_peft_adapter_with_patterns_is_read(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    """PEFT's own save, with rank and alpha patterns and rsLoRA, gives the updates that PEFT merges."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "proj_in"],
        rank_pattern={"proj_in": 2},
        alpha_pattern={"proj_in": 3},
        use_rslora=True,
        init_lora_weights=False,
    )
    model = peft.get_peft_model(copy.deepcopy(pipeline.unet), config)
    model.save_pretrained(str(tmp_path / "folder"))
    adapter = load_adapter(tmp_path / "folder")
    merged = model.merge_and_unload()
    assert len(adapter.modules) == sum(
        path.endswith(("to_q", "proj_in")) for path, _ in pipeline.unet.named_modules()
    )
    for path, module in adapter.modules.items():
        name = path.removeprefix("unet.")
        difference = merged.get_submodule(name).weight - pipeline.unet.get_submodule(name).weight
        # fp32: the difference of two weights about 1, each rounded at 6e-8
        torch.testing.assert_close(module.update(), difference.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA': only LORA can be converted"),
        (
            {"init_lora_weights": "pissa"},
            "'pissa' changes the base's weights: .*path_initial_model_for_weight_conversion",
        ),
        ({"lora_alpha": "eight"}, "is not a finite number"),
        ({"alpha_pattern": ["to_q"]}, "alpha_pattern must map"),
        ({"rank_pattern": ["to_q"]}, "rank_pattern is .'to_q'.: must map"),
        ({}, r"to_k: its configuration states rank 2, its tensors have rank 3: correct r or rank_pattern"),
        (
            {"r": 0, "rank_pattern": {"to_k": 3}},
            "to_q: its configuration states rank 0, its tensors have rank 2",
        ),
        ({"r": 3}, "to_q: its configuration states rank 3"),
        ({"rank_pattern": {"to_k": 3, "to_q": "2"}}, "to_q: its configuration states rank '2'"),
    ],
)
def test_a_peft_configuration_that_means_something_else_is_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        load_adapter(peft_folder(tmp_path / "folder", peft_pairs(), **config))


def test_alpha_that_a_peft_configuration_does_not_state_is_that_of_peft(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(pipeline.unet), config).save_pretrained(str(tmp_path))
    text = json.loads((tmp_path / "adapter_config.json").read_text())
    assert text.pop("lora_alpha") == 8
    (tmp_path / "adapter_config.json").write_text(json.dumps(text))
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(pipeline.unet), str(tmp_path)).merge_and_unload()
    path, module = next(iter(load_adapter(tmp_path).modules.items()))
    assert module.alpha == 8
    name = path.removeprefix("unet.")
    difference = merged.get_submodule(name).weight - pipeline.unet.get_submodule(name).weight
    torch.testing.assert_close(module.update(), difference.detach(), rtol=1e-3, atol=1e-5)


def test_what_a_peft_configuration_promises_and_the_file_does_not_hold_is_noted(tmp_path: Path) -> None:
    config = {"rank_pattern": {"to_k": 3, "gone": 4}, "use_dora": True, "bias": "all"}
    adapter = load_adapter(peft_folder(tmp_path / "folder", peft_pairs(), **config))
    assert adapter.notes == (
        "use_dora is set but there are no magnitudes: it is taken for plain LoRA, "
        "and PEFT takes the base's own",
        "bias = 'all' but there are no biases: those trained with it are lost",
        "rank_pattern names 1 modules that the file does not have, such as gone",
    )
    assert save_adapter(adapter, tmp_path / "out.safetensors", "kohya").notes[:3] == adapter.notes


def test_a_peft_folder_without_its_configuration_is_refused_unless_the_file_says_alpha(
    tmp_path: Path,
) -> None:
    folder = peft_folder(tmp_path / "folder", peft_pairs())
    (folder / "adapter_config.json").unlink()
    with pytest.raises(
        AdapterError, match=r"has no adapter_config.json, so alpha is unknown: put it there, or name"
    ):
        load_adapter(folder)
    adapter = load_adapter(folder / "adapter_model.safetensors")
    assert {module.alpha for module in adapter.modules.values()} == {None}
    save_adapter(
        replace(
            adapter, modules={path: replace(module, alpha=6.0) for path, module in adapter.modules.items()}
        ),
        own := tmp_path / "own",
        "peft",
    )
    (own / "adapter_config.json").unlink()
    assert {module.alpha for module in load_adapter(own).modules.values()} == {6.0}


@pytest.mark.parametrize(
    "alpha", [torch.tensor(3), torch.tensor([3]), torch.tensor([3.0]), torch.tensor(3).to(torch.uint8)]
)
def test_an_alpha_of_any_number_is_read(tmp_path: Path, alpha: torch.Tensor) -> None:
    (module,) = load_adapter(write(tmp_path / "a.safetensors", kohya(alpha=alpha))).modules.values()
    assert module.alpha == 3.0


def test_a_peft_folder_with_a_broken_configuration_is_refused(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "folder", peft_pairs())
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(
        AdapterError, match="adapter_config.json: cannot be read .*without it alpha is unknown"
    ):
        load_adapter(folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="must be a JSON object, is a list"):
        load_adapter(folder)
    with pytest.raises(AdapterError, match="holds no adapter_model.safetensors"):
        load_adapter(tmp_path)


def kohya(name: str = f"{KOHYA_ATTENTION}_to_q", rank: int = 2, **extra: torch.Tensor) -> Tensors:
    return {
        **pair(f"{name}.lora_down.weight", f"{name}.lora_up.weight", rank),
        **{f"{name}.{key}": value for key, value in extra.items()},
    }


def without(tensors: Tensors, ending: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(ending)}


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


def test_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="NaN or infinite"):
        load_adapter(
            write(
                tmp_path / "a.safetensors",
                {**kohya(), f"{KOHYA_ATTENTION}_to_q.lora_up.weight": torch.full((6, 2), math.nan)},
            )
        )


def test_damaged_alpha_metadata_is_a_fault(tmp_path: Path) -> None:
    tensors = pair(f"unet.{ATTENTION}.to_q.lora_A.weight", f"unet.{ATTENTION}.to_q.lora_B.weight")
    with pytest.raises(AdapterError, match="lora_adapter_metadata is not a JSON object, so alpha is unknown"):
        load_adapter(write(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": "[1"}))


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


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({f"{KOHYA_ATTENTION}_to_q.hada_w1_a": (2, 2)}, "a LoHa adapter (LyCORIS)"),
        ({f"{KOHYA_ATTENTION}_to_q.lokr_w1": (2, 2)}, "a LoKr adapter (LyCORIS)"),
        ({f"{KOHYA_ATTENTION}_to_q.on_input": (1,)}, "an IA3 adapter (LyCORIS)"),
        ({f"{KOHYA_ATTENTION}_to_q.oft_blocks": (2, 2, 2)}, "an OFT adapter (LyCORIS)"),
        ({f"{KOHYA_ATTENTION}_to_q.diff": (2, 2)}, "an adapter of full weight differences (LyCORIS)"),
        ({f"{KOHYA_ATTENTION}_to_q.a1.weight": (2, 2)}, "a GLoRA adapter (LyCORIS)"),
        ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (2, 2)}, "an adapter for SDXL"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (2, 2)}, "an adapter for SDXL"),
        (
            {f"{KOHYA_ATTENTION}_to_q.lora_down.weight".replace("attn1_to_q", "attn2_to_k"): (2, 2048)},
            "an adapter for SDXL",
        ),
        (
            {f"unet.{ATTENTION}.to_k.lora_A.weight".replace("attn1", "attn2"): (2, 1024)},
            "an adapter for Stable Diffusion 2.x",
        ),
        (
            {"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (2, 1024)},
            "an adapter for Stable Diffusion 2.x",
        ),
        ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (2, 2)}, "an adapter for Flux"),
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (2, 2)}, "an adapter for Flux"),
        ({"lora_unet_joint_blocks_0_x.lora_down.weight": (2, 2)}, "an adapter for Stable Diffusion 3"),
        (
            {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
            "a full checkpoint, not an adapter",
        ),
        ({"emb_params": (4, 768)}, "a textual inversion embedding"),
        ({"control_model.input_hint_block.0.weight": (2, 2)}, "a ControlNet or Control-LoRA"),
        (
            {"conv_in.weight": (320, 4, 3, 3)},
            "weights without LoRA's pairs of matrices: part of a model, or a file of another kind",
        ),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path: Path, keys: dict[str, tuple[int, ...]], kind: str) -> None:
    assert foreign_kind(keys) == kind
    tensors = {key: torch.zeros(shape) for key, shape in keys.items()}
    with pytest.raises(AdapterError, match=f"is {kind}".replace("(", r"\(").replace(")", r"\)")):
        load_adapter(write(tmp_path / "a.safetensors", tensors))
    torch.save(tensors, tmp_path / "a.pt")
    with pytest.raises(AdapterError, match="only LoRA for Stable Diffusion v1 can be read"):
        load_adapter(tmp_path / "a.pt")


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


def test_a_tucker_core_is_three_convolutions(tmp_path: Path) -> None:
    """The update equals down, core and up applied one after the other; without a core in the layout it is
    folded in.
    """
    adapter = tucker()
    module = adapter.modules[CONV]
    assert module.mid is not None and module.weight_shape == (7, 5, 3, 3)
    x = torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    conv = torch.nn.functional.conv2d
    expected = conv(conv(conv(x, module.down), module.mid, padding=1), module.up) * 0.5
    # fp32: 1.2e-7 * sqrt(5 * 9 * 3 * 3) products of normal numbers, up to 10 together, 2e-5
    torch.testing.assert_close(conv(x, module.update(), padding=1), expected, rtol=1e-4, atol=1e-4)
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


def test_text_encoder_names_of_transformers_5_get_the_names_that_files_have(tmp_path: Path) -> None:
    """huggingface/diffusers #13984: transformers 5 dropped `text_model` from module names, and keys made from
    them match nothing.
    """
    name = "text_encoder.encoder.layers.0.self_attn.q_proj"
    adapter = load_adapter(
        write(tmp_path / "a.safetensors", pair(f"{name}.lora_A.weight", f"{name}.lora_B.weight"))
    )
    save_adapter(adapter, tmp_path / "k.safetensors", "kohya", "fp32")
    assert (
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"
        in safetensors.torch.load_file(tmp_path / "k.safetensors")
    )


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
