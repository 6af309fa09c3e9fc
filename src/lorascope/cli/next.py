"""`lorascope next`: the study to run after a run that was diagnosed."""

from lorascope.cli.options import Run
from lorascope.config import load_study
from lorascope.console import say
from lorascope.errors import EXIT_DONE, ConfigError
from lorascope.run_folder import RunDir


def next_study(run: Run, /) -> int:
    """Print a study file that would decide what a diagnosed run leaves open, each part with its reason.

    It compares the best arm with a lower learning rate and with other ranks at the same gain, changes what
    the diagnoses ask for, and takes as many prompts and training seeds as would show a difference that
    counts.

    For example:

    lorascope next runs/pocket > next.toml
    """
    from lorascope.diagnosis.next_study import propose_after
    from lorascope.diagnosis.record import read_diagnosis

    folder = RunDir(run)
    if not folder.study_toml.exists():
        raise ConfigError(f"{run}: no study.toml here: name a run folder")
    config = load_study(folder.study_toml, environment={})
    say(propose_after(config, read_diagnosis(folder)).toml, end="")
    return EXIT_DONE
