"""The network path, against a small hub on this machine: the real client, each answer of the hub, each
fault.
"""

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, file_download

import lorascope.base.hub
from conftest import make_pictures, write_parquet
from hub_server import TOKEN, Fault, HubServer, Repo
from lorascope.base.hub import fetch_snapshot
from lorascope.base.loading import load_base
from lorascope.data.dataset import prepare_data
from lorascope.errors import HubError, StorageError
from lorascope.sections import BaseSection, DataSection

WHAT = "base.model = 'owner/tiny'"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def server() -> Iterator[HubServer]:
    """A hub with one model: two commits, of which `main` and the tag `v2` are the later and `v1` the
    earlier.
    """
    hub = HubServer()
    repo = hub.repos["models/owner/tiny"] = Repo()
    repo.commit({"model_index.json": b"{}", "unet/config.json": b'{"old": true}'}, "v1")
    files = {f"part{number}/config.json": json.dumps({"part": number}).encode() for number in range(5)}
    repo.commit(
        {**files, "unet/model.safetensors": bytes(range(256)) * 4096, "notes.md": b"# words"}, "main", "v2"
    )
    with hub.running():
        yield hub


@pytest.fixture(autouse=True)
def _online(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """The client asks the test's hub, keeps its own cache, and does not sleep between its tries."""
    hub = request.getfixturevalue("server") if "server" in request.fixturenames else None
    url = hub.url if hub else "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    awake = SimpleNamespace(sleep=lambda seconds: None)
    for module in (file_download, huggingface_hub.utils._http, lorascope.base.hub):
        monkeypatch.setattr(module, "time", awake)
    yield
    huggingface_hub.close_session()


def fetch(patterns: tuple[str, ...] = ("*.json", "*.safetensors"), **options: Any) -> Path:
    """The snapshot of the test's model."""
    return fetch_snapshot(
        "owner/tiny", **{"kind": "model", "revision": None, "patterns": patterns, "what": WHAT, **options}
    )


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def served(server: HubServer, ref: str = "main") -> dict[str, bytes]:
    """The files of a commit that `fetch` asks for."""
    repo = server.repos["models/owner/tiny"]
    return {
        name: content
        for name, content in repo.commits[repo.refs[ref]].items()
        if name.endswith((".json", ".safetensors"))
    }


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Our own warnings."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "lorascope" and record.levelno == logging.WARNING
    ]


def assert_nothing_half_written() -> None:
    """No file of the cache is a part of one."""
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


# What goes well ---------------------------------------------------------------------------------------------


def test_the_first_load_fetches_each_file_once_and_the_second_none(
    server: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    folder = fetch()
    assert contents(folder) == served(server)
    assert folder.name == server.repos["models/owner/tiny"].refs["main"]
    assert len(server.fetched()) == len(set(server.fetched())) == len(served(server))
    server.requests.clear()
    assert fetch() == folder
    assert [
        path
        for _, path in server.requests
        if not path.endswith("/revision/main") and path != "/api/models/owner/tiny"
    ] == []
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("ref", ["v1", "v2", "main"])
def test_a_revision_is_a_branch_a_tag_or_a_commit(server: HubServer, ref: str) -> None:
    commit = server.repos["models/owner/tiny"].refs[ref]
    by_name = fetch(revision=ref)
    assert (by_name.name, contents(by_name)) == (commit, served(server, ref))
    server.requests.clear()
    assert fetch(revision=commit) == by_name
    assert server.requests == []


def test_a_moved_branch_is_followed_and_what_stayed_is_not_fetched_again(server: HubServer) -> None:
    fetch()
    changed = {**served(server), "part0/config.json": b"{}"}
    server.repos["models/owner/tiny"].commit(changed, "main")
    server.requests.clear()
    assert contents(fetch()) == changed
    assert len(server.fetched()) == 1


def test_only_the_files_that_match_are_fetched(server: HubServer) -> None:
    assert set(contents(fetch(("part*/config.json",)))) == {
        f"part{number}/config.json" for number in range(5)
    }


def test_a_token_goes_to_the_hub_and_not_to_its_storage(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.repos["models/owner/tiny"].gated = True
    assert contents(fetch()) == served(server)
    assert server.tokens == {("127.0.0.1", TOKEN), ("localhost", None)}


def test_files_in_xet_storage_come_by_plain_http_where_xet_is_off(server: HubServer) -> None:
    server.repos["models/owner/tiny"].xet = True
    assert contents(fetch()) == served(server)


def test_progress_counts_the_bytes_of_all_files(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    large = {f"{letter}.safetensors": letter.encode() * (2 * 2**20) for letter in "abc"}
    server.repos["models/owner/tiny"].commit(large, "main")
    tasks = []
    real = lorascope.base.hub.track

    def track(*arguments: Any) -> Any:
        shown = real(*arguments)
        tasks.append(shown)
        return shown

    monkeypatch.setattr("lorascope.base.hub.track", track)
    seen = []
    monkeypatch.setattr(
        "lorascope.console.Task.advance", lambda task, count=1, note="": seen.append((count, task.total))
    )
    fetch()
    assert len(tasks) == 1
    assert seen[-1] == (6, 6)


# Without a network ------------------------------------------------------------------------------------------


def test_offline_the_cached_commit_is_taken(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = fetch()
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    caplog.set_level(logging.INFO, "lorascope")
    assert fetch() == fetch(revision="main") == fetch(revision=folder.name) == folder
    assert server.requests == []
    assert f"{WHAT}: HF_HUB_OFFLINE is set: using the cached commit {folder.name}" in caplog.messages
    assert warnings_of(caplog) == []


def test_with_the_hub_gone_the_cached_commit_is_taken_and_said(
    server: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    folder = fetch()
    server.stop()
    assert fetch(revision=folder.name) == folder
    assert warnings_of(caplog) == []
    assert fetch() == folder
    assert warnings_of(caplog) == [
        f"{WHAT}: ConnectError: [Errno 111] Connection refused: using the cached commit {folder.name}"
    ]


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_with_the_hub_refusing_the_cached_commit_is_taken_and_said(
    server: HubServer, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    folder = fetch()
    server.faults = [Fault("/api/", 99, status)]
    assert fetch() == folder
    assert warnings_of(caplog) == [
        f"{WHAT}: the hub answered {status}: using the cached commit {folder.name}"
    ]


def test_an_older_tag_is_not_taken_for_the_branch_that_is_missing(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(revision="v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        HubError,
        match=(
            f"{WHAT}: not complete in the cache .*HF_HUB_OFFLINE is set: go online once, or give a local "
            "folder"
        ),
    ):
        fetch()


def test_a_snapshot_that_lacks_files_is_not_taken_for_whole(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch(("*.json",))
    for revision in (None, folder.name):
        server.faults = [Fault("/api/", 99, 500)]
        with pytest.raises(
            HubError, match="the hub answered 500: run the same command again later; .*; 3 tries were made"
        ):
            fetch(revision=revision)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(HubError, match="not complete in the cache"):
            fetch(revision=revision)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.faults = []
    assert contents(fetch(revision=folder.name)) == served(server)


@pytest.mark.parametrize("revision", [None, "v1", "0" * 40])
def test_nothing_cached_and_no_network(revision: str | None) -> None:
    with pytest.raises(HubError) as error:
        fetch(revision=revision)
    assert str(error.value) == (
        f"{WHAT}: http://127.0.0.1:9 cannot be reached (ConnectError: [Errno 111] Connection refused): "
        "check network, proxy and HF_ENDPOINT, or give a local folder"
    )


# What the hub refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize("token", [None, TOKEN])
def test_an_unknown_or_private_repository(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, kind: Literal["model", "dataset"], token: str | None
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    noun = {"model": "model", "dataset": "data set"}[kind]
    message = (
        f"no {noun} of this id at {server.url}, or a private one: check the id, or log in with `hf auth "
        "login` or HF_TOKEN"
    )
    with pytest.raises(HubError, match=message):
        fetch_snapshot(
            "owner/unknown", kind=kind, revision=None, patterns=["*"], what="data.source = 'owner/unknown'"
        )


@pytest.mark.parametrize("revision", ["v3", "0" * 40])
def test_a_wrong_revision(server: HubServer, revision: str) -> None:
    fetch()  # a cached copy of another revision is no answer
    with pytest.raises(
        HubError,
        match=(
            f"has no revision '{revision}': give a branch, a tag or a full commit hash from "
            f"{server.url}/owner/tiny"
        ),
    ):
        fetch(revision=revision)


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository(server: HubServer, status: int) -> None:
    server.repos["models/owner/tiny"].gated = True
    if status == 403:
        server.faults = [Fault("/resolve/", 99, 403, {"X-Error-Code": "GatedRepo"}, method="*")]
    with pytest.raises(HubError) as error:
        fetch()
    assert str(error.value) == (
        f"{WHAT}: gated: log in on {server.url}/owner/tiny and accept its terms, then log in here with "
        "`hf auth login` or HF_TOKEN"
    )
    assert_nothing_half_written()


def test_a_disabled_repository(server: HubServer) -> None:
    server.repos["models/owner/tiny"].disabled = True
    with pytest.raises(
        HubError, match="disabled on the hub, see .*/owner/tiny: give another model, or a local folder"
    ):
        fetch()


def test_a_token_without_the_right(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.faults = [Fault("/api/", 99, 403, {"X-Error-Message": "fine-grained token"})]
    with pytest.raises(
        HubError, match=r"the hub refuses access .403.: use a token that may read .*/owner/tiny"
    ):
        fetch()


@pytest.mark.parametrize("token", ["hf_bad", "hf_\x00bad", "hf_ä"])
def test_a_bad_token(server: HubServer, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    Path(constants.HF_TOKEN_PATH).write_text(token)
    with pytest.raises(
        HubError,
        match=(
            f"the hub does not accept your token: make a new one at {server.url}/settings/tokens .*unset "
            "HF_TOKEN"
        ),
    ):
        fetch()


def test_a_file_that_the_hub_lists_and_does_not_have(server: HubServer) -> None:
    server.faults = [Fault("part3/config.json", 99, 404, {"X-Error-Code": "EntryNotFound"}, method="HEAD")]
    with pytest.raises(
        HubError,
        match=(
            "the hub lists /owner/tiny/resolve/.*/part3/config.json and does not have it: give another "
            "revision"
        ),
    ):
        fetch()


def test_no_file_that_matches(server: HubServer) -> None:
    with pytest.raises(HubError) as error:
        fetch(("*.ckpt", "*.parquet"))
    assert str(error.value) == (
        f"{WHAT}: none of the files needed (*.ckpt, *.parquet) at main, which has notes.md, "
        "part0/config.json, part1/config.json, part2/config.json, part3/config.json and 2 more: give "
        "another model, or another revision"
    )
    server.repos["models/owner/tiny"].commit({}, "empty")
    with pytest.raises(HubError, match="at empty, which has no files"):
        fetch(revision="empty")


def test_what_is_no_id() -> None:
    with pytest.raises(HubError, match="no hub id .*: give owner/name"):
        fetch_snapshot(
            "owner/na me", kind="model", revision=None, patterns=["*"], what="base.model = 'owner/na me'"
        )


def test_an_endpoint_that_is_no_hub(server: HubServer) -> None:
    server.faults = [Fault("/api/", 99, 200, {"Content-Type": "text/html"}, b"<html>log in</html>")]
    with pytest.raises(
        HubError,
        match=f"{server.url} does not answer as a hub .JSONDecodeError.*: check HF_ENDPOINT and the proxy",
    ):
        fetch()


def test_a_proxy_that_does_not_answer(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    huggingface_hub.close_session()
    with pytest.raises(HubError, match="cannot be reached .*: check network, proxy and HF_ENDPOINT"):
        fetch()


# What breaks on the way -------------------------------------------------------------------------------------


def test_a_cut_transfer_is_resumed_where_it_was_cut(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # what is kept is a multiple of it
    server.faults = [Fault("/storage/", 1, sent=300_000), Fault("/storage/", 1, sent=200_000)]
    assert contents(fetch()) == served(server)
    assert server.ranges == ["bytes=300000-", "bytes=500000-"]


def test_a_reset_connection_is_tried_again(server: HubServer) -> None:
    server.faults = [Fault("/storage/", 2, sent=300_000, reset=True)]
    assert contents(fetch()) == served(server)
    assert server.fetched().count(next(path for path in server.fetched() if "/storage/" in path)) == 3


def test_a_server_that_keeps_cutting_and_then_does_not(server: HubServer) -> None:
    server.faults = [Fault("/storage/", 999, sent=0)]
    with pytest.raises(
        HubError,
        match=(
            r"the transfer broke off .RemoteProtocolError.*run the same command again; files.*are kept; 3 "
            r"tries"
        ),
    ):
        fetch()
    assert_nothing_half_written()
    server.faults = []
    server.requests.clear()
    assert contents(fetch()) == served(server)
    assert server.fetched() == [
        path for path in server.fetched() if "safetensors" in path or "/storage/" in path
    ]


def test_fewer_bytes_than_the_file_has_are_not_taken_for_it(server: HubServer) -> None:
    server.faults = [Fault("/storage/", 1, sent=1000, short=True)]
    assert contents(fetch()) == served(server)
    server.repos["models/owner/tiny"].commit({"other.safetensors": b"x" * 5000}, "main")
    server.faults = [Fault("/storage/", 999, sent=1000, short=True)]
    with pytest.raises(HubError, match="the transfer broke off .OSError: Consistency check failed.*5000"):
        fetch()
    assert_nothing_half_written()


@pytest.mark.parametrize(
    ("method", "part", "status"),
    [("GET", "/api/", 500), ("HEAD", "/resolve/", 429), ("GET", "/storage/", 503)],
)
def test_a_busy_hub_is_asked_again(server: HubServer, method: str, part: str, status: int) -> None:
    server.faults = [Fault(part, 2, status, method=method)]
    assert contents(fetch()) == served(server)


@pytest.mark.parametrize(("method", "part"), [("GET", "/api/"), ("HEAD", "/resolve/"), ("GET", "/storage/")])
@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (
            429,
            {"Retry-After": "120"},
            (
                "the hub limits your rate .429.: wait 120 s and run again; .* raises the limit; 3 tries "
                "were made"
            ),
        ),
        (
            500,
            {},
            (
                "the hub answered 500: run the same command again later; what arrived whole is kept; 3 "
                "tries were made"
            ),
        ),
    ],
)
def test_a_hub_that_stays_busy(
    server: HubServer, method: str, part: str, status: int, headers: dict[str, str], message: str
) -> None:
    server.faults = [Fault(part, 9999, status, headers, method=method)]
    with pytest.raises(HubError, match=message):
        fetch()
    assert_nothing_half_written()


def test_a_full_disk(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(
        StorageError,
        match="hub: cannot be written: the disk is full: free space and run the same command again",
    ):
        fetch()


def test_a_cache_that_cannot_be_written(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(
        StorageError, match="a part of this path is a file: choose another folder .*HF_HOME for downloads"
    ):
        fetch()


# From end to end --------------------------------------------------------------------------------------------


def test_a_base_and_a_data_set_by_id(
    server: HubServer, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_folder("models/owner/pipeline", pipeline_folder)
    write_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", make_pictures(8))
    commit = server.add_folder("datasets/owner/pictures", tmp_path / "set")

    def load() -> tuple[str, str]:
        base = load_base(BaseSection(model="owner/pipeline"), torch.device("cpu"))
        data = prepare_data(DataSection(source="owner/pictures", resolution_px=32), len)
        assert data.load_pixels(data.train[0]).shape == (32, 32, 3)
        assert commit in data.summary["source"]
        return base.digest, data.summary["fingerprint"]

    first = load()
    local = load_base(BaseSection(model=str(pipeline_folder)), torch.device("cpu"))
    assert first[0] == local.digest
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.stop()
    assert load() == first


def test_the_environment_names_the_hub_and_its_cache(server: HubServer, tmp_path: Path) -> None:
    """What the variables set, in a process of its own: fetched once, then offline with the hub gone."""
    code = (
        "from lorascope.base.hub import fetch_snapshot\n"
        "print(fetch_snapshot('owner/tiny', kind='model', revision=None, patterns=['*.json'], what='x'))"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
    }

    def run(**variables: str) -> Path:
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            env={**environment, **variables},
        )
        assert result.returncode == 0, result.stderr
        return Path(result.stdout.strip())

    folder = run(HF_HUB_OFFLINE="0")
    assert folder.is_relative_to(tmp_path / "home") and len(contents(folder)) == 5
    server.stop()
    assert run(HF_HUB_OFFLINE="1") == run(HF_HUB_OFFLINE="0") == folder
