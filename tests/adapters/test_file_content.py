"""What a weight file holds: the same from a safetensors file and from a torch archive."""

from pathlib import Path

import pytest
import torch

from adapter_files import kohya, write
from lorascope.adapters.file_content import open_content
from lorascope.errors import WeightsError


def test_header_and_archive_say_the_same(tmp_path: Path) -> None:
    tensors = kohya(alpha=torch.tensor(2.0))
    torch.save(tensors, tmp_path / "file.pt")
    header = open_content(write(tmp_path / "file.safetensors", tensors, {"ss_network_dim": "2"}))
    archive = open_content(tmp_path / "file.pt")
    assert header.shapes == archive.shapes == {name: tuple(value.shape) for name, value in tensors.items()}
    assert header.num_parameters == archive.num_parameters == 2 * 2 * 6 + 1
    # the alpha, a single number, is not counted
    assert (header.dtypes, archive.dtypes) == ({"fp32": 2}, {"float32": 2})
    assert (header.metadata, archive.metadata) == ({"ss_network_dim": "2"}, {})
    for content in (header, archive):
        read = content.tensors(tensors)
        assert all(torch.equal(read[name], value) for name, value in tensors.items())


def test_what_is_no_weight_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"no weights")
    with pytest.raises(WeightsError):
        open_content(path)
