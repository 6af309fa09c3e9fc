"""What a finished run comes to: the verdict with its pictures, why, and which files can be made of an arm."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lorascope.diagnosis.next_study import propose_after
from lorascope.errors import ConfigError, LorascopeError, shown
from lorascope.report.evidence import Facts, answer_of
from lorascope.report.page import verdict_content, why_content
from lorascope.run_folder import RunDir
from lorascope.store import PEFT_WEIGHTS, export_name
from lorascope.web.adapter_files import plain_stem
from lorascope.web.workspace import Workspace

Format = Literal["kohya", "diffusers", "peft", "merged-ldm", "merged-diffusers"]
Checkpoint = Literal["last", "best"]
FORMAT_WORDS: dict[Format, str] = {
    "kohya": "For WebUI, Forge and ComfyUI",
    "diffusers": "For diffusers",
    "peft": "For PEFT: a folder, as a ZIP file",
    "merged-ldm": "Merged into the base: one checkpoint file",
    "merged-diffusers": "Merged into the base: a diffusers folder, as a ZIP file",
}
MERGED = ("merged-ldm", "merged-diffusers")


@dataclass(frozen=True)
class ArmFiles:
    """A finished arm that files can be made of."""

    name: str
    role: str
    has_best: bool
    is_scheduled: bool  # T-LoRA, which most formats cannot hold


@dataclass(frozen=True)
class Result:
    """What a run comes to. `verdict` and `why` are as the report's page has them; `next_toml` is the study
    that `lorascope next` proposes, or empty with the reason in `next_reason`; `missing` says what has not
    run.
    """

    study: str
    verdict: dict[str, Any]
    why: dict[str, Any]
    arms: tuple[ArmFiles, ...]
    failed: dict[str, str]
    keep: str | None
    epoch: Checkpoint
    strength: float
    tag: str
    next_toml: str
    next_reason: str
    missing: str


@dataclass(frozen=True)
class Export:
    """A file that is to be made of an arm."""

    arm: str
    layout: Format
    checkpoint: Checkpoint
    strength: float
    is_baked: bool
    as_lora: bool

    @classmethod
    def of(
        cls,
        result: Result,
        arm: str,
        layout: str,
        checkpoint: str,
        strength: float,
        bake: bool,
        as_lora: bool,
    ) -> "Export":
        """An export as a form asks for it; raise `ConfigError` for what is not offered."""
        names = [found.name for found in result.arms]
        if arm not in names:
            raise ConfigError(
                f"arm {shown(arm)}: is no finished arm of this run: choose one of {', '.join(names)}"
            )
        for value, kind, what in ((layout, Format, "format"), (checkpoint, Checkpoint, "epoch")):
            if value not in get_args(kind):
                raise ConfigError(f"{what} {shown(value)}: choose one of {', '.join(get_args(kind))}")
        # What is merged has no strength that could be turned later.
        return cls(arm, layout, checkpoint, strength, bake or layout in MERGED, as_lora)  # type: ignore[arg-type]

    def out(self, workspace: Workspace, run: str, study: str) -> Path:
        """Where the file goes; its name says what is in it."""
        marks = "-best" if self.checkpoint == "best" else ""
        if self.is_baked and self.strength != 1:
            marks += f"-strength-{self.strength:g}"
        if self.as_lora:
            marks += "-as-lora"
        return (
            workspace.files_dir
            / run
            / export_name(f"{plain_stem(f'{study}-{self.arm}')}{marks}", self.layout)
        )

    def arguments(self, workspace: Workspace, run: str, out: Path) -> list[str]:
        """The command that makes the file."""
        arguments = ["export", f"runs/{run}", f"--arm={self.arm}", f"--format={self.layout}"]
        if self.checkpoint == "best":
            arguments.append("--checkpoint=best")
        if self.is_baked and self.strength != 1:
            arguments.append(f"--strength={self.strength:g}")
        if self.as_lora:
            arguments.append("--as-lora")
        return [*arguments, f"--out={workspace.shown_path(out)}", "--force"]


def read_result(folder: Path) -> Result:
    """What a run comes to; raises `StorageError` where no arm has finished or a file is damaged."""
    run = RunDir(folder)
    facts = Facts(run)
    answer = answer_of(facts)
    text, reason = _next_study(facts)
    return Result(
        study=facts.config.name,
        verdict=verdict_content(facts, answer),
        why=why_content(facts),
        arms=tuple(
            ArmFiles(
                arm,
                facts.role(arm),
                any((run.adapters_dir / arm / "best" / part / PEFT_WEIGHTS).is_file() for part in _PARTS),
                facts.settings[arm].kind == "tlora",
            )
            for arm in facts.arms
        ),
        failed=facts.failed,
        keep=answer.keep,
        epoch="best" if answer.epoch == "best" else "last",
        strength=1.0 if answer.strength is None else answer.strength,
        tag=answer.tag or "",
        next_toml=text,
        next_reason=reason,
        missing=_missing(facts),
    )


_PARTS = ("", "unet", "text_encoder")


def _missing(facts: Facts) -> str:
    """What a result rests on and has not run, as a sentence; empty where nothing is missing."""
    if facts.verdict is None:
        return "The pictures are not scored yet, so nothing is compared."
    if facts.diagnosis is None:
        return "The run is not diagnosed yet, so there is no cause, no strength to use and no next study."
    return ""


def _next_study(facts: Facts) -> tuple[str, str]:
    """What `lorascope next` prints, or why it cannot."""
    if facts.diagnosis is None:
        return "", "A next study is proposed once the run is diagnosed."
    try:
        return propose_after(facts.config, facts.diagnosis).toml, ""
    except LorascopeError as error:
        return "", str(error)
