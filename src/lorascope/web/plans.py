"""What a study would take (`lorascope study --dry-run`), and whether it would run (`lorascope preflight`)."""

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorascope import __version__
from lorascope.schema import StudyConfig
from lorascope.store import digest_json, write_text
from lorascope.web.commands import run_command
from lorascope.web.drafts import Draft
from lorascope.web.queue import Job
from lorascope.web.services import Services
from lorascope.web.starting import require_readable

_FRESH_S = 600.0  # pictures and free memory may be others later
_LIMIT_S = 120.0
_MOST = 200
_ONE_BY_ONE = threading.Lock()


def plan_of(services: Services, config: StudyConfig) -> Mapping[str, Any]:
    """The plan of a study, as the command prints it in JSON; kept for a while.

    Raises `OutsideError` where the study reads what a browser may not name, and `CommandError` with the
    command's line where the study would not start.
    """
    require_readable(services.workspace, config)
    with _ONE_BY_ONE:
        if (known := kept_plan(services, config)) is not None:
            return known
        key = _key(config)
        path = services.workspace.state_dir / "plans" / f"{key}.toml"
        write_text(path, config.to_toml())
        try:
            arguments = ["study", str(path), "--dry-run", "--json", "--quiet"]
            plan: dict[str, Any] = json.loads(
                run_command(services.workspace, arguments, limit_s=_LIMIT_S).output
            )
        finally:
            path.unlink(missing_ok=True)
        for old in list(services.plans)[:-_MOST]:
            del services.plans[old]
        services.plans[key] = time.monotonic(), plan
        return plan


def kept_plan(services: Services, config: StudyConfig) -> Mapping[str, Any] | None:
    """The plan of a study where it was made a short while ago."""
    made, plan = services.plans.get(_key(config), (0.0, None))
    return plan if plan is not None and time.monotonic() - made < _FRESH_S else None


def _key(config: StudyConfig) -> str:
    return digest_json([__version__, config.model_dump(mode="json", exclude={"name"})])


@dataclass(frozen=True)
class Trial:
    """The newest preflight of a draft. `checks` and `whole` are what it printed so far."""

    job: Job
    checks: tuple[Mapping[str, Any], ...]
    whole: Mapping[str, Any] | None

    def is_of(self, config: StudyConfig | None) -> bool:
        """Whether it tried this very study, and not what the draft said before."""
        return self.whole is not None and config is not None and self.whole["digest"] == config.digest()

    def has_passed(self, config: StudyConfig | None) -> bool:
        """Whether this very study would run."""
        return self.is_of(config) and self.whole is not None and bool(self.whole["ok"])


def preflight_arguments(draft: Draft) -> list[str]:
    """The arguments of `lorascope`, in the workspace, that try a draft."""
    return ["preflight", draft.argument, "--json"]


def start_trial(services: Services, draft: Draft) -> Job:
    """Put the preflight of a draft into the queue, before what waits; one that waits or runs is taken.

    Raises `ConfigError` where the draft is wrong, and `OutsideError` as `plan_of`.
    """
    require_readable(services.workspace, draft.config)
    trial = find_trial(services, draft)
    if trial is not None and trial.job.state in ("queued", "running"):
        return trial.job
    return services.supervisor.enqueue(
        "preflight", f"Check of {draft.name}", preflight_arguments(draft), first=True
    )


def find_trial(services: Services, draft: Draft) -> Trial | None:
    """The newest preflight of a draft, None where there was none."""
    arguments = tuple(preflight_arguments(draft))
    job = next((job for job in services.queue.recent("preflight", 50) if job.arguments == arguments), None)
    if job is None:
        return None
    printed = [] if job.state == "queued" else list(_records(services.supervisor.output(job.id)))
    checks = tuple(record for record in printed if "check" in record)
    whole = next((record for record in printed if "digest" in record), None)
    return Trial(job, checks, whole)


def _records(output: str) -> list[Mapping[str, Any]]:
    """Whole lines of JSON objects."""
    records: list[Mapping[str, Any]] = []
    for line in output.split("\n")[:-1]:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
