"""What an adapter file is, and whether it would do anything: for files of anybody, from their headers and one
module at a time.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorascope.adapters.file_content import Content, open_content
from lorascope.adapters.file_modules import file_modules
from lorascope.adapters.hashes import check_hashes
from lorascope.adapters.measuring import measure_modules
from lorascope.adapters.peft_config import configuration_notes
from lorascope.adapters.readers import Reading, listed_version, read_by_all
from lorascope.adapters.recognition import (
    FAMILIES,
    NEAR_ZERO_RMS,
    STABLE_DIFFUSION_1,
    ModuleFacts,
    describe,
    describe_other,
    family_of_modules,
    layout_of,
)
from lorascope.adapters.schedule import read_schedule
from lorascope.base.family import family_of_folder
from lorascope.errors import AdapterError, WeightsError, first_line
from lorascope.store import PEFT_CONFIG, PEFT_WEIGHTS, access_errors, read_regular, require_regular


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
            what = "B" if all(module.kind == "LoRA" for module in self.modules) else "the update"
            return (
                f"{what} is zero in every module, as before the first training step: it was trained for no "
                "step"
            )
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
        return _inspect_folder(path) if path.is_dir() else _inspect_content(open_content(path), path)
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot be read ({error.strerror}): check the path and its permissions"
        ) from error
    except WeightsError as error:
        if isinstance(error.__cause__, OSError):
            raise
        what = str(error).removeprefix(f"{path}: ").removeprefix("is ")
        return _no_adapter(path, what, path.stat().st_size)


def _inspect_folder(folder: Path) -> Inspection:
    weights, config_path = folder / PEFT_WEIGHTS, folder / PEFT_CONFIG
    if weights.is_file():
        if not config_path.exists() and _is_full(content := open_content(weights)):
            found = _inspect_content(content, folder)
            note = "full differences in a folder, which lorascope alone reads: others take the kohya file"
            return replace(found, remarks=(note, *found.remarks))
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
        return _inspect_content(open_content(weights, config), folder)
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


def _is_full(content: Content) -> bool:
    """Whether a file holds full differences and nothing else."""
    kinds = {module.kind for module in file_modules(content.shapes)[0].values()}
    return bool(kinds) and kinds <= {"full difference", "norm difference"}


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


def _no_adapter(path: Path, what: str, num_bytes: int, content: Content | None = None) -> Inspection:
    dtypes, metadata = (content.dtypes, content.metadata) if content else ({}, {})
    parameters = content.num_parameters if content else 0
    return Inspection(path, what, None, None, num_bytes, parameters, dtypes, (), (), (), metadata, {}, ())


def _inspect_content(content: Content, path: Path) -> Inspection:
    num_bytes = content.path.stat().st_size
    found, leftover = file_modules(content.shapes)
    whole = {name: module for name, module in found.items() if module.kind}
    if not whole:
        return _no_adapter(path, describe_other(content.shapes, bool(found)), num_bytes, content)
    family = family_of_modules(content.shapes, whole)
    readings = (
        read_by_all(content.shapes, content.metadata, content.config)
        if family in (None, STABLE_DIFFUSION_1)
        else []
    )
    modules, is_folder = measure_modules(whole, content), content.config is not None
    incomplete = [name for name, module in found.items() if not module.kind]
    readings = [
        replace(reading, notes=(*reading.notes, *_alpha_notes(reading, modules, content)))
        for reading in readings
    ]
    return Inspection(
        path=path,
        what=describe(whole, modules, family, is_folder),
        layout=layout_of(whole, is_folder),
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
            *_schedule_notes(content.metadata),
            *_contradictions(content.metadata, modules, family),
        ),
    )


def _schedule_notes(metadata: Mapping[str, str]) -> list[str]:
    """What T-LoRA's schedule in a file's header says, or is wrong with it."""
    try:
        schedule = read_schedule(metadata)
    except AdapterError as error:
        return [str(error)]
    if schedule is None:
        return []
    return [
        f"T-LoRA: of {schedule.rank} components {schedule.min_rank} act at the last timestep and all at the "
        "first; lorascope goes by that, other programs use all of them throughout"
    ]


def _alpha_notes(reading: Reading, modules: tuple[ModuleFacts, ...], content: Content) -> list[str]:
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
    # those without a rank have no alpha to lack
    if any(module.rank is not None and module.alpha is None and not module.fault for module in modules):
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
    if family and version and family in FAMILIES and not family.endswith(version):
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
