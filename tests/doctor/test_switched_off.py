"""What is wrong on a device is not used by a study there."""

from pathlib import Path

import pytest
import torch

from conftest import make_study
from lorascope import study as study_module
from lorascope.base.attention import AttentionProcessor
from lorascope.base.autoencoder import Autoencoder
from lorascope.doctor import examination
from lorascope.doctor.examination import Subject
from lorascope.doctor.findings import Examination, Finding
from lorascope.machine.fast_paths import ALL_PATHS, FastPaths
from lorascope.study import Study

GPU = torch.device("cuda", 0)
WRONG = (
    Finding("attention sdpa", "wrong", "gradient of key, 64x77", 0.3, 0.02),
    Finding("channels_last", "wrong", "gradients", 0.5, 0.1),
    Finding("recorded step", "wrong", "step 2", 0.9, 0.1),
    Finding("half-precision VAE", "overflow", "3 of 6 batches are beyond float16"),
    Finding("attention plain", "ok", "", 0.001, 0.02),
)


def test_on_a_gpu_a_study_asks_the_doctor_and_warns(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[Subject] = []

    def examine(subject: Subject) -> Examination:
        asked.append(subject)
        return Examination("tiny", {}, WRONG)

    monkeypatch.setattr(study_module, "recall_or_examine", examine)
    study = make_study(study_file, tmp_path / "run")
    study.device = GPU
    none = FastPaths(frozenset({"sdpa"}), channels_last=False, recorded_step=False, half_vae=False)
    assert study.fast_paths == none
    assert asked == [Subject(study.config.base, GPU, "auto", 32)]
    for finding in WRONG[:4]:
        assert f"{finding.as_line()}: not used in this run" in caplog.text
    assert "attention plain" not in caplog.text


def test_on_a_cpu_nothing_is_checked(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_module, "recall_or_examine", None)
    assert make_study(study_file, tmp_path / "run").fast_paths == ALL_PATHS


def test_what_is_wrong_is_switched_off_for_the_run(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention falls back to the formula, the step and the VAE to what they are without shortcuts."""
    found = Examination("tiny", {}, WRONG).fast_paths
    monkeypatch.setattr(Study, "fast_paths", found)
    study = make_study(study_file, tmp_path / "run")
    with study.working("test"):
        study.prepare_data()
        material = study.material
    assert study.config.train.cuda_graph and not material.config.train.cuda_graph
    assert material.config.model_copy(update={"train": study.config.train}) == study.config
    for processor in study.base.unet.attn_processors.values():
        assert isinstance(processor, AttentionProcessor) and processor.barred == {"sdpa"}
    on_gpu = study_module.replace(study.base, device=GPU)
    assert Autoencoder(on_gpu).dtype == torch.float32
    assert Autoencoder(study_module.replace(on_gpu, half_vae=True)).dtype == torch.float16


def test_the_first_start_examines_and_the_next_one_recalls(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lorascope.sections import BaseSection

    caplog.set_level("INFO", "lorascope")
    subject = Subject(BaseSection(model=str(pipeline_folder)), torch.device("cpu"))
    monkeypatch.setattr(examination, "check_channels_last", lambda base, shape: WRONG[1])
    first = examination.recall_or_examine(subject)
    assert caplog.text.count("first start on this device with these versions") == 1
    assert first.fast_paths == FastPaths(channels_last=False)
    assert examination.recall_or_examine(subject) == first
    assert caplog.text.count("first start on this device with these versions") == 1
