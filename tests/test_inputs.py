"""What a run folder was made from: another configuration or other data is refused, and digests say why a
stage runs again.
"""

from pathlib import Path

import pytest

from lorascope.config import load_study
from lorascope.errors import ConfigError, StorageError
from lorascope.inputs import (
    data_inputs,
    diagnose_inputs,
    encode_inputs,
    freeze,
    merge_inputs,
    require_apart,
    require_same_data,
    sample_inputs,
    score_inputs,
    train_inputs,
)
from lorascope.run_folder import RunDir
from lorascope.schema import StudyConfig


def smoke(*overrides: str) -> StudyConfig:
    return load_study(preset="smoke", overrides=overrides, environment={})


def inputs_of(config: StudyConfig) -> dict[str, str]:
    trained = train_inputs(config, "fingerprint", "base", "cpu", "fp32")
    return {
        "data": data_inputs(config),
        "train": trained,
        "sample": sample_inputs(config, trained),
        "merge": merge_inputs(config, trained),
        "score": score_inputs(config, trained),
        "diagnose": diagnose_inputs(config, trained),
    }


def test_a_folder_keeps_the_configuration_it_began_with(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    freeze(run, smoke())
    first = run.study_toml.read_bytes()
    freeze(run, smoke())
    assert run.study_toml.read_bytes() == first
    with pytest.raises(ConfigError, match=r"train.epochs was \d+, now 99 and 1 more: choose another folder"):
        freeze(run, smoke("train.epochs=99", "sample.steps=7"))


@pytest.mark.parametrize("key", ["data.source", "base.model", "score.model", "score.style_model"])
@pytest.mark.parametrize(
    ("run", "read", "place"),
    [
        ("pictures/runs/a", "pictures", "lies in"),
        ("pictures", "pictures", "lies in"),
        ("link/runs/a", "pictures", "lies in"),
        ("run", "run/pictures", "holds"),
        ("run", "run/file", "holds"),
        ("run", "inner", "holds"),
    ],
)
def test_a_run_folder_and_what_is_read_stand_apart(
    key: str, run: str, read: str, place: str, tmp_path: Path
) -> None:
    for folder in ("pictures", "run/pictures"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "run" / "file").write_text("")
    (tmp_path / "link").symlink_to("pictures")
    (tmp_path / "inner").symlink_to("run/pictures")
    message = (
        rf"the run folder {place} {key} = '.*{read}', which the study reads: choose another folder with --run"
    )
    with pytest.raises(ConfigError, match=message):
        require_apart(RunDir(tmp_path / run), smoke(f"{key}={tmp_path / read}"))


def test_a_run_folder_may_lie_beside_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_text("")
    for source in (str(tmp_path / "data.parquet"), "owner/name", "pocket", "x" * 5000):
        require_apart(RunDir(tmp_path / "data.parquet-run"), smoke(f"data.source={source}"))
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ConfigError, match="a: cannot be followed .*check the path and its links"):
        require_apart(RunDir(tmp_path / "a"), smoke())


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("data.flip=true", {"data", "train", "sample", "merge", "score", "diagnose"}),
        ("train.warmup_steps=3", {"train", "sample", "merge", "score", "diagnose"}),
        ("sample.steps=7", {"sample", "merge", "score", "diagnose"}),
        ("score.resamples=100", {"score", "diagnose"}),
        ("diagnose.steps=7", {"diagnose"}),
        ("name=other", set()),
    ],
)
def test_stages_that_a_key_cannot_change_are_not_run_again(override: str, stages: set[str]) -> None:
    before, after = inputs_of(smoke()), inputs_of(smoke(override))
    assert {stage for stage in before if before[stage] != after[stage]} == stages


def test_training_depends_on_data_base_device_and_precision() -> None:
    facts = ("fingerprint", "base", "cpu", "fp32")
    first = train_inputs(smoke(), *facts)
    for place in range(len(facts)):
        other = (*facts[:place], "other", *facts[place + 1 :])
        assert train_inputs(smoke(), *other) != first
    assert encode_inputs("fingerprint", "base") != encode_inputs("fingerprint", "other")


def test_a_lost_data_json_is_not_replaced_by_other_data(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    require_same_data(run, smoke(), "any")  # before the first data stage there is nothing to be the same as
    run.finish("data", data_inputs(smoke()), 1.0, fingerprint="first")
    require_same_data(run, smoke(), "first")
    with pytest.raises(StorageError, match="have changed since: put either back"):
        require_same_data(run, smoke(), "second")
