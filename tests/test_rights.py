"""Places that the system does not let be looked at are one line for whoever calls from Python, too."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorascope.adapters.export import convert, export_arm
from lorascope.adapters.files import load_adapter
from lorascope.adapters.inspection import inspect_adapter
from lorascope.config import load_study
from lorascope.errors import ConfigError, LorascopeError
from lorascope.report.evidence import Facts
from lorascope.report.page import build_report
from lorascope.run_folder import RunDir
from lorascope.store import access_errors
from lorascope.study import Study
from rights import without_rights

KEPT = Path(__file__).parent / "run_of_0_1_0" / "finished"
ADAPTER = "adapters/r2"


def export(run: Path) -> Any:
    config = load_study(run / "study.toml", environment={})
    return export_arm(RunDir(run), config, "r2", "kohya", run.parent / "out.safetensors")


CALLS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "open a study": (Study.open, "."),
    "read a run": (lambda run: Facts(RunDir(run)), ADAPTER),
    "report": (lambda run: build_report(RunDir(run)), ADAPTER),
    "export": (export, ADAPTER),
    "load an adapter": (lambda run: load_adapter(run / ADAPTER), ADAPTER),
    "inspect an adapter": (lambda run: inspect_adapter(run / ADAPTER), ADAPTER),
    "convert": (lambda run: convert(run / ADAPTER, run.parent / "out.safetensors", "kohya"), ADAPTER),
}


@pytest.mark.skipif(os.name != "posix", reason="needs the rights of files")
@pytest.mark.parametrize("name", CALLS)
def test_a_folder_without_rights_is_one_line(name: str) -> None:
    call, place = CALLS[name]
    files = {path.relative_to(KEPT): path.read_bytes() for path in KEPT.rglob("*") if path.is_file()}
    Study.open(KEPT)  # loads what may be out of reach without rights
    with without_rights() as run:
        for path, content in files.items():
            (run / path).parent.mkdir(parents=True, exist_ok=True)
            (run / path).write_bytes(content)
        (run / place).chmod(0)
        try:
            with pytest.raises(LorascopeError) as error:
                call(run)
        finally:
            (run / place).chmod(0o777)
    assert "cannot be read (Permission denied): check the path and its permissions" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_error_that_names_no_place_is_left_as_it_is() -> None:
    with (
        pytest.raises(ConfigError, match=r"^here: cannot be read \(gone\)"),
        access_errors(ConfigError),
    ):
        raise OSError(5, "gone", "here")
    with pytest.raises(OSError, match="gone"), access_errors(ConfigError):
        raise OSError(5, "gone")
