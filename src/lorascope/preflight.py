"""Whether a study would run on this machine, by doing a little of all of it: a few pictures are encoded, one
step is trained, a picture is drawn and scored.

The stages are those of `Study`, in a run folder of their own that is removed; the study's own is not touched.
"""

import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorascope.arms import Arm, ArmGrid
from lorascope.base.loading import Base
from lorascope.console import duration, size
from lorascope.data.captions import check_additions
from lorascope.data.encoding import Encoded
from lorascope.errors import LorascopeError, RunError, StorageError, first_line
from lorascope.evaluation.features import load_style_encoder
from lorascope.evaluation.prompts import Prompt, check_prefix, load_prompts
from lorascope.evaluation.scores import read_scores
from lorascope.inputs import require_apart
from lorascope.machine.memory import free_bytes, is_out_of_memory, peak_memory, reset_peak_memory
from lorascope.run_folder import RunDir
from lorascope.schema import StudyConfig
from lorascope.store import access_errors
from lorascope.study import Study
from lorascope.training.packing import way_of
from lorascope.training.passes import count_models, pass_memory, plan_passes
from lorascope.training.trackers import require_trackers

_NUM_HELDOUT = 4
_NUM_STEPS = 2  # of drawing


@dataclass(frozen=True)
class Check:
    """One thing that was tried. `error` is the line with the remedy where it failed, else empty.

    `memory_bytes` is the peak of the device, or of this process on a CPU, while it was tried.
    """

    name: str
    words: str
    found: str
    seconds: float
    memory_bytes: int
    error: str

    @property
    def is_ok(self) -> bool:
        """Whether it went well."""
        return not self.error

    def as_line(self) -> str:
        """The check for people."""
        told = "ok    " if self.is_ok else "FAILED"
        found = f": {self.found}" if self.found else ""
        return f"{told}  {self.words}{found}  ({duration(self.seconds)}, {size(self.memory_bytes)})"

    def to_json(self) -> dict[str, Any]:
        """The check for programs."""
        facts = asdict(self)
        return {"check": facts.pop("name"), "ok": self.is_ok, **facts}


WORDS = {
    "base": "the base loads, and its precision is chosen",
    "inputs": "prompts, scorer and layers can be used",
    "data": "the pictures can be used",
    "encode": "a few of them are encoded",
    "train": "a step is trained",
    "sample": "a picture is drawn",
    "score": "it is scored",
}


class Preflight:
    """The checks of one study, in the order in which it would meet them."""

    def __init__(self, config: StudyConfig, folder: Path, cache_dir: Path | None = None) -> None:
        """`folder` is an empty one, for what the checks write; `cache_dir` is as of `Study`."""
        self.config, self.cache_dir = config, cache_dir
        self.study = _Rehearsal(shortened(config, config.expand_arms()), folder, cache_dir)
        self.checks: list[Check] = []
        self.failure: LorascopeError | None = None

    def run(self) -> Iterator[Check]:
        """Try one thing after the other, up to the first that fails, whose error is then `failure`."""
        tries: dict[str, Callable[[], str]] = {
            "base": self._load_base,
            "inputs": self._check_inputs,
            "data": self._prepare_data,
            "encode": self._encode,
            "train": self._train,
            "sample": self._sample,
            "score": self._score,
        }
        for name, attempt in tries.items():
            check = self._try(name, attempt)
            self.checks.append(check)
            yield check
            if not check.is_ok:
                return

    def _try(self, name: str, attempt: Callable[[], str]) -> Check:
        found, error = "", ""
        reset_peak_memory(self.study.device)
        started = time.perf_counter()
        try:
            found = attempt()
        except Exception as caught:
            self.failure = _as_user_error(name, caught)
            if self.failure is None:
                raise
            error = str(self.failure)
        seconds, memory = time.perf_counter() - started, peak_memory(self.study.device)[0]
        return Check(name, WORDS[name], found, round(seconds, 3), memory, error)

    def to_json(self) -> dict[str, Any]:
        """What came out, for programs; `digest` is that of the configuration that was tried."""
        return {
            "study": self.config.name,
            "ok": self.failure is None and len(self.checks) == len(WORDS),
            "digest": self.config.digest(),
            "device": str(self.study.device),
            "arms": [arm.name for arm in self.study.config.expand_arms()],
            "seconds": round(sum(check.seconds for check in self.checks), 3),
            "peak_memory_bytes": max((check.memory_bytes for check in self.checks), default=0),
            "free_memory_bytes": free_bytes(self.study.device),
            "error": str(self.failure or ""),
        }

    # -- what is tried ---------------------------------------------------------------------------------------

    def _load_base(self) -> str:
        base = self.study.base
        count = sum(parameter.numel() for parameter in base.unet.parameters())
        return f"U-Net of {count / 1e6:.1f} M parameters in {self.study.tuning.precision} on {base.device}"

    def _check_inputs(self) -> str:
        config, section = self.config, self.config.sample
        require_trackers(config.trackers)
        check_additions(config.data)
        check_prefix(section.prompt_prefix or "", load_prompts(section.prompts, section.num_prompts))
        self.study.check_inputs()
        return f"{len(self.study.targets)} layers are adapted"

    def _prepare_data(self) -> str:
        """All pictures are looked at, as the study itself would; those that were before are not again."""
        summary = self.study.prepare_data().summary
        refused = len(summary["refused"])
        return f"{summary['num_rows']:,} looked at" + (f", {refused:,} refused" if refused else "")

    def _encode(self) -> str:
        train, heldout = self.study.encode()
        return f"{len(train)} to train on, {len(heldout)} held out"

    def _train(self) -> str:
        arms = largest_passes(self.config, self.study.base)
        self.study.config = shortened(self.config, arms)
        self.study.train()
        failed = {arm: reason for arm in arms if (reason := self.study.run_dir.failure(arm.name))}
        if failed:
            arm, reason = next(iter(failed.items()))
            raise RunError(
                f"{arm.name}: {reason}, at its lr of {arm.lr:g}: lower arms.lr of this arm, or set "
                "train.precision = 'fp32'"
            )
        return f"of {', '.join(arm.name for arm in arms)}"

    def _sample(self) -> str:
        self.study.sample()
        return f"with {self.study.trained_arms()[0].name}, and one with the base alone"

    def _score(self) -> str:
        self.study.score()
        scores = {
            row.arm: row.clip_score for row in read_scores(self.study.run_dir).rows if row.kind == "arm"
        }
        if (style := load_style_encoder(self.config.score, self.study.device)) is not None:
            style.encode_hidden([self.study.dataset.load_pixels(self.study.dataset.heldout[0])])
        return f"by {self.config.score.model}, {scores[self.study.trained_arms()[0].name]:.1f} points"


class _Rehearsal(Study):
    """A study cut down to a few pictures, a prompt and an arm to draw with."""

    @functools.cached_property
    def prompts(self) -> list[Prompt]:  # "inputs" has looked at all of them
        return super().prompts[:1]

    @functools.cached_property
    def encoded(self) -> tuple[Encoded, Encoded]:
        train, heldout = super().encoded
        return replace(train, repeats=(1,) * len(train)), heldout

    def trained_arms(self) -> list[Arm]:
        return [max(super().trained_arms(), key=lambda arm: arm.rank)]


@contextmanager
def preflight(config: StudyConfig, cache_dir: Path | None = None) -> Iterator[Preflight]:
    """The checks of a study, to be `run`. What they write lies beside the run folders, and is removed.

    Raises `ConfigError` where the study's run folder would lie in what it reads, and `StorageError` where
    nothing can be written there.
    """
    require_apart(RunDir(Path("runs") / config.name), config)
    runs = Path("runs")
    with (
        access_errors(StorageError),
        tempfile.TemporaryDirectory(prefix=".preflight-", dir=runs if runs.is_dir() else Path()) as folder,
    ):
        checks = Preflight(config, Path(folder), cache_dir)
        with checks.study.working("lorascope preflight"):
            yield checks


def shortened(config: StudyConfig, arms: tuple[Arm, ...]) -> StudyConfig:
    """The study with these arms alone, all at once, and as little of all else as makes one step: at its full
    learning rate, for what is too high shows at once.
    """
    at_once = max(arm.batch_size for arm in arms) * config.train.accumulation_steps
    few = min(at_once, config.data.num_train or at_once)
    heldout = min(_NUM_HELDOUT, config.data.num_heldout or _NUM_HELDOUT)
    previews = {"preview_every_epochs": 1, "num_previews": 1} if config.sample.preview_every_epochs else {}
    changes: dict[str, dict[str, Any]] = {
        "data": {"num_train": few, "num_heldout": heldout, "repeats": 1},
        "train": {
            "epochs": 1,
            "warmup_steps": 0,
            "schedule": "constant",
            "num_probe": 1,
            "max_stacked_arms": len(arms),
        },
        "sample": {"num_prompts": 1, "steps": _NUM_STEPS, "seeds": config.sample.seeds[:1], **previews},
        "score": {"resamples": 100},
        "diagnose": {"enabled": False},
    }
    tables = {key: getattr(config, key).model_copy(update=values) for key, values in changes.items()}
    grids = tuple(_grid_of(arm) for arm in arms)
    # The arms stand side by side as they are, so that there is one pass for each way to compute them.
    return config.model_copy(update={**tables, "arms": grids, "workers": 1, "trackers": ()})


def _grid_of(arm: Arm) -> ArmGrid:
    """The table of one arm, of one epoch, with its learning rate as it came out."""
    values = {**arm.model_dump(exclude={"match_gain", "epochs"}), "epochs": 1}
    if arm.kind == "full":
        for key in ("rank", "alpha", "scaling"):
            del values[key]
    elif arm.scaling == "rslora":
        values["alpha"] = arm.alpha / arm.rank**0.5
    return ArmGrid.model_validate(values)


def largest_passes(config: StudyConfig, base: Base) -> tuple[Arm, ...]:
    """The arms of the planned pass that takes the most memory, of each way to compute a step."""
    counts, free = count_models(config), free_bytes(base.device)
    num_train = config.data.num_train
    entries = num_train * config.data.repeats if num_train else None
    plan = plan_passes(config, base.device, counts, entries, base.components)
    largest: dict[tuple[str, bool, bool], tuple[int, tuple[Arm, ...]]] = {}
    for group in plan.groups:
        estimate, _ = pass_memory(
            config, base.device, counts, group.arms, plan.num_workers, free, base.components
        )
        way = way_of(group.arms[0])
        if way not in largest or largest[way][0] < estimate.training_bytes:
            largest[way] = estimate.training_bytes, group.arms
    return tuple(arm for _, arms in largest.values() for arm in arms)


def _as_user_error(name: str, error: Exception) -> LorascopeError | None:
    """What a user can do something about; None for a fault of ours."""
    if isinstance(error, LorascopeError):
        return error
    if is_out_of_memory(error):
        return RunError(
            f"{WORDS[name]}: not enough memory ({first_line(error)}): close other programs, or lower "
            "data.resolution_px or train.batch_size"
        )
    return None
