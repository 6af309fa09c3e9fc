"""Threads are limited for a while, and put back whatever happens meanwhile."""

import pytest
import torch

from lorascope.machine.threads import limited_threads


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with limited_threads(3):
        assert torch.get_num_threads() == 3
        with pytest.raises(ValueError, match="inside"), limited_threads(2):
            raise ValueError("inside")
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before
