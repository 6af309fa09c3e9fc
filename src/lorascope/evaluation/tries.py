"""Prompts of one's own, tried on a finished training: what can be asked for, where it lies, `try.json`."""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from lorascope.data.captions import has_words, problem_of
from lorascope.errors import ConfigError, StorageError
from lorascope.evaluation.scores import BASE
from lorascope.evaluation.sweep_rows import Epoch
from lorascope.run_folder import RunDir
from lorascope.sections import SampleSection
from lorascope.shapes import Number, Shape
from lorascope.store import digest_json, read_table, storage_errors, write_json

MAX_STRENGTH = 2.0
_FORMAT = 1
_DIGITS = 16
_SHOWN_LETTERS = 80
_TRY: Shape = {
    "format": int,
    "prompt": str,
    "seed": int,
    "steps": int,
    "guidance": Number,
    "made": str,
    "pictures": [{"arm": str, "epoch": str, "strength": Number, "picture": str}],
}


@dataclass(frozen=True)
class Drawn:
    """One picture of a try: of an arm's adapter of one epoch at one strength, or of the base at 0.

    `picture` is its file's name.
    """

    arm: str
    epoch: Epoch
    strength: float
    picture: str

    @property
    def name(self) -> str:
        """What drew it, in words."""
        if self.arm == BASE:
            return BASE
        return f"{self.arm} at {self.strength:g}" + ("" if self.epoch == "last" else ", best epoch")


@dataclass(frozen=True)
class Try:
    """A prompt of one's own with its pictures, the base's first, all from one initial noise. `folder` is the
    folder's name in `tries/`, `made` a time as ISO 8601 has it.
    """

    folder: str
    prompt: str
    seed: int
    steps: int
    guidance: float
    made: str
    pictures: tuple[Drawn, ...]


def plan_pictures(arms: Sequence[str], epoch: Epoch, strengths: Iterable[float]) -> list[Drawn]:
    """The base, and every arm at every strength.

    Raises `ConfigError` for a strength out of range.
    """
    chosen = list(dict.fromkeys(strengths))
    for strength in chosen:
        if not 0 <= strength <= MAX_STRENGTH:
            raise ConfigError(
                f"--strength {strength:g}: must be from 0 (the base alone) to {MAX_STRENGTH:g}; 1 is the "
                "adapter as it was trained"
            )
    base = Drawn(BASE, "last", 0.0, f"{BASE}.png")
    names = [(arm, epoch, strength) for arm in dict.fromkeys(arms) for strength in chosen]
    return [base, *(Drawn(*name, f"{name[0]}-{name[1]}-s{name[2]:g}.png") for name in names)]


def checked_prompt(text: str) -> str:
    """A prompt as it is drawn; raise `ConfigError` where it holds no words, or what does not reach the
    model.
    """
    text = unicodedata.normalize("NFC", text).strip()
    short = repr(text[:_SHOWN_LETTERS])
    if problem := problem_of(text):
        raise ConfigError(f"--prompt {short} {problem}")
    if not has_words(text):
        raise ConfigError(f"--prompt {short}: holds no words: say what is to be drawn")
    return text


def checked_settings(section: SampleSection, steps: int | None, guidance: float | None) -> SampleSection:
    """A study's way to draw with other steps or guidance; raise `ConfigError` where one is out of range."""
    if steps is not None and not 1 <= steps <= 1000:
        raise ConfigError(f"--steps {steps}: must be from 1 to 1000, such as 30")
    if guidance is not None and not 0 <= guidance <= 100:
        raise ConfigError(f"--guidance {guidance:g}: must be from 0 to 100; 1 leaves guidance off")
    changes = {"steps": steps, "guidance": guidance}
    return section.model_copy(update={key: value for key, value in changes.items() if value is not None})


def folder_of(run: RunDir, prompt: str, seed: int, section: SampleSection) -> Path:
    """Where the pictures of a prompt lie: those drawn later from the same noise and settings join them."""
    settings = [section.steps, section.guidance, section.scheduler, section.prompt_prefix or ""]
    return run.tries_dir / digest_json([prompt, seed, settings])[:_DIGITS]


def note_try(folder: Path, new: Try) -> Try:
    """Write `try.json` for pictures that were drawn, beside those that it lists already."""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / ".lock")
    with lock:
        known = _read(folder).pictures if (folder / "try.json").exists() else ()
        pictures = tuple(dict.fromkeys((*known, *new.pictures)))
        facts = {
            "format": _FORMAT,
            "prompt": new.prompt,
            "seed": new.seed,
            "steps": new.steps,
            "guidance": new.guidance,
            "made": new.made,
            "pictures": [asdict(drawn) for drawn in pictures],
        }
        write_json(folder / "try.json", facts)
        return _read(folder)


def read_tries(run: RunDir) -> tuple[list[Try], list[str]]:
    """The tries of a run, newest first, and what is wrong with those that cannot be read."""
    found, faults = [], []
    for path in run.tries_dir.glob("*/try.json"):
        try:
            found.append(_read(path.parent))
        except StorageError as error:
            faults.append(str(error))
    return sorted(found, key=lambda item: (item.made, item.folder), reverse=True), sorted(faults)


def _read(folder: Path) -> Try:
    path = folder / "try.json"
    facts: dict[str, Any] = read_table(path, _TRY)
    if facts["format"] > _FORMAT:
        raise StorageError(f"{path}: written by a later version: delete its folder and draw again")
    keys = ("prompt", "seed", "steps", "guidance", "made")
    pictures = tuple(
        Drawn(**{key: row[key] for key in ("arm", "epoch", "strength", "picture")})
        for row in facts["pictures"]
        if "/" not in row["picture"] and "\\" not in row["picture"]
    )
    return Try(folder.name, **{key: facts[key] for key in keys}, pictures=pictures)
