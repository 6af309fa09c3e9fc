"""Faults planted into the file of a trained arm, and which check sees them.

Three checks stand before an arm's pictures: the digests that training wrote, reading the file for the arm it
belongs to, and the comparison of merged with unmerged pictures. A fault that came after training is seen by
the digests; so that it gets through to the other checks they are renewed. What is merged is then the faulty
file, beside the adapter as it was trained: as where the merge itself goes wrong, or a file on its way out.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lorascope.adapters.bank import AdapterBank
from lorascope.adapters.files import load_adapter, save_adapter
from lorascope.base.weights import load_tensors, read_header, save_tensors
from lorascope.diagnosis.causes import decide
from lorascope.diagnosis.signals import ArmSignals, file_signals
from lorascope.diagnosis.thresholds import Thresholds
from lorascope.diagnosis.words import Cause
from lorascope.errors import LorascopeError
from lorascope.evaluation.merging import compare_merged
from lorascope.evaluation.sampling import latent_shape_of, plan_jobs
from lorascope.machine.arithmetic import full_fp32
from lorascope.run_folder import RunDir
from lorascope.store import PEFT_WEIGHTS, read_json, write_json
from lorascope.study import Study

FileFault = Literal["doubled-alpha", "other-arm", "nan-layer", "zeroed-half", "unmatched-half"]
FILE_FAULTS: tuple[FileFault, ...] = get_args(FileFault)
_PICTURES = ("sweep", "images", "previews", "figures", "checkpoints", ".lock")


@dataclass(frozen=True)
class FileFinding:
    """What each check says of a file fault: a line where it sees it, None where it does not.

    `merge` is an entry of `merge_check.json`, None where the file could not be merged; `merge_line` then says
    why.
    """

    fault: FileFault
    seed: int
    digest_line: str | None
    reading_line: str | None
    merge: Mapping[str, Any] | None
    merge_line: str | None

    def found(self, signals: ArmSignals, thresholds: Thresholds) -> Cause | Literal["refused"]:
        """What the arm is said to be, with its own signals but for the merge; `refused` without pictures."""
        if self.merge is None:
            return "refused"
        fields: dict[str, Any] = file_signals(self.merge)
        return decide(replace(signals, **fields), thresholds).cause


def copy_without_pictures(run: RunDir, folder: Path) -> RunDir:
    """A copy of a finished run as it was after training."""
    shutil.rmtree(folder, ignore_errors=True)
    copy = RunDir(Path(shutil.copytree(run.path, folder, ignore=shutil.ignore_patterns(*_PICTURES))))
    for path in (copy.merge_check_json, copy.sweep_parquet, copy.diagnosis_json, copy.scores_parquet):
        path.unlink(missing_ok=True)
    manifest = copy.manifest()
    kept = {name: stage for name, stage in manifest["stages"].items() if name in ("data", "encode", "train")}
    write_json(copy.manifest_json, {**manifest, "stages": kept})
    return copy


def plant(fault: FileFault, run: RunDir, arm: str, donor: str) -> None:
    """Plant a fault into the file of an arm; `donor` is another arm of its rank and alpha.

    The digests in `training.json` stay: `renew_digests` lets the fault through.
    """
    folder = run.adapters_dir / arm
    match fault:
        case "doubled-alpha":
            save_adapter(load_adapter(folder).at_strength(2.0), folder, "peft", "fp32")
        case "other-arm":
            shutil.copyfile(run.adapters_dir / donor / PEFT_WEIGHTS, folder / PEFT_WEIGHTS)
        case "nan-layer":
            _fill(folder, lambda names: names[:1], math.nan)
        case "zeroed-half":
            _fill(folder, lambda names: names[: len(names) // 2], 0.0)
        case "unmatched-half":
            _rename_half(folder)


def _fill(folder: Path, choose: Callable[[list[str]], list[str]], value: float) -> None:
    """Fill the up matrices that are chosen by name with a value."""
    weights = folder / PEFT_WEIGHTS
    metadata, tensors = read_header(weights).metadata, _copied(weights)
    for name in choose(_ups(tensors)):
        tensors[name].fill_(value)
    save_tensors(weights, tensors, metadata)


def _rename_half(folder: Path) -> None:
    """Give half of the modules names of layers that the base does not have."""
    weights = folder / PEFT_WEIGHTS
    metadata, tensors = read_header(weights).metadata, _copied(weights)
    ups = _ups(tensors)
    moved = tuple(name.removesuffix("lora_B.weight") for name in ups[: len(ups) // 2])
    renamed = {
        name.replace(".attentions.", ".attentions.9") if name.startswith(moved) else name: tensor
        for name, tensor in tensors.items()
    }
    save_tensors(weights, renamed, metadata)


def _copied(weights: Path) -> dict[str, torch.Tensor]:
    """The tensors in memory of their own: they may be mapped from the file that is written."""
    return {name: tensor.clone() for name, tensor in load_tensors(weights).items()}


def _ups(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    return sorted(name for name in tensors if name.endswith("lora_B.weight"))


def renew_digests(run: RunDir, arm: str) -> None:
    """Let `training.json` say that the arm's files are as training wrote them."""
    path = run.adapters_dir / arm / "training.json"
    write_json(path, {**read_json(path), "digests": run.adapter_digests(arm)})


def check_file_fault(study: Study, fault: FileFault, arm: str, donor: str, folder: Path) -> FileFinding:
    """Plant a fault in a copy of the study's run, at `folder`, and see which check finds it.

    The study's training is finished; its own run folder is left alone.
    """
    copy = copy_without_pictures(study.run_dir, folder)
    plant(fault, copy, arm, donor)
    digest_line = _line(lambda: copy.require_unchanged(arm))
    renew_digests(copy, arm)
    base = study.base.in_fp32()
    [chosen] = [item for item in study.config.expand_arms() if item.name == arm]
    bank = AdapterBank(base.components, study.targets, [chosen])
    faulty = copy.adapters_dir / arm
    reading_line = _line(lambda: bank.load(0, load_adapter(faulty)))
    bank.load(0, load_adapter(study.run_dir.adapters_dir / arm))
    merge, merge_line = None, None
    try:
        with full_fp32():
            job = plan_jobs(study.prompts, study.config.sample.seeds)[0]
            shape = latent_shape_of(base, study.config.data.resolution_px)
            [merge] = compare_merged(base, bank, {arm: faulty}, job, shape, study.config.sample).values()
    except LorascopeError as error:
        merge_line = str(error)
    return FileFinding(fault, chosen.seed, digest_line, reading_line, merge, merge_line)


def _line(check: Callable[[], object]) -> str | None:
    try:
        check()
    except LorascopeError as error:
        return str(error)
    return None


def write_findings(path: Path, findings: list[FileFinding]) -> None:
    """Write findings as JSON."""
    write_json(path, [asdict(finding) for finding in findings])


def read_findings(path: Path) -> list[FileFinding]:
    """Read what `write_findings` wrote."""
    return [FileFinding(**values) for values in json.loads(path.read_text(encoding="utf-8"))]
