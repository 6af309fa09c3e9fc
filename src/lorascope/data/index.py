"""What is known of pictures from earlier looks, so that unchanged files are not read again.

One SQLite file a source, in the user's cache. A picture's entry holds while its row's id and its file's size
and time of change are the same. An entry that is damaged counts as absent, and a damaged file is made anew.
"""

import os
import sqlite3
import struct
import time
import zlib
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Self

import PIL

from lorascope.console import log
from lorascope.data.pictures import PictureFacts, RefusedError
from lorascope.data.rows import Stamp
from lorascope.store import digest_bytes, user_cache_path

_VERSION = f"3, Pillow {PIL.__version__}"  # decoders differ between versions, and what they refuse
_FIXED = struct.Struct("<32s32sQ768s768sIIII")
_SETTLED_NS = 2 * 10**9
_WRITE_EVERY = 256
_WAIT_S = 30.0

Outcome = PictureFacts | RefusedError


def default_index_dir() -> Path:
    """`$XDG_CACHE_HOME/lorascope/pictures`, or `~/.cache/lorascope/pictures`."""
    return user_cache_path("pictures")


class PictureIndex:
    """The entries of one source: a context manager that writes what was added when it is left.

    Several processes may use one at a time. Where the cache cannot be written or read, it says so once and
    all pictures count as unknown.
    """

    def __init__(self, index_dir: Path, origin: str) -> None:
        self.path = index_dir / f"{digest_bytes(os.fsencode(origin))[:32]}.sqlite"
        self.num_found = 0
        self._database: sqlite3.Connection | None = None
        self._added: list[tuple[bytes, int, int, bytes]] = []

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except (OSError, sqlite3.OperationalError) as error:
            self._give_up(error)
        except sqlite3.DatabaseError as error:
            self._start_over(error)
        return self

    def _open(self) -> None:
        self._database = sqlite3.connect(self.path, timeout=_WAIT_S)
        with self._database as database:
            # A killed process loses its last entries at most, a failing disk is found by the checksums.
            database.execute("PRAGMA synchronous = OFF")
            database.execute("CREATE TABLE IF NOT EXISTS version (text TEXT PRIMARY KEY)")
            if database.execute("SELECT text FROM version").fetchall() != [(_VERSION,)]:
                database.execute("DROP TABLE IF EXISTS pictures")
                database.execute("DELETE FROM version")
                database.execute("INSERT INTO version VALUES (?)", (_VERSION,))
            database.execute(
                "CREATE TABLE IF NOT EXISTS pictures (id BLOB PRIMARY KEY, size INTEGER, changed "
                "INTEGER, facts BLOB)"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._write()
        if self._database is not None:
            self._database.close()
            self._database = None

    def find(self, row_id: str, stamp: Stamp) -> Outcome | None:
        """What is known of a row's picture, if its file has not changed: facts, or why it was refused."""
        if self._database is None:
            return None
        try:
            found = self._database.execute(
                "SELECT size, changed, facts FROM pictures WHERE id = ?", (row_id.encode(),)
            ).fetchone()
        except sqlite3.OperationalError as error:
            self._give_up(error)
            return None
        except sqlite3.DatabaseError as error:
            self._start_over(error)
            return None
        outcome = _unpack(row_id, found[2]) if found and found[:2] == stamp else None
        self.num_found += outcome is not None
        return outcome

    def add(self, row_id: str, stamp: Stamp, outcome: Outcome) -> None:
        """Keep what a look at the picture showed.

        A file that was changed within the last seconds is not kept: it could change again without a sign on
        file systems that store times coarsely.
        """
        if self._database is None or time.time_ns() - stamp[1] < _SETTLED_NS:
            return
        self._added.append((row_id.encode(), *stamp, _pack(row_id, outcome)))
        if len(self._added) >= _WRITE_EVERY:
            self._write()

    def keep_only(self, row_ids: Collection[str]) -> None:
        """Forget all rows but these, so that the file does not grow as pictures come and go."""
        self._write()
        if self._database is None:
            return
        try:
            with self._database as database:
                if database.execute("SELECT count(*) FROM pictures").fetchone()[0] <= len(row_ids):
                    return
                database.execute("CREATE TEMP TABLE kept (id BLOB PRIMARY KEY) WITHOUT ROWID")
                database.executemany(
                    "INSERT OR IGNORE INTO kept VALUES (?)", ((row_id.encode(),) for row_id in row_ids)
                )
                database.execute("DELETE FROM pictures WHERE id NOT IN (SELECT id FROM kept)")
        except sqlite3.DatabaseError as error:
            self._give_up(error)

    def _write(self) -> None:
        added, self._added = self._added, []
        if self._database is None or not added:
            return
        try:
            with self._database as database:
                database.executemany("INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?)", added)
        except sqlite3.OperationalError as error:
            self._give_up(error)
        except sqlite3.DatabaseError as error:
            self._start_over(error)

    def _give_up(self, error: Exception) -> None:
        log.warning(
            "data     %s: the index of pictures cannot be used (%s): every picture is read", self.path, error
        )
        if self._database is not None:
            self._database.close()
            self._database = None

    def _start_over(self, error: Exception) -> None:
        log.warning("data     %s: the index of pictures is damaged (%s): it is made anew", self.path, error)
        if self._database is not None:
            self._database.close()
            self._database = None
        try:
            self.path.unlink(missing_ok=True)
            self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)
            self._open()
        except (OSError, sqlite3.DatabaseError) as again:
            self._give_up(again)


def _pack(row_id: str, outcome: Outcome) -> bytes:
    """A checksum, then the fixed part of the facts and the treatments, a line each; or the reason of a
    refusal alone.
    """
    if isinstance(outcome, RefusedError):
        content = b"\0" + str(outcome).encode(errors="replace")
    else:
        fixed = (
            bytes.fromhex(outcome.digest),
            outcome.pixel_digest,
            outcome.hash,
            outcome.thumbnail,
            outcome.content,
            outcome.width_px,
            outcome.height_px,
            outcome.content_width_px,
            outcome.content_height_px,
        )
        content = b"\1" + _FIXED.pack(*fixed) + "\n".join(outcome.treatments).encode()
    return _checksum(row_id, content) + content


def _unpack(row_id: str, facts: bytes) -> Outcome | None:
    checksum, content = facts[:4], facts[4:]
    if checksum != _checksum(row_id, content):
        return None
    if content[:1] == b"\0":
        return RefusedError(content[1:].decode())
    digest, *fixed = _FIXED.unpack_from(content, 1)
    treatments = content[1 + _FIXED.size :].decode()
    values = (digest.hex(), *fixed, tuple(treatments.split("\n") if treatments else ()))
    return PictureFacts(*values)


def _checksum(row_id: str, content: bytes) -> bytes:
    return zlib.crc32(content, zlib.crc32(row_id.encode())).to_bytes(4, "little")
