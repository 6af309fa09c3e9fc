"""What an adapter file is, and whether it would do anything: for files of anybody, from their headers and one
module at a time.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorascope.adapters.adapter import LoraModule
from lorascope.adapters.file_modules import FileModule, file_modules
from lorascope.adapters.foreign import foreign_kind
from lorascope.adapters.hashes import check_hashes
from lorascope.adapters.lowrank import effective_rank, singular_values
from lorascope.adapters.parsing import parse_adapter
from lorascope.adapters.peft_config import configuration_notes
from lorascope.adapters.readers import Reading, listed_version, read_by_all
from lorascope.base.family import family_of_folder, family_of_tensors
from lorascope.base.layers import Shape, stable_diffusion_layers
from lorascope.base.weights import PICKLE_SUFFIXES, count_not_finite, load_tensors, read_header
from lorascope.errors import WeightsError, first_line
from lorascope.store import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    access_errors,
    open_regular,
    read_regular,
    require_regular,
)

# An update whose elements have a smaller root mean square is near zero: fp16 numbers of 0.02, the size of the
# base's weights at their initialization (1/sqrt(3 in)), lie 1.5e-5 apart, so a merge in half precision rounds
# such an update away.
NEAR_ZERO_RMS = 1e-6
_NUMBERS_AT_ONCE = 2**25  # in memory; a full matrix of Stable Diffusion v1.5's largest layer has 2.9e7
_MAX_MODULES = 4000  # SDXL's adapters have at most some 2,000
_SD1_WIDTH = 768
_FAMILY_BY_WIDTH = {768: "Stable Diffusion v1", 1024: "Stable Diffusion v2", 2048: "SDXL"}
_DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}
_SPELLINGS = {  # the layout of a file by its modules' names and the ends of their keys
    ".lora_down.weight": "kohya",
    "_lora.down.weight": "diffusers attention processors",
    ".lora_A.weight": "PEFT",
    ".lora_A": "PEFT",
    ".lora_A.default.weight": "PEFT",
    ".lora.down.weight": "diffusers lora.down/up",
    ".lora_linear_layer.down.weight": "diffusers text encoder",
}


@dataclass(frozen=True)
class ModuleFacts:
    """One adapted layer of a file."""

    name: str  # in the file
    path: str | None  # in Stable Diffusion v1.5, if it has such a layer
    kind: str  # LoRA, LoHa, LoKr, ...
    block: str  # attention, feed-forward, projection, convolution, time embedding, text encoder, or other
    rank: int | None = None
    alpha: float | None = None
    scale: float | None = None  # alpha / rank; 1 without alpha
    norm: float | None = None  # Frobenius norm of scale * B A
    rms: float | None = None  # of the elements of the update
    rank_used: int | None = None  # singular values that hold 95 % of the energy
    is_dora: bool = False
    is_zero: bool = False
    num_not_finite: int = 0  # values that are NaN or infinite
    fault: str | None = None  # why it could not be measured

    @property
    def is_near_zero(self) -> bool:
        """Whether the update would vanish in half precision, all zeros included."""
        return self.is_zero or (self.rms is not None and self.rms < NEAR_ZERO_RMS)


@dataclass(frozen=True)
class Inspection:
    """Everything that could be said of a file."""

    path: Path
    what: str  # in words, such as "LoRA for Stable Diffusion v1: U-Net"
    layout: str | None  # of an adapter: kohya, PEFT, ...
    family: str | None  # of an adapter: the model it fits, None where the file does not show it
    num_bytes: int
    num_parameters: int
    dtypes: dict[str, int]  # tensors by dtype, without alphas and other single numbers
    modules: tuple[ModuleFacts, ...]
    readings: tuple[Reading, ...]  # empty for what is no adapter for Stable Diffusion v1
    leftover: tuple[str, ...]  # keys that belong to no module
    metadata: dict[str, str]
    hashes: dict[
        str, str
    ]  # name of a hash in the metadata: "matches", "does not match ..." or why it was not checked
    remarks: tuple[str, ...]  # what a user should know besides, a sentence each

    @property
    def dead_because(self) -> str | None:
        """Why the file does nothing wherever it is loaded, or None."""
        if not self.modules:
            return self.what
        if bad := [module for module in self.modules if module.num_not_finite]:
            return (
                f"{len(bad)} of {len(self.modules)} modules hold NaN or infinite values: pictures turn "
                "black or to noise"
            )
        if all(module.scale == 0 for module in self.modules):
            return "alpha is zero in every module, so its strength is zero"
        if all(module.is_zero for module in self.modules):
            return "B is zero in every module, as before the first training step: it was trained for no step"
        if all(module.is_near_zero for module in self.modules):
            return f"the updates of all modules are near zero (root mean square below {NEAR_ZERO_RMS:g})"
        return None

    @property
    def works_somewhere(self) -> bool:
        """Whether at least one program would change Stable Diffusion v1.5's pictures with it."""
        return self.dead_because is None and any(reading.taken for reading in self.readings)

    def as_dict(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        facts = {key: value for key, value in asdict(self).items() if key not in ("path", "readings")}
        answers = {
            reading.reader: {
                "answer": reading.verdict,
                "taken": len(reading.taken),
                "modules": len(self.modules),
                "ignored": list(reading.ignored),
                "refusal": reading.refusal,
                "notes": list(reading.notes),
            }
            for reading in self.readings
        }
        return {
            "path": str(self.path),
            "works_somewhere": self.works_somewhere,
            "dead_because": self.dead_because,
            "readers": answers,
            **facts,
        }


# -- reading the file ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Content:
    """A file's tensors by header, and a way to its weights."""

    path: Path
    shapes: dict[str, Shape]
    dtypes: dict[str, int]
    num_parameters: int
    metadata: dict[str, str]
    data_start: int  # where a safetensors file's data begin; 0 for a pickle
    config: dict[str, Any] | None = None
    archive: dict[str, torch.Tensor] | None = None

    def tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        if self.archive is not None:
            return {name: self.archive[name] for name in names}
        return load_tensors(self.path, names)


@access_errors(WeightsError)
def inspect_adapter(path: Path | str) -> Inspection:
    """Look into a file or PEFT folder of any origin; nothing in it is executed.

    Time and memory are bounded by the adapter's own size: anything else is told from its header. Raises
    `WeightsError` only where `path` is not there, cannot be read, or is a folder of several adapters; damaged
    files and files of other kinds are a finding.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder: name an adapter file or a PEFT folder")
    if path.is_dir():
        _require_one_adapter(path)
    else:
        require_regular(path, WeightsError)
    try:
        return _inspect_folder(path) if path.is_dir() else _inspect_content(_open(path), path)
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot be read ({error.strerror}): check the path and its permissions"
        ) from error
    except WeightsError as error:
        if isinstance(error.__cause__, OSError):
            raise
        what = str(error).removeprefix(f"{path}: ").removeprefix("is ")
        return _no_adapter(path, what, path.stat().st_size)


def _open(path: Path, config: dict[str, Any] | None = None) -> _Content:
    """A weight file's content; raises `WeightsError` for what is none."""
    if path.suffix.lower() in PICKLE_SUFFIXES and _is_zip(path):
        archive = load_tensors(path)
        dtypes = Counter(
            str(tensor.dtype).removeprefix("torch.") for tensor in archive.values() if tensor.ndim
        )
        shapes = {name: tuple(tensor.shape) for name, tensor in archive.items()}
        return _Content(
            path, shapes, dict(dtypes), sum(t.numel() for t in archive.values()), {}, 0, config, archive
        )
    header = read_header(path)
    dtypes = Counter(_DTYPES.get(info.dtype, info.dtype) for info in header.tensors.values() if info.shape)
    shapes = {name: info.shape for name, info in header.tensors.items()}
    parameters = sum(_product(shape) for shape in shapes.values())
    return _Content(path, shapes, dict(dtypes), parameters, header.metadata, header.header_bytes, config)


def _is_zip(path: Path) -> bool:
    with open_regular(path, WeightsError) as file:
        return file.read(4) == b"PK\x03\x04"


def _product(shape: Shape) -> int:
    result = 1
    for extent in shape:
        result *= extent
    return result


def _inspect_folder(folder: Path) -> Inspection:
    weights, config_path = folder / PEFT_WEIGHTS, folder / PEFT_CONFIG
    if weights.is_file():
        try:
            config = json.loads(read_regular(config_path, WeightsError))
        except (OSError, WeightsError, ValueError, RecursionError) as error:
            return _no_adapter(
                folder,
                f"a PEFT folder whose {PEFT_CONFIG} cannot be read ({first_line(error)})",
                weights.stat().st_size,
            )
        if not isinstance(config, dict):
            return _no_adapter(
                folder, f"a PEFT folder whose {PEFT_CONFIG} is no JSON object", weights.stat().st_size
            )
        return _inspect_content(_open(weights, config), folder)
    if (folder / "model_index.json").is_file():
        return _no_adapter(
            folder,
            (
                f"a pipeline folder: {family_of_folder(folder) or 'a base of Stable Diffusion v1'}, not an "
                "adapter"
            ),
            0,
        )
    if config_path.is_file():
        return _no_adapter(folder, f"a PEFT folder without {PEFT_WEIGHTS}", 0)
    return _no_adapter(folder, f"a folder without {PEFT_WEIGHTS}", 0)


def _require_one_adapter(folder: Path) -> None:
    """Raise `WeightsError` for a folder that is neither a PEFT folder nor a pipeline but has adapters in it:
    which one is meant?
    """
    if any((folder / name).is_file() for name in (PEFT_WEIGHTS, PEFT_CONFIG, "model_index.json")):
        return
    files = sorted(folder.glob("*.safetensors"))
    found = files or [
        folder / part for part in ("unet", "text_encoder") if (folder / part / PEFT_WEIGHTS).is_file()
    ]
    if found:
        raise WeightsError(
            f"{folder}: is no adapter but holds some: inspect "
            f"{' or '.join(clean(str(item)) for item in found[:2])}"
        )


def _no_adapter(path: Path, what: str, num_bytes: int, content: _Content | None = None) -> Inspection:
    dtypes, metadata = (content.dtypes, content.metadata) if content else ({}, {})
    parameters = content.num_parameters if content else 0
    return Inspection(path, what, None, None, num_bytes, parameters, dtypes, (), (), (), metadata, {}, ())


def _inspect_content(content: _Content, path: Path) -> Inspection:
    num_bytes = content.path.stat().st_size
    found, leftover = file_modules(content.shapes)
    whole = {name: module for name, module in found.items() if module.kind}
    if not whole:
        return _no_adapter(path, _model(content.shapes, bool(found)), num_bytes, content)
    family = _family(content.shapes, whole)
    readings = (
        read_by_all(content.shapes, content.metadata, content.config)
        if family in (None, _FAMILY_BY_WIDTH[_SD1_WIDTH])
        else []
    )
    modules = _measure_all(whole, content)
    incomplete = [name for name, module in found.items() if not module.kind]
    readings = [
        replace(reading, notes=(*reading.notes, *_alpha_notes(reading, modules, content)))
        for reading in readings
    ]
    return Inspection(
        path=path,
        what=_description(whole, modules, family, content),
        layout=_layout(whole, content),
        family=family,
        num_bytes=num_bytes,
        num_parameters=content.num_parameters,
        dtypes=content.dtypes,
        modules=modules,
        readings=tuple(readings),
        leftover=(*leftover, *(name + ending for name in incomplete for ending in found[name].parts)),
        metadata=dict(content.metadata),
        hashes=check_hashes(content.path, content.data_start, content.metadata),
        remarks=(
            *_remarks(modules, incomplete, leftover),
            *configuration_notes(content.shapes, content.metadata, content.config),
            *_contradictions(content.metadata, modules, family),
        ),
    )


# -- what it is ----------------------------------------------------------------------------------------------


def _model(shapes: Mapping[str, Shape], has_parts: bool) -> str:
    """What a file without a whole adapter is."""
    if has_parts:
        return "an incomplete adapter: no module has both of its factors"
    if any(key.startswith("<") and key.endswith(">") for key in shapes):
        return "a textual inversion embedding, not an adapter"
    family = family_of_tensors(shapes)
    what = "a full checkpoint of Stable Diffusion v1" if family is None else family
    return what.removesuffix(", not a base").removesuffix(", not an adapter") + ", not an adapter"


def _family(shapes: Mapping[str, Shape], modules: Mapping[str, FileModule]) -> str | None:
    """The model an adapter fits: by the width of the text its cross-attention reads, else by names that only
    one family has.
    """
    widths: Counter[int] = Counter()
    for module in modules.values():
        if re.search(r"attn2[._](processor\.)?to_[kv]$", module.name) and (width := _inputs(module)):
            widths[width] += 1
    if re.search(r"^lora_te[23]_|^text_encoder_[23]\.", "\n".join(modules), re.MULTILINE):
        return "SDXL"
    if widths:
        width = widths.most_common(1)[0][0]
        return _FAMILY_BY_WIDTH.get(width, f"a model whose text has width {width}")
    kind = foreign_kind(shapes)
    if kind and kind.startswith("an adapter for "):
        return kind.removeprefix("an adapter for ")
    text = {
        _inputs(module)
        for module in modules.values()
        if re.search(r"_self_attn_q_proj$|\.self_attn\.q_proj$", module.name)
    }
    return next((_FAMILY_BY_WIDTH.get(width or 0) for width in text), None) if len(text) == 1 else None


def _inputs(module: FileModule) -> int | None:
    if module.factors:
        return _product(module.factors[0][1:])
    shape = module.parts.get(".hada_w1_b") or module.parts.get(".diff")
    return shape[1] if shape and len(shape) > 1 else None


def _description(
    found: Mapping[str, FileModule], modules: tuple[ModuleFacts, ...], family: str | None, content: _Content
) -> str:
    kinds = [kind for kind, _ in Counter(module.kind for module in modules).most_common()]
    if kinds[0] == "LoRA" and any(module.block == "convolution" for module in modules):
        kinds[0] = "LoCon (LoRA with convolutions)"
    if any(module.is_dora for module in modules):
        kinds[0] = f"DoRA ({kinds[0]} with magnitudes)"
    text = sum(_is_text(name) for name in found)
    parts = " + ".join(
        part for part, count in (("U-Net", len(found) - text), ("text encoder", text)) if count
    )
    if content.config is not None:
        parts = "one model" if all(module.path is None for module in modules) else parts
    fitting = all(
        module.path and found[module.name].fits(stable_diffusion_layers()[module.path], strict=False)
        for module in modules
    )
    unknown = (
        "Stable Diffusion v1 or v2, whose layers in it are alike"
        if fitting
        else "a model that the file does not show"
    )
    made_for = f"for {family or unknown}"
    return f"{' and '.join(kinds)} {made_for}: {parts}"


def _is_text(name: str) -> bool:
    return (
        name.startswith(("lora_te", "text_encoder", "text_model"))
        or ".text_model." in name
        or "self_attn" in name
    )


def _layout(modules: Mapping[str, FileModule], content: _Content) -> str:
    names: Counter[str] = Counter()
    for module in modules.values():
        spelled = (
            _SPELLINGS[module.spelling[0]]
            if module.spelling
            else "kohya"
            if module.name.startswith("lora_")
            else "LyCORIS"
        )
        if spelled == "PEFT" and module.name.startswith(("unet.", "text_encoder.")):
            spelled = "diffusers lora_A/B"
        elif spelled == "kohya" and "." in module.name:
            spelled = "kohya with dotted names"
        names[spelled] += 1
    layout = " + ".join(name for name, _ in names.most_common())
    return f"{layout} folder" if content.config is not None else layout


def _paths(modules: Mapping[str, FileModule]) -> dict[str, str]:
    """The layers of Stable Diffusion v1.5 that the modules are meant for, as far as any name tells."""
    layers = stable_diffusion_layers()
    flat = {re.sub(r"^unet_", "", path.replace(".", "_")): path for path in layers}
    paths = {}
    for name in modules:
        short = re.sub(
            r"^(lora_unet_|lora_te1?_|lycoris_|unet\.|base_model\.model\.|text_encoder\.)",
            "",
            name.replace(".processor.", "."),
        )
        key = short.replace(".", "_")
        for candidate in (key, f"{key}_0", f"text_encoder_{key}", f"text_encoder_text_model_{key}"):
            if candidate in flat:
                paths[name] = flat[candidate]
                break
    return paths


def _block(path: str | None, name: str) -> str:
    where = path or name
    if path is None and _is_text(name):
        return "text encoder"
    if where.startswith("text_encoder."):
        return "text encoder"
    for block, pattern in (
        ("attention", r"attn[12][._]"),
        ("feed-forward", r"[._]ff[._]net"),
        ("projection", r"proj_(in|out)$"),
        ("time embedding", r"time_emb|emb_layers|label_emb"),
        ("convolution", r"conv|in_layers|out_layers|skip_connection|samplers|_op$|input_blocks_0_0$"),
    ):
        if re.search(pattern, where):
            return block
    return "other"


# -- measuring -----------------------------------------------------------------------------------------------


def _measure_all(modules: Mapping[str, FileModule], content: _Content) -> tuple[ModuleFacts, ...]:
    """The figures of every module; the tensors of a few modules are in memory at a time."""
    paths = _paths(modules)
    facts = {
        name: ModuleFacts(
            name,
            paths.get(name),
            str(module.kind),
            _block(paths.get(name), name),
            rank=module.factors[0][0] if module.factors and module.factors[0] else None,
            is_dora=module.is_dora,
            fault="too large or too many for an adapter: not measured",
        )
        for name, module in modules.items()
    }
    small = [module for module in modules.values() if _num_numbers(module) <= _NUMBERS_AT_ONCE]
    for group in _groups(small[:_MAX_MODULES]):
        try:
            tensors = content.tensors([module.name + ending for module in group for ending in module.parts])
        except WeightsError as error:
            facts.update(
                {module.name: replace(facts[module.name], fault=first_line(error)) for module in group}
            )
            continue
        for module in group:
            own = {ending: tensors[module.name + ending] for ending in module.parts}
            facts[module.name] = _measure(replace(facts[module.name], fault=None), module, own, content)
    return tuple(facts.values())


def _num_numbers(module: FileModule) -> int:
    return sum(map(_product, module.parts.values()))


def _groups(modules: Iterable[FileModule]) -> Iterator[list[FileModule]]:
    """As many modules at a time as memory is meant for: each group costs one reading of the file's header."""
    group: list[FileModule] = []
    total = 0
    for module in modules:
        if group and total + _num_numbers(module) > _NUMBERS_AT_ONCE:
            yield group
            group, total = [], 0
        group.append(module)
        total += _num_numbers(module)
    if group:
        yield group


def _measure(
    facts: ModuleFacts, module: FileModule, tensors: Mapping[str, torch.Tensor], content: _Content
) -> ModuleFacts:
    bad = sum(map(count_not_finite, tensors.values()))
    facts = replace(facts, num_not_finite=bad)
    if any(tensor.is_complex() for tensor in tensors.values()):
        return replace(facts, fault="it holds complex numbers")
    if facts.kind != "LoRA":
        factors = [
            tensor
            for ending, tensor in tensors.items()
            if re.match(r"\.(hada_w|lokr_w|diff$|w_norm$|oft_|b[12]\.)", ending)
        ]
        return replace(
            facts, is_zero=any(not tensor.float().any() for tensor in factors) and not facts.is_dora
        )
    lora, fault = _as_lora(module, tensors, content)
    if lora is None:
        return replace(facts, fault=fault)
    facts = replace(facts, rank=lora.rank, alpha=lora.alpha, scale=lora.scale)
    return facts if bad else _with_norms(facts, lora)


def _as_lora(
    module: FileModule, tensors: Mapping[str, torch.Tensor], content: _Content
) -> tuple[LoraModule | None, str | None]:
    """The module with its alpha, from wherever the file states it; or why it is none."""
    named = {module.name + ending: tensor for ending, tensor in tensors.items()}
    parsed = parse_adapter(named, content.metadata, content.config)
    if parsed.modules:
        return next(iter(parsed.modules.values())), None
    # A name of another model: the same tensors under a name that is known give the same figures.
    stand_in = (
        "lora_unet_conv_in"
        if any(len(shape) == 4 for shape in module.factors or ())
        else "lora_unet_time_embedding_linear_1"
    )
    assert module.spelling is not None
    kohya = {module.spelling[0]: ".lora_down.weight", module.spelling[1]: ".lora_up.weight"}
    parsed = parse_adapter(
        {stand_in + kohya.get(ending, ending): tensor for ending, tensor in tensors.items()}, {}, None
    )
    lora = next(iter(parsed.modules.values()), None)
    return lora, None if lora else "its tensors make no LoRA: " + (
        parsed.faults[0].partition(": ")[2] if parsed.faults else "unknown shapes"
    )


def _with_norms(facts: ModuleFacts, lora: LoraModule) -> ModuleFacts:
    values = singular_values(lora)
    norm = float(values.square().sum().sqrt())
    elements = lora.up.shape[0] * lora.full_down()[0].numel()
    used = effective_rank(values)
    # A magnitude without a direction still scales the base's weights.
    is_zero = norm == 0 and not facts.is_dora
    return replace(
        facts,
        norm=norm,
        rms=norm / elements**0.5 if not facts.is_dora else None,
        rank_used=used,
        is_zero=is_zero,
    )


def _alpha_notes(reading: Reading, modules: tuple[ModuleFacts, ...], content: _Content) -> list[str]:
    """Where the strength differs: alpha in PEFT's configuration is for PEFT and diffusers alone."""
    stated = content.config is not None or "lora_adapter_metadata" in content.metadata
    has_alpha_tensors = any(key.endswith(".alpha") for key in content.shapes)
    if not reading.taken or not stated or has_alpha_tensors or reading.reader in ("PEFT", "diffusers"):
        return []
    scales = {module.scale for module in modules if module.scale is not None} - {1.0}
    return (
        [f"reads no alpha in the configuration, so its strength is 1 instead of {spread(scales)}"]
        if scales
        else []
    )


def _remarks(modules: tuple[ModuleFacts, ...], incomplete: list[str], leftover: tuple[str, ...]) -> list[str]:
    remarks = []
    if incomplete:
        remarks.append(f"{len(incomplete)} modules are incomplete, such as {clean(incomplete[0])}")
    if leftover:
        remarks.append(f"{len(leftover)} keys belong to no module, such as {clean(leftover[0])}")
    if faulty := [module for module in modules if module.fault]:
        remarks.append(
            f"{len(faulty)} modules could not be measured: {clean(faulty[0].name)}: "
            f"{clean(str(faulty[0].fault))}"
        )
    if any(module.kind == "LoRA" and module.alpha is None and not module.fault for module in modules):
        remarks.append(
            "modules without alpha: every program takes the strength 1, whatever it was trained with"
        )
    return remarks


def _contradictions(
    metadata: Mapping[str, str], modules: tuple[ModuleFacts, ...], family: str | None
) -> list[str]:
    """What the metadata say of the tensors that is not so."""
    remarks = []
    for key, field in (("ss_network_dim", "rank"), ("ss_network_alpha", "alpha")):
        found = sorted({value for module in modules if (value := getattr(module, field)) is not None})
        stated = _number(metadata.get(key, ""))
        if (
            found
            and stated is not None
            and not any(math.isclose(stated, value, rel_tol=1e-3) for value in found)
        ):
            remarks.append(f"its metadata say {field} {stated:g} ({key}), the tensors have {spread(found)}")
    version = {"SD1": "v1", "SD2": "v2", "SDXL": "SDXL"}.get(listed_version(metadata, "Forge"))
    if family and version and family in _FAMILY_BY_WIDTH.values() and not family.endswith(version):
        model = "SDXL" if version == "SDXL" else f"Stable Diffusion {version}"
        remarks.append(
            f"its metadata say that it is for {model}, its layers are those of {family}: programs list it "
            "under the wrong model"
        )
    return remarks


def _number(text: str) -> float | None:
    """A finite number in metadata, None for words such as "Dynamic"."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def clean(text: str, limit: int = 200) -> str:
    """A stranger's text for a terminal: no control characters, on one line, not endless."""
    shown = "".join(character if character.isprintable() else " " for character in text[: limit * 4])
    shown = " ".join(shown.split())
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def spread(values: Iterable[float]) -> str:
    """One number where all are equal, else least to most."""
    found = sorted(values)
    return f"{found[0]:g}" if found[0] == found[-1] else f"{found[0]:.3g} to {found[-1]:.3g}"
