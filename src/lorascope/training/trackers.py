"""Curves and pictures of a study in TensorBoard, Weights & Biases, MLflow or Trackio, through Accelerate's
trackers.

Each arm is a run of its own, so that the curves of the arms lie over each other. None of the packages is
needed, and a tracker that fails while the study runs is left out from there on: tracking never ends a
training.
"""

import contextvars
import importlib.util
import json
import logging
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from lorascope.errors import ConfigError, first_line
from lorascope.store import read_json, write_json

log = logging.getLogger("lorascope")

_REMEDIES = {
    "tensorboard": "check that the run folder can be written",
    "wandb": "log in with `wandb login`, or set WANDB_MODE=offline",
    "mlflow": "check MLFLOW_TRACKING_URI, or unset it to write into the run folder",
    "trackio": "check TRACKIO_SPACE_ID and TRACKIO_SERVER_URL, or unset them to write to this machine",
}


def require_trackers(names: Sequence[str]) -> None:
    """Raise `ConfigError`, naming what to install, if the package of a tracker is missing; imports none of
    them.
    """
    for name in names:
        missing = [package for package in ("accelerate", name) if importlib.util.find_spec(package) is None]
        if missing:
            extra = "trackers" if name == "tensorboard" else name
            raise ConfigError(
                f'trackers = ["{name}"]: needs {" and ".join(missing)}, not installed: pip install '
                f"'lorascope[{extra}]', or leave it out"
            )


def open_trackers(
    names: Sequence[str], run_dir: Path, study: str, arms: Sequence[str], config: Mapping[str, Any]
) -> "Trackers":
    """Start a run of each tracker for each arm, or go on with those that `run_dir` was tracked in before.

    `names` are those of the key `trackers`; without any, nothing is imported or written. `config` is the
    study's configuration, as nested tables. What ties a run folder to its runs stands in `trackers.json`
    there. Steps logged again after a resume have the values they had: TensorBoard, MLflow and Trackio keep
    both, Weights & Biases the first.

    TensorBoard writes to `run_dir/tensorboard`; Weights & Biases to a project called `study`, in one group a
    run folder; MLflow to an experiment `study` at MLFLOW_TRACKING_URI, or a database in `run_dir/mlflow`
    where that is unset; Trackio to a project `study` on this machine, or where its variables say. Raises
    `ConfigError` if a package is missing or a tracker cannot start.
    """
    require_trackers(names)
    opened = Trackers()
    if not names:
        return opened
    from accelerate import PartialState

    PartialState()  # Accelerate's log lines raise without it
    path = run_dir / "trackers.json"
    known = read_json(path) if path.exists() else {"id": secrets.token_hex(4), "mlflow": {}}
    write_json(path, known)
    for name in names:
        try:
            for arm in arms:
                run = _start(name, run_dir, study, arm, _flat(config), known)
                opened.runs.setdefault(name, {})[arm] = run
                write_json(path, known)
        except Exception as error:  # the packages raise anything here
            opened.close()
            raise ConfigError(
                f'trackers = ["{name}"]: cannot start ({type(error).__name__}: {first_line(error)}): '
                f"{_REMEDIES[name]}, or leave it out"
            ) from error
    return opened


class Trackers:
    """The running trackers: {tracker: {arm: run}}. A context manager that closes them."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, _Run]] = {}

    def log(self, arm: str, step: int, values: Mapping[str, float]) -> None:
        """Send figures of an arm after `step` optimizer updates."""
        self._each(arm, lambda run: run.log(dict(values), step))

    def log_image(self, arm: str, step: int, caption: str, pixels: np.ndarray) -> None:
        """Send a picture, uint8 [H, W, 3], that an arm drew for `caption` after `step` updates."""
        self._each(arm, lambda run: run.log_image(caption, pixels, step))

    def close(self) -> None:
        """End all runs, sending what is left; they can be gone on with later."""
        for name, runs in self.runs.items():
            for run in runs.values():
                self._try(name, run.finish)
        self.runs.clear()

    def _each(self, arm: str, action: "Callable[[_Run], None]") -> None:
        for name, runs in list(self.runs.items()):
            if arm in runs and not self._try(name, partial(action, runs[arm])):
                del self.runs[name]

    def _try(self, name: str, action: Callable[[], None]) -> bool:
        try:
            with redirect_stdout(sys.stderr):  # results alone go to stdout
                action()
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            log.warning("tracker %s failed (%s): the study goes on, and sends it nothing more", name, reason)
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Run:
    """One arm in one tracker. Trackers differ in how they take a picture and in what keeps runs of one
    process apart.
    """

    def __init__(
        self,
        tracker: Any,
        send_image: Callable[[str, np.ndarray, int], None],
        finish: Callable[[], None] | None = None,
        **options: Any,
    ) -> None:
        self.log_image = send_image
        self.finish: Callable[[], None] = finish or tracker.finish
        self._tracker = tracker
        self._options = options

    def log(self, values: dict[str, float], step: int) -> None:
        self._tracker.log(values, step=step, **self._options)


def _start(
    name: str, run_dir: Path, study: str, arm: str, config: dict[str, Any], known: dict[str, Any]
) -> _Run:
    """Start or go on with the run of one arm; `known` is what `trackers.json` holds, and gets what is new."""
    match name:
        case "tensorboard":
            return _start_tensorboard(run_dir, arm, config)
        case "wandb":
            return _start_wandb(run_dir, study, arm, config, known["id"])
        case "mlflow":
            return _start_mlflow(run_dir, study, arm, config, known["mlflow"])
        case _:
            return _start_trackio(study, f"{arm}-{known['id']}", config)


def _start_tensorboard(run_dir: Path, arm: str, config: dict[str, Any]) -> _Run:
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker(arm, run_dir / "tensorboard")
    is_new = not (run_dir / "tensorboard" / arm).exists()
    tracker.start()
    if is_new:  # its table of hyperparameters would add a run for each start
        tracker.log({"config": "\n".join(f"    {key} = {value}" for key, value in config.items())}, step=0)

    def send_image(caption: str, pixels: np.ndarray, step: int) -> None:
        tracker.log_images({caption: pixels[None]}, step=step, dataformats="NHWC")

    return _Run(tracker, send_image)


def _start_wandb(run_dir: Path, study: str, arm: str, config: dict[str, Any], folder_id: str) -> _Run:
    import wandb
    from accelerate.tracking import WandBTracker

    tracker = WandBTracker(
        study,
        name=arm,
        group=f"{study}-{folder_id}",
        id=f"{folder_id}-{arm}",
        resume="allow",
        reinit="create_new",  # the runs of all arms stay open together
        config=config,
        dir=str(run_dir),
        settings=wandb.Settings(silent=True, console="off"),
    )
    with redirect_stdout(sys.stderr):
        tracker.start()
    if not tracker.run.offline:
        log.info("wandb: arm %s at %s", arm, tracker.run.url)
    return _Run(tracker, lambda caption, pixels, step: tracker.log_images({caption: [pixels]}, step=step))


def _start_mlflow(
    run_dir: Path, study: str, arm: str, config: dict[str, Any], run_ids: dict[str, str]
) -> _Run:
    # A server that hangs would hold up every step: by default a request is tried 8 times at 120 s each.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow
    from accelerate.tracking import MLflowTracker

    artifacts = None
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        place = (run_dir / "mlflow").resolve()
        place.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{place / 'mlflow.db'}")
        artifacts = (place / "artifacts").as_uri()
    tracker = MLflowTracker(study, logging_dir=artifacts, run_id=run_ids.get(arm), run_name=arm)
    with redirect_stdout(sys.stderr):
        tracker.start()
        if arm not in run_ids:
            tracker.store_init_configuration(config)
        mlflow.end_run("RUNNING")  # MLflow has one active run; from here on the arm's is named in each call
    run_id = run_ids[arm] = tracker.active_run.info.run_id
    client = mlflow.MlflowClient()

    def send_image(caption: str, pixels: np.ndarray, step: int) -> None:
        client.log_image(run_id, pixels, key=_mlflow_key(caption), step=step, synchronous=True)

    return _Run(tracker, send_image, lambda: client.set_terminated(run_id), run_id=run_id)


def _mlflow_key(caption: str) -> str:
    """MLflow takes letters, digits and `_-. /` in names."""
    return "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "_-. ") else "_" for letter in caption
    )[:100]


def _start_trackio(study: str, name: str, config: dict[str, Any]) -> _Run:
    import trackio
    from accelerate.tracking import TrackioTracker

    tracker = TrackioTracker(
        study, name=name, config=config, resume="allow", embed=False, auto_log_cpu=False, auto_log_gpu=False
    )
    with redirect_stdout(sys.stderr):
        # a start ends the run that was started before in its context
        contextvars.copy_context().run(tracker.start)

    def send_image(caption: str, pixels: np.ndarray, step: int) -> None:
        tracker.run.log({caption: trackio.Image(pixels, caption=caption)}, step=step)

    return _Run(tracker, send_image)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, keys joined by dots; numbers and truth values stay, all else becomes text."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = (
                value if isinstance(value, bool | int | float | str) else json.dumps(value, default=str)
            )
    return flat
