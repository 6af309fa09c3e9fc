"""A whole study: read again from its file, and its digest."""

from pathlib import Path

from lorascope.schema import StudyConfig
from lorascope.store import digest_json
from studies import study


def test_a_study_of_matched_arms_is_the_same_when_its_file_is_read_again(tmp_path: Path) -> None:
    config = study('arms=[{rank=16, lr=1e-3}, {rank=64, match_gain="r16", scaling="rslora"}]')
    path = tmp_path / "study.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert study(path=path) == config
    assert StudyConfig.model_validate(config.model_dump(mode="json")) == config


def test_the_digest_covers_what_changes_a_result() -> None:
    config = study()
    assert config.digest() == study("name=other").digest()
    assert config.digest() != study("train.epochs=5").digest()
    assert config.digest("data", "base") == study("train.epochs=5").digest("data", "base")
    assert config.digest("train") != study("train.epochs=5").digest("train")


def test_a_key_that_came_later_changes_no_digest_at_its_default() -> None:
    values = study().model_dump(mode="json")["data"]
    assert values.pop("folder_repeats") is True
    assert study().digest("data") == digest_json({"data": values})
    arms = study().model_dump(mode="json")["arms"]
    for table in arms:
        later = {"scaling": "alpha/r", "init": "kaiming", "lr_ratio": 1.0, "max_weight_norm": None}
        later |= {"kind": "lora", "min_rank": None, "mask_exponent": 1.0, "mask_when": "always"}
        later |= {"layers": ["*"], "rank_dropout": 0.0}
        assert {key: table.pop(key) for key in later} == later
        if table["match_gain"] is None:
            del table["match_gain"]
    assert study().digest("arms") == digest_json({"arms": arms})
    assert study("arms.0.scaling=rslora").digest("arms") != study().digest("arms")
    assert study("data.folder_repeats=false").digest("data") == digest_json(
        {"data": {**values, "folder_repeats": False}}
    )
    diagnose = study().model_dump(mode="json")["diagnose"]
    later = [diagnose.pop(key) for key in ("scale_intruders", "cut_rank", "num_intervention_prompts")]
    assert later == [True, True, 12] and study().digest("diagnose") == digest_json({"diagnose": diagnose})
    score = study().model_dump(mode="json")["score"]
    assert score.pop("style_model") is None
    assert study().digest("score") == digest_json({"score": score})
