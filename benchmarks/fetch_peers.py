"""Fetch kohya's modules for arm P3 of `lorascope bench` into `benchmarks/peers/`, at a pinned commit, with
checked digests.

They are Apache-2.0 licensed (https://github.com/kohya-ss/sd-scripts) and no part of this repository. What is
there already and right is not fetched again.
"""

import hashlib
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from lorascope.bench.peers import KOHYA_COMMIT, KOHYA_FILES
from lorascope.errors import HubError, LorascopeError
from lorascope.store import digest_file, write_bytes

URL = f"https://raw.githubusercontent.com/kohya-ss/sd-scripts/{KOHYA_COMMIT}"
PEERS_DIR = Path(__file__).parent / "peers"
MAX_BYTES = 2**20  # of a file


def fetch(url: str, files: Mapping[str, str], folder: Path) -> list[Path]:
    """Fetch `url`/NAME for each name of `files` (name: SHA-256) into `folder`; returns what was fetched.

    Raises `HubError` for a file that cannot be had or is another than was checked, which is not written.
    """
    fetched = []
    for name, digest in files.items():
        path = folder / name
        if path.is_file() and digest_file(path) == digest:
            continue
        try:
            with urllib.request.urlopen(f"{url}/{name}", timeout=60) as answer:
                content = answer.read(MAX_BYTES + 1)
        except (urllib.error.URLError, OSError) as error:
            raise HubError(
                f"{url}/{name}: cannot be fetched ({error}): check the network, or copy the file to {path}"
            ) from error
        if (found := hashlib.sha256(content).hexdigest()) != digest:
            raise HubError(
                f"{url}/{name}: has SHA-256 {found}, expected {digest}: not written; try again on "
                "another network"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
        fetched.append(path)
    return fetched


def main() -> int:
    """Fetch all, and say what was done."""
    try:
        fetched = fetch(URL, KOHYA_FILES, PEERS_DIR)
    except LorascopeError as error:
        print(f"fetch_peers: {error}", file=sys.stderr)
        return error.exit_code
    print(*(f"fetched {path}" for path in fetched), sep="\n") if fetched else print(f"{PEERS_DIR}: all there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
