"""What an examination found: its table, its JSON, what it bars, and what is kept of it for later starts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rich import box
from rich.table import Table

from lorascope.console import cell, log
from lorascope.errors import StorageError, first_line
from lorascope.machine.fast_paths import FastPaths
from lorascope.store import digest_json, read_json, user_cache_path, write_json

# `slower`: there is no fast path here, for a reason that the finding tells; `overflow`: there is one, which
# numbers of this base are too large for; `not checked`: there is nothing to check here.
Status = Literal["ok", "slower", "overflow", "wrong", "not checked"]
ATTENTION = "attention "  # and the kernel's name
CHANNELS_LAST, RECORDED_STEP, HALF_VAE = "channels_last", "recorded step", "half-precision VAE"
STACKED_ARMS, RESUME, MEMORY, WORKERS = "stacked arms", "resume", "free memory", "GPUs of workers"
_SWITCHES = (CHANNELS_LAST, RECORDED_STEP, HALF_VAE)  # in the order of `FastPaths`
_MAX_REMEMBERED = 100
_STYLES: dict[Status, str] = {
    "ok": "green",
    "slower": "yellow",
    "overflow": "yellow",
    "wrong": "bold red",
    "not checked": "dim",
}
_OF_THE_DAY = ("threads", "platform")  # versions that change no result of a GPU


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    status: Status
    told: str  # why, in words
    error: float | None = None  # the largest, where it is a finite number
    tolerance: float | None = None  # of that error
    seconds: float = 0.0  # that the check took

    def __post_init__(self) -> None:
        """Raise `ValueError` for a status that is none, as a damaged file may have."""
        if self.status not in get_args(Status):
            raise ValueError(f"status {self.status!r}")

    def as_line(self) -> str:
        """The finding in a line of a log."""
        figures = "" if self.error is None else f" (error {self.error:.2g}, tolerance {self.tolerance:.2g})"
        return f"{self.check} {self.status}: {self.told}{figures}"


@dataclass(frozen=True)
class Examination:
    """The findings on one device with one base."""

    base: str  # name of the base and dtype of its U-Net
    versions: Mapping[str, str]
    findings: tuple[Finding, ...]

    @property
    def wrong(self) -> list[Finding]:
        """The findings that say wrong."""
        return [finding for finding in self.findings if finding.status == "wrong"]

    @property
    def barred(self) -> list[Finding]:
        """Findings for which something is switched off: wrong kernels, other paths that are no use."""
        return [
            finding
            for finding in self.findings
            if (finding.check.startswith(ATTENTION) and finding.status == "wrong")
            or (finding.check in _SWITCHES and finding.status in ("wrong", "overflow", "slower"))
        ]

    @property
    def fast_paths(self) -> FastPaths:
        """What may be used after these findings."""
        names = {finding.check for finding in self.barred}
        kernels = {name.removeprefix(ATTENTION) for name in names if name.startswith(ATTENTION)}
        return FastPaths(frozenset(kernels), *(switch not in names for switch in _SWITCHES))

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        findings = [asdict(finding) for finding in self.findings]
        return {"base": self.base, "versions": dict(self.versions), "findings": findings}

    @classmethod
    def from_dict(cls, value: Any) -> "Examination":
        """What `as_dict` gave; raise `ValueError` for anything else."""
        try:
            findings = tuple(Finding(**finding) for finding in value["findings"])
            return cls(str(value["base"]), dict(value["versions"]), findings)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no examination: {first_line(error)}") from error

    def as_tables(self) -> tuple[Table, Table]:
        """The tables that a bug report holds: versions, findings."""
        facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for name, version in {"base": self.base, **self.versions}.items():
            facts.add_row(cell(name), cell(version))
        table = Table(box=box.SIMPLE, padding=(0, 1))
        for column in ("check", "found", "error", "tolerance", "time"):
            table.add_column(
                column, no_wrap=True, justify="left" if column in ("check", "found") else "right"
            )
        table.add_column("details")
        for finding in self.findings:
            figures = [
                "" if value is None else f"{value:.2g}" for value in (finding.error, finding.tolerance)
            ]
            texts = (*figures, f"{finding.seconds:.1f} s", finding.told)
            found = cell(finding.status, _STYLES[finding.status])
            table.add_row(cell(finding.check), found, *map(cell, texts))
        return facts, table


# -- what is kept --------------------------------------------------------------------------------------------


def kept_path() -> Path:
    """`$XDG_CACHE_HOME/lorascope/doctor.json`, or `~/.cache/lorascope/doctor.json`."""
    return user_cache_path("doctor.json")


def recall(versions: Mapping[str, str], models: str, dtype: str) -> Examination | None:
    """The last examination by these versions on this device, of a base of these models (a digest of their
    configurations) in this dtype; None without one.
    """
    try:
        entry = _entries().get(_key(versions, models, dtype))
        return None if entry is None else Examination.from_dict(entry)
    except ValueError as error:
        log.debug("doctor   %s: %s", kept_path(), error)
        return None


def remember(examination: Examination, models: str, dtype: str) -> None:
    """Keep an examination; a cache that cannot be written is no reason to stop."""
    key = _key(examination.versions, models, dtype)
    entries = {name: entry for name, entry in _entries().items() if name != key} | {
        key: examination.as_dict()
    }
    try:
        write_json(kept_path(), dict(list(entries.items())[-_MAX_REMEMBERED:]))
    except StorageError as error:
        log.debug("doctor   not remembered: %s", error)


def _key(versions: Mapping[str, str], models: str, dtype: str) -> str:
    lasting = {name: version for name, version in versions.items() if name not in _OF_THE_DAY}
    return digest_json([lasting, models, dtype])


def _entries() -> dict[str, Any]:
    try:
        entries = read_json(kept_path()) if kept_path().exists() else {}
    except (StorageError, RecursionError) as error:
        log.debug("doctor   %s", first_line(error))
        return {}
    return entries if isinstance(entries, dict) else {}
