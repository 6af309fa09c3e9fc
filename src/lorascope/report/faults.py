"""What went wrong in a run."""

from collections.abc import Iterable

from lorascope.run_folder import RunDir


def find_faults(run: RunDir, arms: Iterable[str]) -> list[str]:
    """Failed arms and merges beyond tolerance, a sentence each."""
    arms = tuple(arms)
    faults = [
        f"arm {arm} failed: {failure}: lower its lr and run it in another folder"
        for arm in arms
        if (failure := run.failure(arm)) is not None
    ]
    return faults + [
        f"arm {arm}: merged output differs by {result['relative_error']:.2g}, "
        f"tolerance {result['tolerance']:g}"
        for arm, result in run.merges(arms).items()
        if not result["ok"]
    ]
