"""The built wheel holds everything: it runs the smoke study from outside the checkout."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

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


def test_the_installed_wheel_runs_the_smoke_study(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(installed),
        str(wheel),
    ]
    subprocess.run(pip, check=True, capture_output=True)
    paths = os.pathsep.join([str(installed), sysconfig.get_paths()["purelib"]])
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    code = (
        "import lorascope, sys; from lorascope.cli.app import main; assert "
        f"lorascope.__file__.startswith({str(installed)!r}); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-S", "-c", code, "study", "--preset", "smoke", "--quiet"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == "runs/smoke/report.html"
    assert (tmp_path / "runs" / "smoke" / "report.html").is_file()
