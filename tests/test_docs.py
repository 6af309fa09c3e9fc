"""The documents are true: commands parse, study files load, links and named files exist."""

import re
import shlex
import shutil
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.faults.learn import SOURCE
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import lorascope
from lorascope.adapters.targets import resolve_section
from lorascope.arms import Arm
from lorascope.base.configs import read_configs
from lorascope.cli.app import app
from lorascope.config import preset_names
from lorascope.data.captions import MAX_CAPTION_BYTES, SPECIAL_TOKENS
from lorascope.data.repeats import MAX_REPEATS
from lorascope.diagnosis.signals import ArmSignals, PointSignals
from lorascope.diagnosis.thresholds import Thresholds
from lorascope.diagnosis.words import CAUSES, WORDS
from lorascope.schema import StudyConfig
from lorascope.sections import AdapterSection, BaseSection

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_lorascope_command_in_a_document_parses(path: Path) -> None:
    for block in [*blocks(path, ""), *blocks(path, "bash")]:
        for line in block.splitlines():
            if line.startswith("lorascope "):
                command = line.split("#")[0].split(">")[0]
                app.parse_args(shlex.split(command)[1:], exit_on_error=False, print_error=False)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_make_target_in_a_document_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"^make ([a-z]+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert used | set(re.findall(r"`make ([a-z]+)`", path.read_text(encoding="utf-8"))) <= targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_study_file_in_a_document_is_valid(path: Path) -> None:
    for block in blocks(path, "toml"):
        table = tomllib.loads(block)
        table.pop("preset", None)
        StudyConfig.model_validate(table)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_local_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_the_examples_of_the_library_page_run(
    study_file: Path, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(study_file, "my.toml")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sd15").symlink_to(pipeline_folder)
    names: dict[str, Any] = {}
    for block in blocks(ROOT / "docs" / "library.md", "python"):
        exec(block, names)
    assert names["report"].html_path.resolve() == tmp_path / "runs" / "mine" / "report.html"
    base, *adapted = names["noise"]
    assert len(adapted) == 2 and all(not torch.equal(row, base) for row in adapted)


def test_the_library_page_names_the_whole_public_face() -> None:
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)\(", page, re.MULTILINE)) == sorted(lorascope.__all__)


def test_the_layers_of_the_example_are_stable_diffusions() -> None:
    configs = read_configs(BaseSection(model=str(ROOT / "src" / "lorascope" / "base" / "sd15")))
    with torch.device("meta"):
        text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder"]))
        components = {"unet": UNet2DConditionModel.from_config(configs["unet"]), "text_encoder": text_encoder}
    [section] = [
        tomllib.loads(block)["adapter"]
        for block in blocks(ROOT / "docs" / "study-file.md", "toml")
        if "[[adapter.groups]]" in block
    ]
    targets = resolve_section(components, AdapterSection.model_validate(section))
    sizes = Counter((target.component, target.group.targets[0] if target.group else "") for target in targets)
    assert sizes == {("unet", ""): 160, ("unet", "proj_in"): 32 + 44, ("text_encoder", "q_proj"): 72}


def test_the_bounds_of_captions_and_repeats_are_those_of_the_code() -> None:
    text = " ".join((ROOT / "docs" / "data.md").read_text(encoding="utf-8").split())
    assert f"The number is from 1 to {MAX_REPEATS}." in text
    assert f"one of more than {MAX_CAPTION_BYTES:,} characters" in text
    assert all(SPECIAL_TOKENS.fullmatch(token) for token in re.findall(r"`(<\|.*?\|>)`", text))


def test_the_readme_names_every_preset() -> None:
    assert set(re.findall(r"^\| `([a-z-]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)) == set(
        preset_names()
    )


def test_the_readme_states_the_pocket_worlds_measured_quality() -> None:
    import json

    quality = json.loads((ROOT / "src" / "lorascope" / "pocket" / "quality.json").read_text())
    text = (ROOT / "README.md").read_text()
    for key in ("scorer_r1", "scorer_r5", "base_r1", "base_r5"):
        assert f"{quality[key]:.2f}" in text, key


DIAGNOSIS = (ROOT / "docs" / "diagnosis.md").read_text(encoding="utf-8")


def rows_of(section: str) -> list[str]:
    """The rows of a section's first table, whose first cell is in code."""
    text = DIAGNOSIS.split(f"\n## {section}\n")[1].split("\n## ")[0].strip()
    table = next(block for block in text.split("\n\n") if block.startswith("|"))
    return [line for line in table.splitlines() if line.startswith("| `")]


def test_the_page_on_diagnosis_has_the_thresholds_of_the_code() -> None:
    table = Thresholds().as_table()
    assert rows_of("The thresholds") == [
        f"| `{key}` | {item.name} | {item.value:g} | {item.unit} | {item.source} |"
        for key, item in table.items()
    ]


def test_the_page_on_diagnosis_has_every_signal() -> None:
    arm = Arm(name="r4", rank=4, alpha=4.0, lr=1e-4, seed=0)
    point = PointSignals("last", 1.0)
    signals = {
        **{key: getattr(point, key) for key in ("retention", "style", "discrepancy")},
        **ArmSignals(arm).by_key(),
    }
    assert rows_of("The signals") == [
        f"| `{key}` | {signal.name} | {signal.unit} |" for key, signal in signals.items()
    ]


def test_the_page_on_diagnosis_has_every_cause_and_names_only_signals_that_exist() -> None:
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows_of("The causes")]
    assert [(row[0], row[1]) for row in rows] == [(f"`{cause}`", WORDS[cause]) for cause in CAUSES]
    known = {row.split("`")[1] for row in rows_of("The signals")}
    assert all(set(re.findall(r"`(\w+)`", row[3])) <= known for row in rows)
    asked = re.findall(r"^\| \d+ \|.*\| `(\w+)` \|$", DIAGNOSIS, re.MULTILINE)
    assert len(asked) == 11 and set(asked) == set(CAUSES)


def test_the_page_on_diagnosis_says_whether_faults_were_planted() -> None:
    """Learnt thresholds and the table of what was found come from the same run."""
    is_learnt = any(item.source == SOURCE for item in Thresholds().as_table().values())
    assert ("**Run so far: " in DIAGNOSIS) != is_learnt
