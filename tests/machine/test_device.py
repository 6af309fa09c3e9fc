"""Choosing a device: a GPU that is not there or does not work is not taken."""

import pytest
import torch

from lorascope.errors import BaseModelError
from lorascope.machine.device import _tried, choose_device

CPU = torch.device("cpu")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BaseModelError, match="torch sees no GPU"):
        choose_device("cuda")
    assert choose_device("auto") == CPU


def test_an_apple_gpu_is_tried_before_it_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Here trying it fails, as on a system whose torch lacks what is needed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(
        BaseModelError, match=r'device = "mps": does not work here \(.*\): use device = "cpu"'
    ):
        choose_device("mps")
    with caplog.at_level("WARNING", "lorascope"):
        assert choose_device("auto") == CPU
    assert "the Apple GPU is left aside" in caplog.text
    assert _tried(CPU) == CPU, "what is tried is nothing that a device may refuse"
