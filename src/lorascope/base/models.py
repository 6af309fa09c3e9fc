"""The models of a base from its weights: a folder's, one checkpoint file's, or tensors at hand."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from lorascope.base.configs import load_part
from lorascope.base.family import WANTED, family_of_tensors
from lorascope.base.ldm import build_component, canonical_name, check_tensors, list_pairs, to_diffusers
from lorascope.base.location import WEIGHT_STEMS, weight_files
from lorascope.base.weights import PICKLE_SUFFIXES, load_tensors, read_header, require_finite
from lorascope.errors import BaseModelError

MODEL_CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
_FLAGS = ("v_pred", "ztsnr")  # empty tensors by which some programs mark what a checkpoint predicts


def load_folder(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The models of a folder in the diffusers layout; its weight files are checked before the libraries read
    them.
    """
    models = {}
    for part, kind in MODEL_CLASSES.items():
        stem, files = WEIGHT_STEMS[part], weight_files(folder, part)
        if not files:
            others = (path for path in (folder / part).iterdir() if path.suffix in (".safetensors", ".bin"))
            found = ", ".join(sorted(path.name for path in others)) or "no weights"
            raise BaseModelError(
                f"{folder / part}: lacks {stem}.safetensors (it has {found}): get the full-precision "
                "safetensors files"
            )
        # The two libraries have two words for it.
        keyword = "dtype" if part == "text_encoder" else "torch_dtype"
        options = {keyword: dtype if part == "unet" else torch.float32}
        model, info = load_part(kind, folder, part, use_safetensors=True, output_loading_info=True, **options)
        wrong = {"lacks": info["missing_keys"], "has unknown": info["unexpected_keys"]}
        for what, names in wrong.items():
            if names := sorted(name for name in names if not name.endswith("position_ids")):
                raise BaseModelError(
                    f"{folder / part}: {what} {len(names)} tensors of the {kind.__name__}, the first is "
                    f"{names[0]!r}: the folder is damaged or of another family"
                )
        require_finite(model.state_dict(), folder / part)
        models[part] = model
    return models


def load_file(
    path: Path, configs: dict[str, dict[str, Any]], dtype: torch.dtype, is_told: bool
) -> dict[str, Any]:
    """The models of one checkpoint file in the original layout, whose names and shapes are checked before
    data is read.

    `is_told`: the study or the scheduler's configuration says what it predicts. Else a file that says `v` is
    refused, since SD v1.5's configuration says noise.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        mapped, metadata = load_tensors(path), {}
        shapes = {name: tuple(tensor.shape) for name, tensor in mapped.items()}
    else:
        header = read_header(path)
        metadata, shapes = header.metadata, {name: info.shape for name, info in header.tensors.items()}
    if family := family_of_tensors(shapes):
        raise BaseModelError(f"{path}: is {family}: {WANTED}")
    if not is_told and ("v_pred" in shapes or metadata.get("modelspec.prediction_type") == "v"):
        raise BaseModelError(f'{path}: says that it predicts v: set base.prediction_type = "v_prediction"')
    pairs = list_pairs(configs)
    stored_names = {canonical_name(name): name for name in shapes if name not in _FLAGS}
    check_tensors({name: shapes[stored] for name, stored in stored_names.items()}, pairs, path)
    state = load_tensors(path, [stored_names[pair.ldm] for pair in pairs])
    require_finite(state, path)
    if integers := [name for name, tensor in state.items() if not tensor.is_floating_point()]:
        raise BaseModelError(
            f"{path}: {integers[0]} holds {state[integers[0]].dtype}, not floating-point weights: get "
            "the fp16 file"
        )
    states = to_diffusers({pair.ldm: state[stored_names[pair.ldm]] for pair in pairs}, pairs)
    for component, tensors in states.items():
        for name, tensor in tensors.items():  # copied, since what is mapped from a file ends with the file
            tensors[name] = tensor.to(dtype if component == "unet" else torch.float32, copy=True)
    return build_models(configs, states)


def build_models(
    configs: dict[str, dict[str, Any]], states: dict[str, dict[str, torch.Tensor]]
) -> dict[str, Any]:
    """Models that hold the tensors of `states` themselves."""
    models: dict[str, Any] = {}
    for component, state in states.items():
        if component == "text_encoder":
            config = CLIPTextConfig.from_dict(configs[component])
            models[component] = CLIPTextModel.from_pretrained(
                None, config=config, state_dict=state, dtype=torch.float32
            )
        else:
            with torch.device("meta"):
                models[component] = build_component(component, configs[component])
            models[component].load_state_dict(state, assign=True)
    return models
