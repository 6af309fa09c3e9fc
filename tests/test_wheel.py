"""The built wheel holds everything: it runs the smoke study from outside the checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lorascope.store import read_json
from without_posix import run_without_posix

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(out),
        str(ROOT),
    ]
    subprocess.run(pip, check=True, capture_output=True)
    [path] = out.glob("lorascope-*.whl")
    return path


def test_the_wheel_is_small_and_carries_licences_weights_and_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for ending in (
        "licenses/NOTICE",
        "licenses/LICENSE",
        "py.typed",
        "presets/pocket.toml",
        "prompt_lists/sd15.txt",
        "sd15/tokenizer/merges.txt",
        "templates/viewer.js",
    ):
        assert any(name.endswith(ending) for name in names), ending
    assert sum("/pocket/" in name and name.endswith((".safetensors", ".parquet")) for name in names) >= 6
    assert wheel.stat().st_size < 42e6


def test_the_installed_wheel_runs_the_smoke_study_without_posix(wheel: Path, tmp_path: Path) -> None:
    """Two passes side by side, in a folder with spaces and letters of any script."""
    installed = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(installed)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    folder = tmp_path / "Meine Läufe – 実験 (1)" / "les œuvres & plus"
    folder.mkdir(parents=True)
    code = (
        "import lorascope, sys; from lorascope.cli.app import main; assert "
        f"lorascope.__file__.startswith({str(installed)!r}); sys.exit(main(sys.argv[1:]))"
    )
    command = ["study", "--preset", "smoke", "--quiet", "--run-dir", str(folder / "der Lauf")]
    command += ["--set", "workers=2", "--set", "train.max_stacked_arms=1"]
    for few in (
        "sample.steps=2",
        "diagnose.steps=2",
        "sample.num_prompts=2",
        "data.num_train=8",
        "data.num_heldout=4",
        "train.num_probe=2",
    ):
        command += ["--set", few]
    (tmp_path / "disguise").mkdir()
    cache = str(folder / "Zwischen speicher")
    done = run_without_posix(tmp_path / "disguise", installed, code, *command, XDG_CACHE_HOME=cache)
    assert done.returncode == 0, done.stderr[-2000:]
    report = folder / "der Lauf" / "report.html"
    assert done.stdout.strip() == str(report) and report.is_file()
    assert read_json(folder / "der Lauf" / "adapters" / "r4" / "training.json")["side_by_side"] == 2
