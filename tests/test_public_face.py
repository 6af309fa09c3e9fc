"""`import lorascope`: quick, without torch, and every name of its face is there at first use."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lorascope

FACE = ["AdapterBank", "Study", "inspect_adapter", "load_adapter", "load_base", "load_study"]


def printed(code: str) -> list[str]:
    """What code prints in a process of its own."""
    environment = {"PYTHONPATH": str(Path(lorascope.__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    return result.stdout.splitlines()


def test_importing_looking_and_reading_a_study_import_no_torch() -> None:
    code = """
import sys
import lorascope
before = set(sys.modules)
dir(lorascope), lorascope.__all__, lorascope.__version__
print(sorted(name for name in sys.modules if name.startswith("lorascope")))
lorascope.load_study(preset="smoke")
print("torch" in sys.modules)
lorascope.AdapterBank
print("torch" in sys.modules)
"""
    assert printed(code) == ["['lorascope']", "False", "True"]


def test_the_face_is_what_the_modules_define() -> None:
    assert sorted(lorascope.__all__) == FACE
    assert set(FACE) <= set(dir(lorascope))
    for name in FACE:
        value = getattr(lorascope, name)
        assert getattr(importlib.import_module(value.__module__), name) is value
        assert value.__doc__


def test_a_star_import_and_an_unknown_name() -> None:
    assert printed("from lorascope import *; print(load_study.__module__)") == ["lorascope.config"]
    with pytest.raises(AttributeError, match=r"module 'lorascope' has no attribute 'Studdy'"):
        lorascope.Studdy  # noqa: B018
