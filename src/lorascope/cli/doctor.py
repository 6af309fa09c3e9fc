"""`lorascope doctor`."""

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from lorascope.cli.options import AsJson, set_level
from lorascope.config import load_study
from lorascope.console import say, say_tables
from lorascope.errors import EXIT_DONE, EXIT_RUN_FAILED
from lorascope.schema import StudyConfig


def doctor(
    *,
    base: Annotated[
        str, Parameter(help="base as base.model takes it, a study file (.toml) or a run folder")
    ] = "pocket",
    quick: Annotated[
        bool, Parameter(help="only what a study checks at its first start on a GPU", negative="")
    ] = False,
    device: Annotated[Literal["auto", "cpu", "cuda"], Parameter(help="what is examined")] = "auto",
    as_json: AsJson = False,
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], help="no progress", negative="")] = False,
) -> int:
    """Check every fast path on this device against the plain one, and print what a bug report needs.

    A study does not use what is wrong. At its first start on a GPU with these versions it checks that itself;
    this command checks again, and more. Exit code 0: nothing is wrong; 3: something is.

    Examples:

    lorascope doctor

    lorascope doctor --base stable-diffusion-v1-5/stable-diffusion-v1-5
    """
    from lorascope.doctor.examination import Subject, examine
    from lorascope.machine.device import choose_device

    set_level(quiet, False)
    config, resolution_px = _read(base)
    chosen = choose_device(config.device if device == "auto" else device)
    examination = examine(Subject(config.base, chosen, config.train.precision, resolution_px), quick)
    if as_json:
        say(json.dumps(examination.as_dict(), indent=2))
    else:
        say_tables(*examination.as_tables())
    return EXIT_RUN_FAILED if examination.wrong else EXIT_DONE


def _read(base: str) -> tuple[StudyConfig, int | None]:
    """The configuration with the base that is meant, and the side of a study's pictures."""
    path = Path(base)
    file = path / "study.toml" if (path / "study.toml").is_file() else path
    if file.suffix == ".toml":
        config = load_study(file)
        return config, config.data.resolution_px
    return load_study(preset="pocket", overrides=[f"base.model={json.dumps(base, ensure_ascii=False)}"]), None
