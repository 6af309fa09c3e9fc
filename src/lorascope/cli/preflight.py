"""`lorascope preflight`: would a study run here."""

import json
from typing import Annotated

from cyclopts import Parameter

from lorascope.cli.options import Overrides, Preset, Verbose, set_level
from lorascope.cli.stages import StudyFile, import_study
from lorascope.config import load_study
from lorascope.console import duration, say, size
from lorascope.errors import EXIT_DONE


def preflight(
    file: StudyFile = None,
    *,
    preset: Preset = None,
    overrides: Overrides = None,
    as_json: Annotated[
        bool,
        Parameter(
            name="--json", help="print a line of JSON for each check, and one for the whole", negative=""
        ),
    ] = False,
    verbose: Verbose = False,
) -> int:
    """Say whether a study would run here, by doing a little of all of it: the base loads, a few pictures are
    encoded, one step is trained, a picture is drawn and scored.

    The study's run folder is not touched; what is downloaded and encoded is kept for it. Exits as the study
    itself would where something fails.

    For example:

    lorascope preflight my.toml && lorascope study my.toml
    """
    set_level(not verbose, verbose)
    config = load_study(file, preset, overrides or [])
    import_study()
    from lorascope import preflight as module

    with module.preflight(config) as checks:
        for check in checks.run():
            say(json.dumps(check.to_json()) if as_json else check.as_line())
        whole = checks.to_json()
    if as_json:
        say(json.dumps(whole))
    if checks.failure is not None:
        raise checks.failure
    if not as_json:
        took, memory = duration(whole["seconds"]), size(whole["peak_memory_bytes"])
        say(f"{config.name} would run here: {took}, {memory} at most so far")
    return EXIT_DONE
