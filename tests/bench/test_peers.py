"""What the peers need, and how it is fetched."""

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from benchmarks.fetch_peers import fetch

from lorascope.bench.peers import KOHYA_COMMIT, KOHYA_FILES, missing_for
from lorascope.errors import HubError


def test_what_a_peer_lacks_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_for("ours", tmp_path, "sd15") is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_for("peft", tmp_path, "pocket") == 'peft is not installed: pip install "lorascope[bench]"'
    assert missing_for("kohya", tmp_path, "sd15") == 'einops is not installed: pip install "lorascope[bench]"'


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A server of the files of `tmp_path`/there."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    (tmp_path / "there" / "networks").mkdir(parents=True)
    (tmp_path / "there" / "networks" / "lora.py").write_bytes(b"a = 1\n")
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "there")))
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_peers_are_fetched_once_and_checked(server: str, tmp_path: Path) -> None:
    files, target = {"networks/lora.py": hashlib.sha256(b"a = 1\n").hexdigest()}, tmp_path / "peers"
    assert fetch(server, files, target) == [target / "networks" / "lora.py"]
    assert (target / "networks" / "lora.py").read_bytes() == b"a = 1\n"
    assert fetch("http://127.0.0.1:9", files, target) == []
    with pytest.raises(HubError, match="has SHA-256 .*, expected 00: not written"):
        fetch(server, {"networks/lora.py": "00"}, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(HubError, match="gone.py: cannot be fetched"):
        fetch(server, {"gone.py": "00"}, target)
    assert len(KOHYA_COMMIT) == 40 and all(len(digest) == 64 for digest in KOHYA_FILES.values())
