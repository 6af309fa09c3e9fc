"""What findings bar, and what is kept of them."""

import re
from typing import Any

import pytest

from lorascope.console import say_tables
from lorascope.doctor.findings import Examination, Finding, kept_path, recall, remember
from lorascope.machine.fast_paths import ALL_PATHS, FastPaths
from lorascope.store import write_bytes

VERSIONS = {"torch": "2.13.0", "driver": "550.54", "threads": "4", "platform": "Linux"}


def examination(*findings: Finding) -> Examination:
    return Examination("pocket, U-Net in bf16", VERSIONS, findings)


@pytest.mark.parametrize(
    ("check", "status", "allowed"),
    [
        ("attention cudnn", "wrong", FastPaths(barred_kernels=frozenset({"cudnn"}))),
        ("attention cudnn", "slower", ALL_PATHS),  # it is not there
        ("channels_last", "wrong", FastPaths(channels_last=False)),
        ("recorded step", "wrong", FastPaths(recorded_step=False)),
        ("recorded step", "slower", FastPaths(recorded_step=False)),  # it was tried
        ("recorded step", "not checked", ALL_PATHS),
        ("half-precision VAE", "wrong", FastPaths(half_vae=False)),
        ("half-precision VAE", "overflow", FastPaths(half_vae=False)),
        ("half-precision VAE", "slower", FastPaths(half_vae=False)),  # as overflows were kept before
        ("stacked arms", "wrong", ALL_PATHS),  # nothing to switch off
        ("channels_last", "ok", ALL_PATHS),
    ],
)
def test_what_a_finding_switches_off(check: str, status: Any, allowed: FastPaths) -> None:
    found = examination(Finding("attention sdpa", "ok", ""), Finding(check, status, "why", 0.5, 0.1))
    assert found.fast_paths == allowed
    assert [finding.check for finding in found.barred] == ([] if allowed == ALL_PATHS else [check])
    assert len(found.wrong) == (status == "wrong")


def test_a_finding_as_a_line() -> None:
    finding = Finding("channels_last", "wrong", "gradients", 0.25, 1e-3)
    assert finding.as_line() == "channels_last wrong: gradients (error 0.25, tolerance 0.001)"
    assert Finding("resume", "ok", "same bits").as_line() == "resume ok: same bits"


def test_what_others_wrote_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """A name is no markup, and what a library said moves no cursor."""
    found = Examination("my[bold]base", VERSIONS, (Finding("resume", "wrong", "[red] \x1b[2Jgone"),))
    say_tables(*found.as_tables())
    printed = capsys.readouterr().out
    assert re.search(r"^base +my\[bold\]base$", printed, re.MULTILINE)
    assert printed.rstrip().endswith("[red] \\x1b[2Jgone")


def test_an_examination_is_kept_by_versions_models_and_dtype() -> None:
    first, second = (examination(Finding("resume", "ok", told)) for told in ("one", "two"))
    remember(first, "models", "bf16")
    assert recall(VERSIONS, "models", "bf16") == first
    assert recall({**VERSIONS, "threads": "8", "platform": "other"}, "models", "bf16") == first
    for versions, models, dtype in (
        ({**VERSIONS, "driver": "560.1"}, "models", "bf16"),
        (VERSIONS, "others", "bf16"),
        (VERSIONS, "models", "fp16"),
    ):
        assert recall(versions, models, dtype) is None
    remember(second, "models", "bf16")
    assert recall(VERSIONS, "models", "bf16") == second


def test_only_the_last_examinations_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorascope.doctor.findings._MAX_REMEMBERED", 2)
    for models in "abc":
        remember(examination(), models, "bf16")
    assert [recall(VERSIONS, models, "bf16") is None for models in "abc"] == [True, False, False]


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b'{"KEY": []}', b'{"KEY": {"base": "b", "versions": {}, "findings": [{"check": 1}]}}'],
)
def test_a_damaged_memory_is_as_none(content: bytes) -> None:
    remember(examination(), "models", "bf16")
    key = next(part for part in kept_path().read_text().split('"') if len(part) == 64)
    write_bytes(kept_path(), content.replace(b"KEY", key.encode()))
    assert recall(VERSIONS, "models", "bf16") is None
    remember(examination(), "models", "bf16")
    assert recall(VERSIONS, "models", "bf16") == examination()


def test_a_status_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="status 'fine'"):
        Finding("resume", "fine", "")  # type: ignore[arg-type]
    broken = examination(Finding("resume", "ok", "")).as_dict()
    broken["findings"][0]["status"] = "fine"
    with pytest.raises(ValueError, match="no examination: status 'fine'"):
        Examination.from_dict(broken)


def test_a_memory_that_cannot_be_written_stops_nothing() -> None:
    kept_path().mkdir(parents=True)
    remember(examination(), "models", "bf16")
    assert recall(VERSIONS, "models", "bf16") is None
