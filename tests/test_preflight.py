"""A preflight does a little of everything, leaves nothing behind, and says what would stop the study."""

import json
import shutil
from pathlib import Path

import pytest

from conftest import make_pictures, make_study, write_parquet
from lorascope.cli.app import main
from lorascope.config import load_study
from lorascope.errors import EXIT_DONE, EXIT_INPUT, EXIT_RUN_FAILED, ConfigError, LorascopeError, RunError
from lorascope.preflight import WORDS, Check, Preflight, largest_passes, preflight, shortened
from lorascope.schema import StudyConfig


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config_of(study_file: Path, *overrides: str) -> StudyConfig:
    return load_study(study_file, overrides=overrides, environment={})


def tried(config: StudyConfig, tmp_path: Path) -> Preflight:
    """The checks after they ran, with a cache of the test's."""
    with preflight(config, tmp_path / "cache") as checks:
        assert list(checks.run()) == checks.checks
    return checks


def test_all_is_tried_and_nothing_is_left(study_file: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    checks = tried(config_of(study_file), tmp_path)
    assert [check.name for check in checks.checks] == list(WORDS)
    assert all(check.is_ok and check.seconds >= 0 and check.memory_bytes > 0 for check in checks.checks)
    assert [check.found for check in checks.checks][2:6] == [
        "20 looked at",
        "4 to train on, 4 held out",
        "of r4, r8",
        "with r8, and one with the base alone",
    ]
    whole = checks.to_json()
    assert whole["ok"] and whole["error"] == "" and whole["arms"] == ["r4", "r8"]
    assert whole["digest"] == config_of(study_file).digest()
    assert list((tmp_path / "runs").iterdir()) == []
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".preflight")]


def test_what_it_encoded_is_there_for_the_study(study_file: Path, tmp_path: Path) -> None:
    config = config_of(study_file, "data.num_train=4", "data.num_heldout=4")
    tried(config, tmp_path)
    study = make_study(study_file, tmp_path / "run", "data.num_train=4", "data.num_heldout=4")
    study.cache_dir = tmp_path / "cache"
    with study.working("test"):
        study.prepare_data()
        study.encode()
    assert study.run_dir.manifest()["stages"]["encode"]["encoded"] == 0


def test_a_base_that_cannot_be_loaded_is_the_first_to_be_told(study_file: Path, tmp_path: Path) -> None:
    checks = tried(config_of(study_file, f"base.model={tmp_path / 'nothing'}"), tmp_path)
    [check] = checks.checks
    assert (check.name, check.is_ok, check.found) == ("base", False, "")
    assert "nothing" in check.error and check.as_line().startswith("FAILED  the base loads")
    assert isinstance(checks.failure, LorascopeError)
    assert not checks.to_json()["ok"]


def test_a_scorer_that_is_not_there_or_is_damaged_is_told(
    study_file: Path, scorer_folder: Path, tmp_path: Path
) -> None:
    missing = tried(config_of(study_file, f"score.model={tmp_path / 'nothing'}"), tmp_path)
    assert [check.name for check in missing.checks] == ["base", "inputs"]
    assert "score.model" in missing.checks[-1].error
    damaged = tmp_path / "damaged"
    shutil.copytree(scorer_folder, damaged)
    (damaged / "model.safetensors").write_bytes(b"no weights")
    found = tried(config_of(study_file, f"score.model={damaged}"), tmp_path)
    assert [check.name for check in found.checks] == list(WORDS)
    assert [check.is_ok for check in found.checks] == [True] * 6 + [False]


def test_a_rate_at_which_weights_are_not_finite_is_told_by_its_arm(study_file: Path, tmp_path: Path) -> None:
    arms = 'arms=[{ rank = 4 }, { rank = 8, lr = 1e20, name = "wild" }]'
    checks = tried(config_of(study_file, arms), tmp_path)
    assert checks.checks[-1].name == "train"
    assert checks.checks[-1].error == (
        "wild: loss is not finite after step 1, at its lr of 1e+20: lower arms.lr of this arm, or set "
        "train.precision = 'fp32'"
    )
    with pytest.raises(RunError, match="wild"):
        raise checks.failure or AssertionError
    alone = tried(config_of(study_file, "arms=[{ rank = 8, lr = 1e20 }]"), tmp_path)
    assert "no arm is left (r8: loss is not finite" in alone.checks[-1].error


def test_pictures_that_cannot_be_used_are_told(study_file: Path, tmp_path: Path) -> None:
    pictures = write_parquet(tmp_path / "bad.parquet", [*make_pictures(2), *[(b"no picture", "text")] * 3])
    checks = tried(config_of(study_file, f"data.source={pictures}"), tmp_path)
    assert checks.checks[-1].name == "data"
    assert "3 of 5 rows" in checks.checks[-1].error


def test_a_source_that_holds_the_runs_is_refused_by_the_studys_own_folder(tmp_path: Path) -> None:
    config = load_study(preset="smoke", overrides=["data.source=."], environment={})
    refused = pytest.raises(ConfigError, match=r"^runs.smoke: the run folder lies in data\.source")
    with refused, preflight(config):
        pass


def test_a_check_out_of_memory_names_the_remedy_and_a_fault_is_none(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> str:
        raise MemoryError("of 3 TB")

    with preflight(config_of(study_file), tmp_path / "cache") as checks:
        check = checks._try("data", fail)
        assert check.error.startswith("the pictures can be used: not enough memory (of 3 TB): close other")
        with pytest.raises(ZeroDivisionError):
            checks._try("data", lambda: str(1 // 0))


def test_every_kind_of_arm_is_shortened_to_itself(study_file: Path) -> None:
    arms = (
        "arms=[{ rank = [4, 8], lr = 1e-3, epochs = 2 }, { rank = 4, scaling = 'rslora', alpha = 8 }, "
        "{ rank = 8, match_gain = 'r4-a4-lr0.001', seed = [1, 2] }, "
        "{ kind = 'tlora', rank = 8, min_rank = 2 }, { kind = 'full', lr = 1e-5 }, "
        "{ kind = 'lokr', rank = 4 }]"
    )
    config = config_of(study_file, arms)
    before = config.expand_arms()
    short = shortened(config, before)
    assert short.expand_arms() == tuple(
        arm.model_copy(update={"epochs": 1, "match_gain": None}) for arm in before
    )
    assert StudyConfig.model_validate(short.model_dump()) == short
    assert (short.data.num_train, short.train.epochs, short.trackers) == (4, 1, ())


def test_of_each_way_to_compute_the_largest_pass_is_tried(study_file: Path, tmp_path: Path) -> None:
    arms = "arms=[{ rank = [4, 8], lr = 1e-3 }, { rank = 4, batch_size = 2 }, { kind = 'lokr', rank = 4 }]"
    with preflight(config_of(study_file, arms), tmp_path / "cache") as checks:
        names = [arm.name for arm in largest_passes(checks.config, checks.study.base)]
        assert names == ["r4-lr0.001-b4", "r8-lr0.001-b4", "r4-lokr-lr0.0001-b4"]


def test_the_command_prints_lines_or_json_and_exits_as_the_study_would(
    study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preflight", str(study_file)]) == EXIT_DONE
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(WORDS) + 1
    assert lines[-1].startswith("tiny would run here: ")
    failing = ["preflight", str(study_file), "--json", "--set", "arms.0.lr=1e20"]
    assert main(failing) == EXIT_RUN_FAILED
    out, err = capsys.readouterr()
    *checks, whole = (json.loads(line) for line in out.splitlines())
    assert [check["ok"] for check in checks] == [True] * 4 + [False]
    assert whole["error"] == checks[-1]["error"] != ""
    assert err.splitlines()[-1] == f"lorascope: {whole['error']}"
    assert main(["preflight", str(study_file), "--set", "base.model=nowhere/at/all"]) == EXIT_INPUT


def test_a_line_says_what_was_found_how_long_it_took_and_how_much_memory() -> None:
    check = Check("data", "the pictures can be used", "3 looked at", 61.0, 2**20, "")
    assert check.as_line() == "ok      the pictures can be used: 3 looked at  (1 min 01 s, 1.0 MiB)"
