"""Weight files: hostile ones are refused in bounded memory and time and nothing runs, ours are the same bytes
every time.
"""

import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lorascope.base.weights import (
    Header,
    TensorInfo,
    load_sealed,
    load_tensors,
    read_header,
    require_finite,
    save_sealed,
    save_tensors,
)
from lorascope.errors import StorageError, WeightsError


def write(path: Path, header: Any, data: bytes = b"", claimed: int | None = None) -> Path:
    """A safetensors file with this header, as an object or as text."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if claimed is None else claimed) + text + data)
    return path


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_a_header_is_read_without_the_data(tmp_path: Path) -> None:
    tensors = {
        "a": torch.ones(2, 3),
        "b": torch.zeros(0, 4, dtype=torch.float16),
        "c": torch.tensor(1.5, dtype=torch.bfloat16),
    }
    safetensors.torch.save_file(tensors, path := tmp_path / "file.safetensors", metadata={"format": "pt"})
    header = read_header(path)
    assert header.tensors == {
        "a": TensorInfo("F32", (2, 3), 24),
        "b": TensorInfo("F16", (0, 4), 0),
        "c": TensorInfo("BF16", (), 2),
    }
    assert (header.path, header.metadata, header.header_bytes) == (
        path,
        {"format": "pt"},
        path.stat().st_size - 26,
    )


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 4, [1]), "b": entry(2, 6, [1])}, 6, "'b' overlaps"),
        ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, 12, "'b' follows a gap"),
        ({"a": entry(0, 4, [1])}, 9, "5 bytes at the end"),
        ({"a": entry(0, 4, [1])}, 3, "outside the file"),
        ({"a": entry(4, 0, [1])}, 8, "outside the file"),
        ({"a": entry(0, 8, [1])}, 8, "has 8 bytes, but F32 .1. needs 4"),
        ({"a": entry(0, 4, [2**40, 2**40])}, 4, "needs"),
        ({"a": entry(0, 4, [-1])}, 4, "no valid shape"),
        ({"a": entry(0, 4, [1] * 40)}, 4, "no valid shape"),
        ({"a": entry(0, 4, [True])}, 4, "no valid shape"),
        ({"a": entry(0, 4, [1], "F33")}, 4, "unknown dtype 'F33'"),
        ({"a": {"dtype": "F32"}}, 0, "lacks dtype, shape or two data_offsets"),
        ({"a": 1}, 0, "lacks dtype"),
        ({"__metadata__": {"a": 1}}, 0, "must map strings to strings"),
        ('{"a":{},"a":{}}', 0, "'a' stands there more than once"),
        ('{"__metadata__":{"k":"1","k":"2"}}', 0, "'k' stands there more than once"),
        ("[" * 100_000, 0, "damaged"),
        ('{"a":' * 100_000, 0, "damaged"),
        ("{", 0, "damaged"),
        ('{"\\ud800":{}}', 0, "damaged"),
        ("[]", 0, "a list, not an object"),
        ('{"a":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,4]}}', 4, "damaged"),
    ],
)
def test_a_lying_header_is_refused(tmp_path: Path, header: Any, data: int, message: str) -> None:
    path = write(tmp_path / "file.safetensors", header, bytes(data))
    with pytest.raises(WeightsError, match=message):
        read_header(path)
    with pytest.raises(WeightsError, match=message):
        load_tensors(path)


def test_a_header_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (path := tmp_path / "file.safetensors").write_bytes(struct.pack("<Q", 4) + b'{"\xff"')
    with pytest.raises(WeightsError, match="damaged"):
        read_header(path)


def test_huge_claims_cost_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    tracemalloc.start()
    for claimed in (2**63, 10**12, 99_000_000):
        with pytest.raises(WeightsError, match="truncated or no safetensors file"):
            read_header(write(path, {}, claimed=claimed))
    with path.open("r+b") as file:
        file.truncate(8 + 200_000_000)  # a sparse file
        file.write(struct.pack("<Q", 150_000_000))
    with pytest.raises(WeightsError, match="at most 100,000,000 are read"):
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 60, 150])
def test_a_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    safetensors.torch.save_file(
        {"a": torch.ones(20), "b": torch.ones(3)}, path := tmp_path / "file.safetensors"
    )
    os.truncate(path, length)
    with pytest.raises(WeightsError, match="truncated|empty|outside the file"):
        load_tensors(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n <html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"GGUF" + bytes(20), "GGUF"),
        (pickle.dumps({"a": 1}), "Python pickle"),
        (b"PK\x03\x04" + bytes(30), "zip archive"),
    ],
)
def test_what_else_a_file_may_be_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    (path := tmp_path / "file.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        load_tensors(path)


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    for name in ("absent.safetensors", "absent.ckpt"):
        with pytest.raises(WeightsError, match="cannot be read .No such file"):
            load_tensors(tmp_path / name)
    with pytest.raises(WeightsError, match="is a folder, where a file is needed"):
        read_header(tmp_path)
    for name in ("pipe.safetensors", "pipe.ckpt"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(WeightsError, match="is a named pipe, where a file is needed: name a file"):
            load_tensors(tmp_path / name)


def test_headers_of_any_length_are_no_pickles(tmp_path: Path) -> None:
    for length in (0x0280, 0x010280, 0x050480):  # lengths whose first bytes are those of a pickle
        path = write(tmp_path / "file.safetensors", "{}".ljust(length))
        assert read_header(path).tensors == {}


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64],
)
def test_tensors_of_every_dtype_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(6).reshape(2, 3).to(dtype)
    save_tensors(path := tmp_path / "file.safetensors", {"a": values, "b": torch.ones(1)}, {})
    loaded = load_tensors(path, ["a"])
    assert (
        list(loaded) == ["a"]
        and loaded["a"].dtype == dtype
        and torch.equal(loaded["a"].float(), values.float())
    )
    require_finite(loaded, path)


def test_packed_dtypes_and_absent_names_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "file.safetensors", {"a": entry(0, 3, [4], "F6_E2M3")}, bytes(3))
    with pytest.raises(WeightsError, match="stored as F6_E2M3, which cannot be read"):
        load_tensors(path)
    with pytest.raises(WeightsError, match="lacks 1 of the tensors asked for, the first is 'b'"):
        load_tensors(path, ["b"])


def test_a_file_cut_while_it_is_read_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_and_cut(path: Path) -> Header:
        header = read_header(path)
        os.truncate(path, header.header_bytes)
        return header

    path = write(tmp_path / "file.safetensors", {"a": entry(0, 4, [1])}, bytes(4))
    monkeypatch.setattr("lorascope.base.weights.read_header", read_and_cut)
    with pytest.raises(WeightsError, match="cannot be read"):
        load_tensors(path)


# -- pickles -------------------------------------------------------------------------------------------------


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def archive(path: Path, instructions: bytes, compression: int = zipfile.ZIP_STORED, **data: bytes) -> Path:
    """A torch zip archive with a pickle of our own making."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", instructions)
        file.writestr("archive/byteorder", "little")
        for name, content in data.items():
            file.writestr(f"archive/data/{name}", content)
        file.writestr("archive/version", "3\n")
    return path


def global_call(name: str, argument: bytes) -> bytes:
    """Instructions that call a global with one argument."""
    return b"\x80\x02c" + name.replace(".", "\n").encode() + b"\n" + argument + b"\x85R."


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".CKPT"])
def test_a_checkpoint_passes_the_weights_only_loader(tmp_path: Path, suffix: str) -> None:
    weights = {
        "a": torch.randn(4, 4),
        "b": torch.nn.Parameter(torch.ones(2).half()),
        "c": torch.ones(3).to(torch.float8_e4m3fn),
    }
    torch.save(
        {"state_dict": weights, "global_step": 470000, "epoch": 1}, path := tmp_path / f"nested{suffix}"
    )
    loaded = load_tensors(path)
    assert list(loaded) == ["a", "b", "c"] and all(
        torch.equal(loaded[name].float(), weights[name].float()) for name in weights
    )
    assert type(loaded["b"]) is torch.Tensor
    torch.save(weights, path)
    assert list(load_tensors(path, ["b"])) == ["b"]


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path: Path, suffix: str) -> None:
    mark = tmp_path / "it-ran"
    torch.save(
        {"state_dict": {"a": torch.ones(2)}, "callbacks": Payload(mark)}, path := tmp_path / f"bad{suffix}"
    )
    with pytest.raises(
        WeightsError,
        match=r"posix\.mkdir.*nothing was run: convert it" if suffix == ".ckpt" else "zip archive",
    ):
        load_tensors(path)
    plain = pickle.dumps(Payload(mark), protocol=2)
    path.write_bytes(plain)
    with pytest.raises(WeightsError, match="Python pickle: it is not opened"):
        load_tensors(path)
    assert not mark.exists()
    pickle.loads(plain)
    assert mark.exists()  # the payload does work


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        (pickle.dumps(Payload(Path("/nowhere")), protocol=4), "a global named as it runs"),
        (
            global_call("builtins.bytearray", b"\x8a\x06" + (2**40).to_bytes(6, "little")),
            "builtins.bytearray",
        ),
        (global_call("torch.Tensor", b"\x8a\x06" + (2**40).to_bytes(6, "little")), "torch.Tensor"),
        (b"(ios\nmkdir\n.", "os.mkdir"),
        (b"\x80\x02\x82\x01.", "a global named as it runs"),
        (b"\x80\x02", "damaged"),
        (b"\x8b\xff\xff\xff\x7f", "damaged"),
        (b"\x80\x02}.", "holds no weights by name, but nothing"),
        (pickle.dumps([1], protocol=2), "holds no weights by name, but list"),
        (pickle.dumps({"string_to_param": {}}, protocol=2), "holds no weights by name, but string_to_param"),
        (b"\x80\x02a.", "cannot be read as weights"),
    ],
)
def test_pickles_that_ask_for_more_than_tensors_are_refused(
    tmp_path: Path, instructions: bytes, message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        load_tensors(archive(tmp_path / "bad.ckpt", instructions))


def storage_pickle(elements: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """The pickle of {"a": a tensor of this shape over a storage of so many floats}."""

    class Stored:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor_v2, (Reference(), 0, shape, stride, False, {})

    class Reference:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return (
                ("storage", torch.FloatStorage, "0", "cpu", elements) if isinstance(obj, Reference) else None
            )

    Pickler(buffer := io.BytesIO(), protocol=2).dump({"a": Stored()})
    return buffer.getvalue()


def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path: Path) -> None:
    data = {"0": bytes(40)}
    good = archive(tmp_path / "good.ckpt", storage_pickle(10, (10,), (1,)), **data)
    assert load_tensors(good)["a"].shape == (10,)
    for elements, shape, stride in (
        (10, (10**9, 10**3), (0, 0)),
        (10**12, (10**12,), (1,)),
        (10, (11,), (1,)),
    ):
        with pytest.raises(WeightsError, match="claims more data|cannot be read"):
            load_tensors(archive(tmp_path / "bad.ckpt", storage_pickle(elements, shape, stride), **data))


def test_archives_that_torch_does_not_write_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.ckpt"
    with pytest.raises(WeightsError, match="compressed or claims more"):
        load_tensors(archive(path, b"\x80\x02}.", zipfile.ZIP_DEFLATED, zeros=bytes(10**6)))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme", "nothing")
    with pytest.raises(WeightsError, match="without a list of tensors"):
        load_tensors(path)
    path.write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(WeightsError, match="damaged"):
        load_tensors(path)
    path.write_bytes(b"text")
    with pytest.raises(WeightsError, match="no torch archive but something unknown"):
        load_tensors(path)


# -- values and writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e5m2, torch.complex64])
def test_values_that_are_not_finite_are_counted(dtype: torch.dtype) -> None:
    good, bad = torch.ones(5), torch.tensor([1.0, float("nan"), float("inf"), 0])
    require_finite({"good": good.to(dtype), "counts": torch.ones(2, dtype=torch.int64)}, Path("file"))
    with pytest.raises(WeightsError, match="file: 'bad' has 2 of 4 values that are NaN or infinite"):
        require_finite({"good": good.to(dtype), "bad": bad.to(dtype), "worse": bad}, Path("file"))


def test_the_same_tensors_are_written_as_the_same_bytes(tmp_path: Path) -> None:
    metadata = {f"key {index}": "ä" * index for index in range(9)}
    contents = set()
    for order in (1, -1, 1, -1):
        items = [("a", torch.ones(2, 3).mT), ("b", torch.zeros(3, dtype=torch.float16))][::order]
        save_tensors(tmp_path / "file.safetensors", dict(items), dict(list(metadata.items())[::order]))
        contents.add((tmp_path / "file.safetensors").read_bytes())
    assert len(contents) == 1
    assert list(read_header(tmp_path / "file.safetensors").metadata.items()) == sorted(metadata.items())
    assert torch.equal(load_tensors(tmp_path / "file.safetensors")["a"], torch.ones(3, 2))


def test_tensors_that_share_memory_are_written_in_full(tmp_path: Path) -> None:
    values = torch.arange(6.0)
    save_tensors(tmp_path / "file.safetensors", {"all": values, "again": values, "part": values[1:3]}, {})
    loaded = load_tensors(tmp_path / "file.safetensors")
    assert torch.equal(loaded["all"], loaded["again"]) and loaded["part"].tolist() == [1, 2]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        save_tensors(tmp_path / "file" / "a.safetensors", {"a": torch.ones(1)}, {})


def test_a_sealed_file_is_read_to_the_last_bit_or_not_at_all(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 2).T,
        "a": torch.tensor(1.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
    }
    path = tmp_path / "file.safetensors"
    save_sealed(path, tensors, {"state": "é"})
    found, metadata = load_sealed(path)
    assert metadata == {"state": "é"} and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    whole = path.read_bytes()
    refused = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            load_sealed(path)
        except WeightsError:
            refused += 1
    assert refused == len(whole) - len("lorascope.digest"), "but for the digest's own name, no bit may differ"


def test_a_file_of_0_1_0_without_a_digest_is_read(tmp_path: Path) -> None:
    save_tensors(path := tmp_path / "file.safetensors", {"a": torch.ones(2)}, {"state": "1"})
    assert load_sealed(path)[1] == {"state": "1"}
