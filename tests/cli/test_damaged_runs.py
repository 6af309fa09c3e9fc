"""Commands on a finished run folder of which a file is damaged: one line and an exit code, no fault of ours.

The run is that of 0.1.0 (`tests/run_of_0_1_0`), so that nothing has to be trained.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorascope.cli.app import main
from lorascope.errors import EXIT_DONE, EXIT_INPUT, EXIT_RUN_FAILED

KEPT = Path(__file__).parents[1] / "run_of_0_1_0"


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80  # no letter, and with it no text
    path.write_bytes(content)


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def put_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "half": cut,
    "flipped bit": flip,
    "folder": put_folder,
    "pipe": put_pipe,
    "list": lambda path: path.write_text("[]"),
    "null": lambda path: path.write_text("null"),
}
ADAPTER, PICTURE = "adapters/r2/adapter_model.safetensors", "images/r2/normal-000-0.png"
TRAINING = "adapters/r2/training.json"
# A report without one of these files is drawn, which takes a while, so that none is missing there.
CASES = [
    *(
        ("report", file, damage)
        for file in (
            "study.toml",
            "manifest.json",
            "data.json",
            "merge_check.json",
            "scores.parquet",
            TRAINING,
        )
        for damage in list(DAMAGES)[1:]
    ),
    *(
        ("export", file, damage)
        for file in ("study.toml", "data.json", ADAPTER, TRAINING)
        for damage in DAMAGES
    ),
    *(
        ("score", file, damage)
        for file in ("merge_check.json", TRAINING, PICTURE)
        for damage in list(DAMAGES)[1:]
    ),
    *(("report", "metrics.jsonl", damage) for damage in ("flipped bit", "folder", "pipe")),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, scorer, pictures and the finished run, copied; every test puts back the file it damages."""
    path = Path(shutil.copytree(KEPT, tmp_path_factory.mktemp("damaged") / "world"))
    manifest = json.loads((path / "finished" / "manifest.json").read_text())
    del manifest["stages"]["score"]  # so that `score` does score
    (path / "finished" / "manifest.json").write_text(json.dumps(manifest, indent=2))
    return path


@pytest.fixture
def damaged(
    world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[str, str], None]]:
    """Damages a file of the run, which is put back in the end."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = shutil.copytree(world / "finished", world / "run")

    def damage(file: str, how: str) -> None:
        if how == "pipe" and not hasattr(os, "mkfifo"):
            pytest.skip("needs named pipes")
        DAMAGES[how](run / file)

    yield damage
    shutil.rmtree(run)


COMMANDS = {"report": [], "score": [], "export": ["--arm", "r2", "--out", "out.safetensors", "--force"]}


def run_command(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """The exit code, and the lines of the errors on stderr."""
    code = main([command, "run", *COMMANDS[command]])
    lines = capsys.readouterr().err.splitlines()
    return code, [line for line in lines if line.startswith(("lorascope:", "Traceback"))]


@pytest.mark.parametrize(("command", "file", "damage"), CASES)
def test_a_damaged_file_is_one_line(
    command: str,
    file: str,
    damage: str,
    damaged: Callable[[str, str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    damaged(file, damage)
    code, lines = run_command(command, capsys)
    assert code in (EXIT_INPUT, EXIT_RUN_FAILED), lines
    assert len(lines) == 1 and "fault of ours" not in lines[0]


@pytest.mark.parametrize("damage", [how for how in DAMAGES if how != "folder"])
def test_damaged_features_are_computed_again(
    damage: str, damaged: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    damaged("features.safetensors", damage)
    assert run_command("score", capsys) == (EXIT_DONE, [])
    assert Path("run/features.safetensors").is_file()
