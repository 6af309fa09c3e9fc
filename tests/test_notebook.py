"""The notebook runs from top to bottom, and holds what notebooks are to hold."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorascope.config import load_study
from lorascope.console import log

ROOT = Path(__file__).parents[1]
NOTEBOOK = json.loads((ROOT / "examples" / "study.ipynb").read_text(encoding="utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
CODE = ["".join(cell["source"]) for cell in CELLS]


@pytest.fixture
def _own_log() -> Iterator[None]:
    """The notebook shows the log; later tests catch it as they expect."""
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = before


def run_cell(source: str, names: dict[str, Any]) -> object:
    """Run a cell; what it shows is the value of its last line, where that is an expression."""
    body = ast.parse(source).body
    if not body or not isinstance(body[-1], ast.Expr):
        exec(source, names)
        return None
    exec(compile(ast.Module(body[:-1], []), "cell", "exec"), names)
    return eval(compile(ast.Expression(body[-1].value), "cell", "eval"), names)


@pytest.mark.usefixtures("_own_log")
def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORASCOPE_NOTEBOOK_PRESET", "smoke")
    names: dict[str, Any] = {}
    shown = [run_cell(source, names) for source in CODE]
    said = capsys.readouterr().out
    assert "preset smoke" in said and "time       about" in said
    assert any("<iframe" in value._repr_html_() for value in shown if hasattr(value, "_repr_html_"))
    facts = json.loads((tmp_path / "runs" / "notebook" / "data.json").read_text())
    assert (facts["num_train"], facts["num_heldout"], facts["duplicates"]) == (18, 6, [])
    assert names["written"].path.is_file()
    assert names["inspection"].dead_because is None
    assert load_study(tmp_path / "next.toml", environment={}).data.source == "drawings"


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp16"), ((8, 0), "auto")])
def test_a_gpu_gets_few_arms_in_a_precision_that_it_computes(
    capability: tuple[int, int], precision: str
) -> None:
    import lorascope

    torch = SimpleNamespace(cuda=SimpleNamespace(get_device_capability=lambda: capability))
    names = {"lorascope": lorascope, "torch": torch, "folder": Path("drawings"), "preset": "style"}
    [cell] = [source for source in CODE if "load_study" in source]
    run_cell(cell, names)
    config: Any = names["config"]
    assert config.train.precision == precision
    assert [arm.name for arm in config.expand_arms()] == ["r8", "r32"]
    assert (config.data.resolution_px, config.train.batch_size) == (512, 1)


def test_the_notebook_is_plain() -> None:
    """Any program opens it, nothing that a run gave is kept in it, and its cells can be taken in."""
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)
    lines = [line for source in CODE for line in source.splitlines()]
    assert not any(line.lstrip().startswith(("!", "%")) for line in lines)
    assert max(len(source.splitlines()) for source in CODE) <= 35
