"""Presets say what they are, and the documentation says what is true of them and of the keys."""

import os
import re
from pathlib import Path

import pytest

from lorascope.config import load_study, preset_names, preset_text
from lorascope.reference import reference_table
from lorascope.schema import StudyConfig
from lorascope.sections import REFERENCE_TARGETS

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "study-file.md"
PRESETS = preset_names()
UPDATE = os.environ.get("UPDATE_DOCS") == "1"


def load(preset: str) -> StudyConfig:
    return load_study(preset=preset, environment={})


def first_line(preset: str) -> str:
    return preset_text(preset).splitlines()[0]


def between_markers(name: str, expected: str) -> str:
    """What stands in the document between two markers; `UPDATE_DOCS=1` puts the expected text there first."""
    pattern = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", re.DOTALL)
    text = DOCUMENT.read_text(encoding="utf-8")
    if UPDATE:
        text = pattern.sub(lambda _: expected, text)
        DOCUMENT.write_text(text, encoding="utf-8")
    found = pattern.search(text)
    assert found is not None
    return found[0]


def test_the_documents_table_of_keys_is_the_schemas() -> None:
    assert between_markers("keys", reference_table()) == reference_table()


def test_the_documents_list_of_presets_is_the_packages() -> None:
    rows = "".join(f"| `{preset}` | {first_line(preset).removeprefix('# ')} |\n" for preset in PRESETS)
    expected = f"| preset | what it is |\n|---|---|\n{rows}"
    assert between_markers("presets", expected) == expected


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")], ids=lambda path: path.name)
def test_presets_named_in_the_documentation_exist(path: Path) -> None:
    named = re.findall(
        r"(?:--preset |lorascope presets |preset = \")([a-z][\w-]*)", path.read_text(encoding="utf-8")
    )
    assert set(named) <= {*PRESETS}


def test_studies_in_the_document_can_be_loaded(tmp_path: Path) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    names = []
    for block in (block for block in blocks if "[[arms]]" in block):
        (tmp_path / "my.toml").write_text(block, encoding="utf-8")
        names.append([arm.name for arm in load_study(tmp_path / "my.toml", environment={}).expand_arms()])
    seeds = [f"r{rank}-lr0.0001-s{seed}" for rank in (16, 64) for seed in (0, 1, 2)]
    gained = [f"r{rank}-s{seed}" for rank in (16, 64) for seed in (0, 1, 2)]
    gained += [f"r64-gain-r16-s{seed}" for seed in (0, 1, 2)]
    assert names == [["r4", "r16", "r64"], [*seeds, "low-lr"], gained]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_named_after_its_file_and_says_what_it_is_in_its_first_line(preset: str) -> None:
    assert load(preset).name == preset
    line = first_line(preset)
    assert re.fullmatch(r"# [A-Z].*\.", line), "one whole sentence: `lorascope presets` prints it"
    assert len(line) <= 120


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_named_in_a_presets_comments_exists(preset: str) -> None:
    for name in re.findall(r"`((?:paper|pocket|smoke|recommended)[\w-]*)`", preset_text(preset)):
        assert name in PRESETS


def arms(preset: str) -> list[tuple[int, float, float, int]]:
    return [(arm.rank, arm.alpha, arm.lr, arm.seed) for arm in load(preset).expand_arms()]


def test_paper_is_the_reference_studys_protocol() -> None:
    config = load("paper")
    assert config.base.model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert (config.data.source, config.data.num_train, config.data.resolution_px) == (
        "Norod78/cartoon-blip-captions",
        1500,
        512,
    )
    assert config.adapter.targets == REFERENCE_TARGETS
    assert arms("paper") == [(16, 32.0, 5e-4, 0), (64, 128.0, 5e-4, 0)]
    assert (config.train.epochs, config.train.batch_size, config.train.betas) == (10, 4, (0.9, 0.999))
    assert (config.train.warmup_steps, config.train.max_grad_norm, config.train.caption_dropout) == (
        0,
        0.0,
        0.0,
    )
    assert (config.sample.steps, config.sample.guidance, config.sample.prompts) == (30, 7.5, "sd15")


def test_paper_as_run_differs_from_paper_in_one_target_only() -> None:
    paper, as_run = load("paper").model_dump(), load("paper-as-run").model_dump()
    assert set(paper["adapter"]["targets"]) - set(as_run["adapter"]["targets"]) == {"ff.net.0.proj"}
    for values in (paper, as_run):
        del values["name"], values["adapter"]
    assert paper == as_run


def test_pocket_full_has_the_protocol_of_paper_on_the_pocket_world() -> None:
    paper, full = load("paper"), load("pocket-full")
    assert (full.train, full.adapter) == (paper.train, paper.adapter)
    assert arms("pocket-full") == [(*setting, seed) for *setting, _ in arms("paper") for seed in (0, 1, 2)]
    assert full.data.num_train == 1500
    assert {full.base.model, full.data.source, full.sample.prompts, full.score.model} == {"pocket"}


def test_pocket_has_the_reference_studys_ranks_and_alpha_and_rank_64_at_the_gain_of_rank_16() -> None:
    r16, r64, matched = arms("pocket")
    assert [r16[:2], r64[:2]] == [arm[:2] for arm in arms("paper")]
    assert r16[2] == r64[2]
    assert matched[:2] == r64[:2] and matched[2] == pytest.approx(r16[2] / 2)


def test_paper_explained_is_paper_with_gain_and_learning_rate_apart_from_rank() -> None:
    paper, explained = load("paper"), load("paper-explained")
    assert (explained.adapter, explained.data, explained.base) == (paper.adapter, paper.data, paper.base)
    assert explained.train == paper.train
    gains = [(arm.rank, arm.lr * arm.scale * arm.rank**0.5) for arm in explained.expand_arms()[::3]]
    published = {rank: 5e-4 * 2 * rank**0.5 for rank in (16, 64)}
    assert gains[:2] == [(16, pytest.approx(published[16])), (64, pytest.approx(published[64]))]
    assert gains[2:4] == [(64, pytest.approx(published[16])), (16, pytest.approx(published[64]))]
    assert [arm.seed for arm in explained.expand_arms()] == [0, 1, 2] * 6


def test_recommended_is_what_its_comment_says() -> None:
    config = load("recommended")
    expanded = config.expand_arms()
    assert len({arm.rank for arm in expanded}) == 5
    assert {arm.alpha for arm in expanded} == {16.0}
    assert {arm.seed for arm in expanded} == {0, 1, 2}
    assert len(expanded) == 15
    assert min(config.train.warmup_steps, config.train.max_grad_norm, config.train.caption_dropout) > 0


def test_smoke_is_small() -> None:
    config = load("smoke")
    assert (config.data.num_train or 0) * config.train.epochs <= 64
    assert (config.sample.num_prompts or 99) * len(config.sample.seeds) <= 4
