"""Studies for the tests: drawn arms, a study of overrides, and the line that refuses one."""

from pathlib import Path

import pytest
from hypothesis import strategies as st

from lorascope.arms import ArmGrid
from lorascope.config import load_study
from lorascope.errors import ConfigError
from lorascope.schema import StudyConfig

COUNTS = st.integers(1, 10_000)
SHARES = st.floats(0, 1)
POSITIVES = st.floats(1e-12, 1e6)


def one_or_several(values: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return values | st.lists(values, min_size=1, max_size=3, unique=True).map(tuple)


@st.composite
def grids(draw: st.DrawFn) -> ArmGrid:
    alpha = draw(st.sampled_from(["alpha", "alpha_per_rank", None]))
    return ArmGrid(
        rank=draw(one_or_several(st.integers(1, 1024))),
        lr=draw(one_or_several(POSITIVES)),
        seed=draw(one_or_several(st.integers(0, 2**63 - 1))),
        scaling=draw(st.sampled_from(["alpha/r", "rslora"])),
        **({alpha: draw(one_or_several(POSITIVES))} if alpha else {}),
    )


def study(
    *overrides: str, preset: str | None = None, path: Path | None = None, **environment: str
) -> StudyConfig:
    return load_study(path, preset, overrides, environment)


def refusal(*overrides: str, preset: str | None = None, path: Path | None = None, **environment: str) -> str:
    with pytest.raises(ConfigError) as error:
        study(*overrides, preset=preset, path=path, **environment)
    message = str(error.value)
    assert "\n" not in message
    assert "pydantic" not in message
    return message
