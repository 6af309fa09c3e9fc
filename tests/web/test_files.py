"""The pages of adapter files: what comes in, what it is, what is made of it, what may leave."""

import io
import json
import os
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from starlette.testclient import TestClient

from lorascope.adapters.inspection import inspect_adapter
from lorascope.adapters.schedule import SCHEDULE_KEY, RankSchedule
from lorascope.errors import ConfigError, StorageError
from lorascope.web import adapter_files
from lorascope.web.adapter_files import (
    delete_file,
    incoming,
    own_file,
    require_adapter,
    sendable,
    stored_files,
    zipped,
)
from lorascope.web.files_page import _number
from lorascope.web.inspection_view import look_into, view_of, was_looked_into
from lorascope.web.services import Services
from lorascope.web.workspace import MissingError, OutsideError
from web_client import make_services

HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m"


@pytest.fixture
def services(tmp_path: Path) -> Services:
    return make_services(tmp_path / "work")


def write_adapter(path: Path, metadata: dict[str, str] | None = None, rank: int = 4) -> Path:
    """An adapter of two layers of Stable Diffusion v1.5 in kohya's layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in ("attn1_to_q", "attn1_to_k"):
        name = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_{layer}"
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, 320, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(320, rank, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, path, metadata)
    return path


def test_a_file_is_dropped_looked_into_made_smaller_and_deleted(
    services: Services, client: TestClient, tmp_path: Path
) -> None:
    source = write_adapter(tmp_path / "given.safetensors", {"ss_training_comment": HOSTILE})
    answer = client.post("/files/upload/my%20%3Cown%3Estyle.safetensors", content=source.read_bytes())
    assert answer.json() == {
        "view": "/files/view?path=files%2Fmy_own_style.safetensors",
        "name": "my_own_style.safetensors",
    }
    stored = services.workspace.files_dir / "my_own_style.safetensors"
    assert stored.read_bytes() == source.read_bytes()
    assert "Looking into it" in client.get(answer.json()["view"]).text  # a page at once, the rest follows
    text = client.get("/files/inspection?path=files/my_own_style.safetensors").text
    assert "LoRA for Stable Diffusion v1" in text
    assert "Yes, all of it in WebUI" in text
    assert "rank 4, alpha 4 (scale 1)" in text
    assert "<img src=x" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "\x1b" not in text
    # What was found is kept until the file changes.
    assert look_into(services.workspace, stored).num_modules == 2
    assert was_looked_into(services.workspace, stored)
    assert "Looking into it" not in client.get(answer.json()["view"]).text
    os.utime(stored, (0, 0))
    assert not was_looked_into(services.workspace, stored)
    smaller = client.post(
        "/files/resize",
        data={"path": "files/my_own_style.safetensors", "name": "small", "rank": "2"},
        headers={"hx-request": "true"},
    )
    assert smaller.headers["hx-redirect"] == "/files/view?path=files%2Fsmall.safetensors"
    text = client.get(smaller.headers["hx-redirect"]).text
    assert (
        "lorascope resize files/my_own_style.safetensors files/small.safetensors --format=kohya --rank=2"
        in text
    )
    assert "energy kept" in text
    assert [file.name for file in stored_files(services.workspace)] == [
        "small.safetensors",
        "my_own_style.safetensors",
    ]
    assert "small.safetensors" in client.get("/files").text
    assert "frees" in client.get("/files/delete?path=files/small.safetensors").text
    assert client.post("/files/delete", data={"path": "files/small.safetensors"}).status_code == 303
    assert "small.safetensors" not in client.get("/files").text


def test_a_file_of_a_form_is_converted_to_a_folder(
    services: Services, client: TestClient, tmp_path: Path
) -> None:
    source = write_adapter(tmp_path / "a.safetensors")
    csrf = client.headers.pop("x-csrf-token")
    refused = client.post("/files/upload", files={"file": ("a.safetensors", source.read_bytes())})
    assert refused.status_code == 403
    address = f"/files/upload?csrf={csrf}"
    for name in ("a.safetensors", "a-2.safetensors"):  # nothing is replaced
        answer = client.post(address, files={"file": ("..\\..\\a.safetensors", source.read_bytes())})
        assert answer.headers["location"] == f"/files/view?path=files%2F{name}"
    asked = {"path": "files/a.safetensors", "name": "b", "layout": "peft", "dtype": "fp16", "csrf": csrf}
    answer = client.post("/files/convert", data=asked)
    assert answer.headers["location"] == "/files/view?path=files%2Fb-peft"
    again = client.post("/files/convert", data=asked)
    assert (again.status_code, "exists: choose another name" in again.text) == (400, True)
    (folder,) = [file for file in stored_files(services.workspace) if file.is_folder]
    assert folder.name == "b-peft"
    answer = client.get("/files/download?path=files/b-peft")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert sorted(archive.namelist()) == [
            "b-peft/adapter_config.json",
            "b-peft/adapter_model.safetensors",
        ]
    delete_file(own_file(services.workspace, "files/b-peft"))
    assert not (services.workspace.files_dir / "b-peft").exists()


def test_a_format_that_cannot_hold_an_adapter_says_what_can(services: Services, client: TestClient) -> None:
    folder = services.workspace.files_dir / "t"
    folder.mkdir(parents=True)
    part = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{part}.lora_A.weight": torch.ones(4, 320), f"{part}.lora_B.weight": torch.ones(320, 4)}
    save_file(tensors, folder / "adapter_model.safetensors", {SCHEDULE_KEY: RankSchedule(4, 2).as_text()})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["to_q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    answer = client.post("/files/convert", data={"path": "files/t"}, headers={"hx-request": "true"})
    assert "T-LoRA: 2 to 4 components act by timestep" in answer.text
    assert "write peft, or with --as-lora" in answer.text


def test_pickles_and_other_files_are_refused_by_name(services: Services, client: TestClient) -> None:
    for name in ("a.pt", "a.ckpt", "a.BIN", "a.safetensors.pth"):
        answer = client.post(f"/files/upload/{name}", content=b"PK\x03\x04")
        assert (answer.status_code, "pickle" in answer.text) == (400, True)
    for name in ("a.png", "a.safetensors.html", "safetensors", "%2e%2e%2f"):
        assert client.post(f"/files/upload/{name}", content=b"x").status_code in (400, 404)
    with pytest.raises(ConfigError, match="name one of these"):
        require_adapter(services.workspace.folder)
    assert stored_files(services.workspace) == []


def test_a_damaged_file_shows_what_the_command_says(services: Services, client: TestClient) -> None:
    files = services.workspace.files_dir
    files.mkdir()
    (files / "cut.safetensors").write_bytes(struct.pack("<Q", 10**12) + b"{}")
    text = client.get("/files/view?path=files/cut.safetensors&now=1").text
    assert "truncated or no safetensors file" in text
    assert "Make another file of it" not in text
    os.mkfifo(files / "pipe.safetensors")
    assert client.get("/files/view?path=files/pipe.safetensors").status_code == 400
    assert client.get("/files/download?path=files/pipe.safetensors").status_code == 403


def test_downloads_are_adapters_of_files_and_runs_alone(
    services: Services, client: TestClient, tmp_path: Path
) -> None:
    workspace = services.workspace
    arm = workspace.runs_dir / "run" / "adapters" / "r4"
    write_adapter(arm / 'r4";x=.safetensors')
    write_adapter(workspace.files_dir / "a.safetensors")
    write_adapter(workspace.pictures_dir / "set" / "b.safetensors")
    outside = write_adapter(tmp_path / "out" / "c.safetensors")
    (workspace.files_dir / "link.safetensors").symlink_to(outside)
    (workspace.files_dir / "note.html").write_text("<script>alert(1)</script>")
    (arm / "training.json").write_text("{}")
    (workspace.runs_dir / "run" / "study.toml").write_text("")
    answer = client.get("/files/download", params={"path": 'runs/run/adapters/r4/r4";x=.safetensors'})
    assert answer.headers["content-disposition"] == 'attachment; filename="r4_x.safetensors"'
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    for path in (
        "files/note.html",
        "files/link.safetensors",
        "files",
        "runs/run/adapters/r4/training.json",
        "runs/run/adapters/r4",
        "runs/run/study.toml",
        "pictures/set/b.safetensors",
        "files/../runs/run/study.toml",
        ".lorascope-web/queue.sqlite",
        str(outside),
        "//host/share/a.safetensors",
        "/etc/passwd",
    ):
        assert client.get("/files/download", params={"path": path}).status_code == 403, path
        with pytest.raises(OutsideError):
            sendable(workspace, path)
    with pytest.raises(MissingError):
        sendable(workspace, "files/gone.safetensors")
    with pytest.raises(OutsideError, match="delete it where it lies"):
        own_file(workspace, 'runs/run/adapters/r4/r4";x=.safetensors')
    assert client.post("/files/delete", data={"path": "files"}).status_code == 403
    assert [file.name for file in stored_files(workspace)] == ["a.safetensors"]


def test_a_folder_leaves_without_what_it_links_to(services: Services, tmp_path: Path) -> None:
    folder = services.workspace.files_dir / "p"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (tmp_path / "secret").write_text("secret")
    (folder / "linked").symlink_to(tmp_path / "secret")
    (folder / "linked-folder").symlink_to(tmp_path)
    with zipfile.ZipFile(io.BytesIO(b"".join(zipped(folder)))) as archive:
        assert archive.namelist() == ["p/adapter_config.json"]


def test_an_upload_that_breaks_off_leaves_nothing(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = services.workspace
    with pytest.raises(RuntimeError, match="gone"), incoming(workspace, "a.safetensors") as upload:
        upload.file.write(b"half")
        raise RuntimeError("gone")
    uploads = workspace.state_dir / "uploads"
    assert list(uploads.iterdir()) == list(workspace.files_dir.iterdir()) == []
    with pytest.raises(StorageError, match="free space"), incoming(workspace, "a.safetensors", 10**15):
        pass
    old = uploads / "of-a-killed-server"
    old.touch()
    os.utime(old, (time.time() - 10**6,) * 2)
    with incoming(workspace, "a.safetensors") as upload:
        upload.file.write(b"whole")
    assert upload.path is not None
    assert upload.path.read_bytes() == b"whole"
    assert list(uploads.iterdir()) == []
    monkeypatch.setattr(adapter_files, "MAX_FILES", 0)
    assert len(stored_files(workspace)) == 1


def test_the_page_says_what_the_command_says(tmp_path: Path) -> None:
    """Of a file that some programs take up in part, one that does nothing, and one of another model."""
    path = write_adapter(
        tmp_path / "a.safetensors", {"ss_network_dim": "64", "ss_training_started_at": "1e9"}
    )
    found = json.loads(json.dumps(inspect_adapter(path).as_dict()))
    view = view_of(found)
    assert view.state == "yes"
    assert {row.reader for row in view.readers} == set(found["readers"])
    assert any("its metadata say rank 64".lower() in fault.lower() for fault in view.faults)
    assert ("Training started", "2001-09-09 01:46 UTC") in view.training
    readers = dict(found["readers"])
    first, second, third = list(readers)[:3]
    name = found["modules"][0]["name"]
    readers[first] = {**readers[first], "answer": "in part", "ignored": [name]}
    readers[second] = {**readers[second], "answer": "refuses", "refusal": "it is refused"}
    readers[third] = {**readers[third], "answer": "nothing"}
    view = view_of({**found, "readers": {key: readers[key] for key in (first, second, third)}})
    assert (view.state, view.answer) == (
        "caution",
        f"Only in part in {first}; nothing in {third}; refused by {second}.",
    )
    assert "1 of 2 modules" in view.readers[0].text
    assert "it is refused" in view.readers[1].text
    bad = [{**found["modules"][0], "num_not_finite": 3, "is_zero": True}, found["modules"][1]]
    view = view_of({**found, "modules": bad, "dead_because": "its values are NaN"})
    assert (view.state, view.answer) == ("no", "No: its values are NaN.")
    assert any("3 values are NaN" in fault for fault in view.faults)
    assert any("exactly zero" in fault for fault in view.faults)
    view = view_of({**found, "readers": {}, "family": "SDXL"})
    assert view.state == "caution"
    assert "It is made for SDXL" in view.answer


def test_numbers_of_forms_are_numbers(services: Services) -> None:
    assert _number("--rank", " 8 ", int) == 8
    with pytest.raises(ConfigError, match="is no number"):
        _number("--rank", "eight", int)
