"""The command line: results on stdout, one line per error, documented exit codes."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lorascope
from lorascope.base.weights import read_header
from lorascope.cli.app import main
from lorascope.errors import EXIT_DONE, EXIT_FAULT, EXIT_INPUT, EXIT_INTERRUPTED, EXIT_RUN_FAILED


@pytest.fixture(scope="module")
def tiny(
    pipeline_folder: Path,
    scorer_folder: Path,
    picture_parquet: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A study file of one small arm."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "prompts.txt").write_text("[normal]\nred\n[abstract]\nluck\n")
    (folder / "tiny.toml").write_text(
        f"""
        base.model = "{pipeline_folder}"
        data = {{ source = "{picture_parquet}", resolution_px = 32, heldout_share = 0.2, num_train = 4 }}
        arms = [{{ rank = 2, lr = 1e-3 }}]
        train = {{ epochs = 1, num_probe = 2 }}
        sample = {{ prompts = "{folder / "prompts.txt"}", steps = 1 }}
        score = {{ model = "{scorer_folder}", resamples = 100 }}
        """
    )
    return folder / "tiny.toml"


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; never write into it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(["study", str(tiny), "--run-dir", str(run), "-q"]) == EXIT_DONE
    return run


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and the one line on stderr; nothing may stand on stdout."""
    code = main(list(arguments))
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("lorascope:")]
    assert captured.out == "" and len(lines) == 1, captured
    return code, lines[0]


def test_study_prints_the_answer_and_the_report(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", str(tiny), "--run-dir", str(tmp_path / "run")]) == EXIT_DONE
    captured = capsys.readouterr()
    assert f"Report: {tmp_path / 'run' / 'report.html'}" in captured.out
    assert "train    done" in captured.err and "train    done" not in captured.out
    assert main(["study", str(tiny), "--run-dir", str(tmp_path / "run"), "--json"]) == EXIT_DONE
    assert json.loads(capsys.readouterr().out)["report"] == str(tmp_path / "run" / "report.html")


def test_quiet_prints_the_path_alone(tiny: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(tiny), "--run-dir", str(finished), "-q"]) == EXIT_DONE
    captured = capsys.readouterr()
    assert captured.out == f"{finished / 'report.html'}\n" and captured.err == ""


def test_stages_run_one_by_one(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    assert main(["data", run, "--study", str(tiny)]) == EXIT_DONE
    for stage in ("encode", "train", "sample", "score", "diagnose", "report"):
        assert main([stage, run, "-q"]) == EXIT_DONE
    out = capsys.readouterr().out
    assert "| base " in out and out.strip().endswith("report.html")
    assert main(["score", run, "--json"]) == EXIT_DONE
    shown = json.loads(capsys.readouterr().out)
    assert {row["arm"] for row in shown["summary"]} >= {"base", "r2"}
    assert main(["study", str(tiny), "--run-dir", run, "--json"]) == EXIT_DONE
    answer = json.loads(capsys.readouterr().out)
    assert shown["verdict"]["keep"] == answer["keep"]
    assert shown["verdict"]["headline"] in answer["answer"]
    assert main(["report", run, "--json"]) == EXIT_DONE
    assert {"run": run, **json.loads(capsys.readouterr().out)} == answer
    assert answer["decision"] == shown["verdict"]["decision"]


def test_export_and_convert_write_files(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "kohya": "a.safetensors",
        "diffusers": "b.safetensors",
        "peft": "folder",
        "merged-diffusers": "model",
        "merged-ldm": "c.safetensors",
    }
    for layout, name in files.items():
        assert (
            main(["export", str(finished), "--arm", "r2", "--format", layout, "--out", str(tmp_path / name)])
            == EXIT_DONE
        )
        captured = capsys.readouterr()
        assert captured.out == f"{tmp_path / name}\n" and "rounding error" in captured.err
    weak = str(tmp_path / "weak.safetensors")
    assert main(["export", str(finished), "--arm", "r2", "--strength", "0.5", "--out", weak]) == EXIT_DONE
    capsys.readouterr()
    assert read_header(Path(weak)).metadata["lorascope_strength"] == "0.5"
    code, line = error_of(capsys, "export", str(finished), "--arm", "r2", "--strength", "60")
    assert code == EXIT_INPUT and "--strength 60: must be above 0 and at most 2" in line
    assert (tmp_path / "model" / "model_index.json").is_file()
    assert (
        main(["convert", str(tmp_path / "b.safetensors"), str(tmp_path / "d.safetensors"), "--dtype", "fp32"])
        == EXIT_DONE
    )
    assert "note: " in capsys.readouterr().err  # not Stable Diffusion v1.5's layers
    code, line = error_of(capsys, "convert", str(tmp_path / "b.safetensors"), str(tmp_path / "d.safetensors"))
    assert code == EXIT_INPUT and "exists: name another path, or replace it with --force" in line


@pytest.mark.parametrize(
    ("command", "example"),
    [
        ("study", "lorascope study --preset smoke"),
        ("export", "lorascope export runs/paper --arm r16"),
        ("convert", "lorascope convert style.safetensors style-peft --format peft"),
    ],
)
def test_help_shows_examples(command: str, example: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == EXIT_DONE
    assert example in capsys.readouterr().out


def test_export_writes_into_the_current_folder(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(finished), "--arm", "r2", "--checkpoint", "best"]) == EXIT_DONE
    assert capsys.readouterr().out == "tiny-r2-best.safetensors\n"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-r2-best.safetensors"]


def test_presets_can_be_listed_and_copied(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == EXIT_DONE
    assert "paper-as-run" in capsys.readouterr().out
    assert main(["presets", "recommended"]) == EXIT_DONE
    assert tomllib.loads(capsys.readouterr().out)["name"] == "recommended"


@pytest.mark.parametrize("preset", ["smoke", "pocket", "paper-explained"])
def test_dry_run_prints_the_plan_of_a_preset(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["study", "--preset", preset, "--dry-run"]) == EXIT_DONE
    out = capsys.readouterr().out
    assert "training" in out and "sampling" in out and "disk" in out
    assert not list(tmp_path.iterdir())


def test_a_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--preset", "smoke", "--dry-run", "--json"]) == EXIT_DONE
    plan = json.loads(capsys.readouterr().out)
    assert plan["power"]["num_training_seeds"] == 1 and plan["memory"]["num_arms"] == len(plan["arms"])


def test_env_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == EXIT_DONE
    assert "torch" in capsys.readouterr().out
    assert main(["--version"]) == EXIT_DONE
    assert lorascope.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stdy"], "Did you mean"),
        (["study", "--prest", "smoke"], "Did you mean"),
        (["study", "--preset", "smok"], "smoke"),
        (["study", "absent.toml"], "no such study file"),
        (["study", "--set", "train.epoch=2"], "did you mean"),
        (["study", "--set", "train.epochs=0"], "train.epochs"),
        (["train", "nowhere"], "no study.toml here"),
        (["export", "nowhere", "--arm", "r4"], "no study.toml here"),
        (["convert", "nowhere", "out.safetensors"], "cannot be read"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, line = error_of(capsys, *arguments)
    assert code == EXIT_INPUT and message in line


def test_a_refused_start_does_not_print_an_earlier_answer(
    tiny: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = error_of(capsys, "study", str(tiny), "--run-dir", str(finished), "--set", "train.epochs=2")
    assert code == EXIT_INPUT
    assert "train.epochs was 1, now 2" in line


def test_settings_for_a_started_run_are_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = error_of(capsys, "train", str(finished), "--set", "train.epochs=2")
    assert code == EXIT_INPUT and "has its study.toml already" in line


def test_bad_data_prompts_and_models_stop_before_training(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for override in (
        "data.source=/absent",
        "sample.prompts=/absent.txt",
        "base.model=/absent",
        "score.model=/absent",
        'adapter.targets=["to_x"]',
    ):
        run = tmp_path / override.replace("/", "_")
        code, line = error_of(capsys, "study", str(tiny), "--run-dir", str(run), "--set", override, "-q")
        assert code == EXIT_INPUT and ("absent" in line or "to_x" in line), line
        assert not (run / "adapters").exists(), override


def test_a_folder_that_cannot_be_written_is_code_3(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    code, line = error_of(capsys, "study", str(tiny), "--run-dir", str(tmp_path / "file" / "run"), "-q")
    assert code == EXIT_RUN_FAILED and "choose another folder" in line


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image.Image.save", full)
        code, line = error_of(capsys, "study", str(tiny), "--run-dir", str(run), "-q")
    assert code == EXIT_RUN_FAILED and "the disk is full" in line
    assert not list(run.rglob("*.partial*"))
    assert main(["study", str(tiny), "--run-dir", str(run), "-q"]) == EXIT_DONE


def test_a_failed_arm_is_code_3_with_a_report(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = 'arms=[{rank=2, lr=1e-3}, {name="wild", rank=2, alpha=1e20, lr=1e20}]'
    assert (
        main(
            ["study", str(tiny), "--run-dir", str(tmp_path / "run"), "--set", arms, "--set", "train.epochs=3"]
        )
        == EXIT_RUN_FAILED
    )
    captured = capsys.readouterr()
    assert "arm wild failed" in captured.err.splitlines()[-1] and "report.html" in captured.out


def test_faults_of_ours_are_code_1_and_interruptions_130(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed_import = RuntimeError("failed to import")
    failed_import.__cause__ = ImportError("initialization failed")
    failed_import.__cause__.__context__ = KeyboardInterrupt()
    for error, expected, message in (
        (ZeroDivisionError("odd"), EXIT_FAULT, "a fault of ours: ZeroDivisionError: odd"),
        (KeyboardInterrupt(), EXIT_INTERRUPTED, "interrupted"),
        (failed_import, EXIT_INTERRUPTED, "interrupted"),
    ):

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("lorascope.study.Study.prepare_data", fail)
        code, line = error_of(capsys, "study", str(tiny), "--run-dir", str(tmp_path / "run"), "-q")
        assert code == expected and message in line


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORASCOPE_DEBUG", "1")
    assert main(["train", "nowhere"]) == EXIT_INPUT
    assert "Traceback" in capsys.readouterr().err


def test_python_dash_m_works() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lorascope", "presets"], capture_output=True, text=True, check=True
    )
    assert "smoke" in result.stdout


def test_a_run_folder_can_be_moved(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = Path(shutil.copytree(finished, tmp_path / "moved"))
    assert main(["report", str(moved)]) == EXIT_DONE
    assert capsys.readouterr().out == f"{moved / 'report.html'}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["study", "\x1b[31mred.toml"],
        ["study", "--set", "\x1b[31m=1"],
        ["study", "--set", 'name="\x9b31m"'],
        ["report", "run\nlorascope: all is well"],
        ["stu\x1b[31mdy"],
        ["inspect", "\x1b]0;title\x07.safetensors"],
    ],
)
def test_what_is_named_in_an_error_steers_no_terminal(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = error_of(capsys, *arguments)
    assert code == EXIT_INPUT and line.isprintable()


@pytest.mark.parametrize(
    "arguments",
    [
        ["study", "{}"],
        ["study", "--run-dir", "{}"],
        ["report", "{}"],
        ["score", "{}"],
        ["export", "{}", "--arm", "r2"],
        ["inspect", "{}"],
        ["convert", "{}", "out"],
        ["resize", "{}", "out", "--rank", "2"],
    ],
)
def test_a_path_that_cannot_be_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, line = error_of(capsys, *(part.format("a" * 5000) for part in arguments))
    assert code in (EXIT_INPUT, EXIT_RUN_FAILED)
    assert "File name too long" in line or "no " in line or "not " in line, line[-200:]
