"""Studies of several kinds of adapter: trained, resumed, exported, read back, drawn and diagnosed."""

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from benchmarks.memorization import main as memorization

from conftest import digests, make_study, run_unreported
from forked import run_forked
from lorascope.adapters.files import load_adapter
from lorascope.adapters.modules import FullModule
from lorascope.adapters.schedule import RankSchedule
from lorascope.base.loading import load_base
from lorascope.cli.app import main
from lorascope.config import load_study
from lorascope.sections import BaseSection
from lorascope.store import read_json
from lorascope.study import Study

ARMS = (
    'arms=[{rank=4, lr=1e-3}, {rank=4, lr=1e-3, kind="tlora"}, '
    '{rank=4, lr=1e-3, kind="tlora", min_rank=1, mask_when="training"}, {rank=4, lr=1e-3, kind="dora"}, '
    '{rank=4, lr=1e-3, kind="tlora", init="random-svd", name="published"}, '
    '{rank=4, lr=1e-3, init="pissa", name="pissa"}, {rank=4, lr=1e-3, kind="loha"}, '
    '{rank=2, lr=1e-3, kind="lokr"}, {kind="full", lr=1e-4}]'
)
LORA, MASKED, IN_TRAINING, DORA, PUBLISHED, PISSA, LOHA, LOKR, FULL = NAMES = (
    "r4",
    "r4-tlora-min2",
    "r4-tlora-min1-masked-training",
    "r4-dora",
    "published",
    "pissa",
    "r4-loha",
    "r2-lokr",
    "full",
)


@pytest.fixture(scope="module")
def kinds(study_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("kinds") / "run"
    make_study(study_file, run, ARMS, "sample.prompts=captions", "sample.num_prompts=3").run()
    return run


def test_kinds_whose_algebra_is_one_are_trained_in_one_pass(kinds: Path) -> None:
    facts = {name: read_json(kinds / "adapters" / name / "training.json") for name in NAMES}
    assert all(fact["failed"] is None for fact in facts.values())
    groups = {tuple(fact["group"]) for fact in facts.values()}
    assert groups == {
        (LORA, MASKED, IN_TRAINING),
        (DORA,),
        (PUBLISHED, PISSA),
        (LOKR, LOHA),
        (FULL,),
    }
    assert facts[FULL]["parameters"] > 10 * facts[LORA]["parameters"] == 10 * facts[PISSA]["parameters"]
    assert facts[DORA]["parameters"] > facts[LORA]["parameters"] == facts[MASKED]["parameters"]
    assert [(fact["kind"], fact["min_rank"], fact["mask_when"]) for fact in facts.values()] == [
        ("lora", None, "always"),
        ("tlora", 2, "always"),
        ("tlora", 1, "training"),
        ("dora", None, "always"),
        ("tlora", 2, "always"),
        ("lora", None, "always"),
        ("loha", None, "always"),
        ("lokr", None, "always"),
        ("full", None, "always"),
    ]


def test_an_arm_in_company_learns_what_it_learns_alone(study_file: Path, kinds: Path, tmp_path: Path) -> None:
    study = make_study(study_file, tmp_path / "run", ARMS, "train.max_stacked_arms=1")
    with study.working("test"):
        for stage in (study.prepare_data, study.encode, study.train):
            stage()

    def losses(run: Path, arm: str) -> list[float]:
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [record["loss"] for record in records if record["arm"] == arm and record["kind"] == "train"]

    for name in NAMES:
        # The loss hardly depends on the adapter: ten steps of AdamW may differ by 1e-4 of the norm.
        assert losses(tmp_path / "run", name) == pytest.approx(losses(kinds, name), rel=1e-4)
    assert len({tuple(losses(kinds, name)) for name in NAMES}) == len(NAMES)


def test_files_hold_what_their_kind_allows(kinds: Path) -> None:
    adapters = [load_adapter(kinds / "adapters" / name) for name in NAMES]
    schedules = {name: adapter.schedule for name, adapter in zip(NAMES, adapters, strict=True)}
    assert {name: found for name, found in schedules.items() if found} == {
        MASKED: RankSchedule(4, 2),
        PUBLISHED: RankSchedule(4, 2, halves=True),
    }
    kinds_of = [{module.kind for module in adapter.modules.values()} for adapter in adapters]
    assert kinds_of == [{"lora"}] * 6 + [{"loha"}, {"lokr"}, {"full"}]
    with_magnitudes = [
        any(module.dora_scale is not None for module in adapter.modules.values()) for adapter in adapters
    ]
    assert with_magnitudes == [name == DORA for name in NAMES]
    files = [[path.name for path in (kinds / "adapters" / name).glob("tiny-*")] for name in NAMES]
    assert files == [[] if name in (MASKED, PUBLISHED) else [f"tiny-{name}.safetensors"] for name in NAMES]
    assert (
        f"export   {MASKED}: no kohya file: T-LoRA: 2 to 4 components act"
        in (kinds / "lorascope.log").read_text()
    )
    merges = read_json(kinds / "merge_check.json")
    assert list(merges) == [name for name in NAMES if name not in (MASKED, PUBLISHED)]
    assert all(result["ok"] for result in merges.values())


def test_every_kind_is_diagnosed_and_reported(kinds: Path) -> None:
    found = read_json(kinds / "diagnosis.json")["arms"]
    assert list(found) == list(NAMES)
    assert [item["settings"]["kind"] for item in found.values()][-3:] == ["loha", "lokr", "full"]
    files = {name: item["signals"]["file_ok"]["value"] for name, item in found.items()}
    assert files == {name: None if name in (MASKED, PUBLISHED) else 1 for name in NAMES}
    measured = {name for name, item in found.items() if item["signals"]["norm_ratio"]["value"] is not None}
    assert measured == {*NAMES} - {DORA}
    edited = {path.parent.name for path in (kinds / "sweep").glob("*/*") if "intruders" in path.name}
    assert edited == {LORA, IN_TRAINING, PISSA}
    cuts = {path.name for path in (kinds / "sweep" / FULL).iterdir() if "cut" in path.name}
    assert cuts == {"last-s1.00-g7.5-cut-to-r2", "last-s1.00-g7.5-cut-to-r4"}
    text = (kinds / "report.md").read_text()
    assert f"{MASKED}, {PUBLISHED}: T-LoRA, which has no merged weights." in text
    assert "| kind |" in text and "tlora" in text and "min rank" in text
    low_ranks = text[text.index("What low ranks keep of full fine-tuning") :]
    rows = [line.split(" | ")[1] for line in low_ranks.splitlines() if line.startswith("| full |")]
    assert rows == ["all of it", "cut to rank 4", "cut to rank 2"]


def test_export_asks_before_it_writes_another_kind(
    kinds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(kinds), "--arm", MASKED, "--out", str(tmp_path / "a.safetensors")]
    assert main(command) == 2
    assert "write peft, or with --as-lora what they would use" in capsys.readouterr().err
    assert main([*command, "--as-lora"]) == 0
    assert "T-LoRA written as LoRA: all components act at every timestep" in capsys.readouterr().err
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert adapter.schedule is None and {module.rank for module in adapter.modules.values()} == {4}
    folder = str(kinds / "adapters" / MASKED)
    assert main(["convert", folder, str(tmp_path / "b.safetensors"), "--as-lora"]) == 0
    assert main(["inspect", folder]) == 4  # it is of the tiny base
    shown = " ".join(capsys.readouterr().out.split())
    assert "T-LoRA: of 4 components 2 act at the last timestep" in shown


def _killed_in_the_second_epoch(study_file: Path, run: Path, cache: Path) -> None:
    import os

    from lorascope.training.feed import Feed

    original = Feed.load

    def load(self: Feed, number: int) -> object:
        if number == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, number)

    Feed.load = load  # type: ignore[assignment, method-assign]
    Study(load_study(study_file, environment={}), run, cache_dir=cache).run()


def test_a_killed_study_of_kinds_goes_on_to_the_same_bytes(
    study_file: Path, kinds: Path, tmp_path: Path
) -> None:
    cache = study_file.parent / "cache"
    killed = run_forked(_killed_in_the_second_epoch, kinds / "study.toml", tmp_path / "run", cache)
    assert killed.exit_code == -signal.SIGKILL, killed.stderr[-2000:]
    study = Study(load_study(kinds / "study.toml", environment={}), tmp_path / "run", cache_dir=cache)
    run_unreported(study)
    assert "going on from step" in (tmp_path / "run" / "lorascope.log").read_text()
    assert digests(tmp_path / "run") == digests(kinds)


def test_what_was_memorized_is_told_by_kind(
    kinds: Path, study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert memorization([str(kinds), "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "memorization.md").read_text().splitlines()
    assert len(lines) == 2 + 1 + len(NAMES) and lines[2].split(" | ")[2] == "the base"
    assert [line.split(" | ")[2] for line in lines[3:5]] == ["lora r4", "tlora r4"]
    assert lines[-1].split(" | ")[2] == "full"
    assert all(re.search(r"\| \d+ % \| \d+ % \| \d+ % \|", line) for line in lines[2:])
    assert (tmp_path / "memorization.png").stat().st_size > 10_000


@pytest.mark.parametrize("layout", ["merged-diffusers", "merged-ldm"])
def test_full_fine_tuning_leaves_as_a_whole_model(kinds: Path, tmp_path: Path, layout: str) -> None:
    config = load_study(kinds / "study.toml", environment={})
    out = tmp_path / ("model" if layout == "merged-diffusers" else "model.safetensors")
    command = ["export", str(kinds), "--arm", FULL, "--format", layout, "--dtype", "fp32", "--out", str(out)]
    assert main(command) == 0
    tuned, base = (
        load_base(BaseSection(model=str(model)), torch.device("cpu"), "fp32").unet.state_dict()
        for model in (out, config.base.model)
    )
    modules = load_adapter(kinds / "adapters" / FULL).modules
    assert len(modules) > 100
    for path, module in modules.items():
        assert isinstance(module, FullModule)
        name = path.removeprefix("unet.")
        assert torch.equal(tuned[f"{name}.weight"], base[f"{name}.weight"] + module.weight)
        if module.bias is not None:
            assert torch.equal(tuned[f"{name}.bias"], base[f"{name}.bias"] + module.bias)
    moved = sum(not torch.equal(tuned[name], base[name]) for name in base)
    assert moved > 0.9 * len(base)
