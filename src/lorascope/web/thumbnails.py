"""Small pictures for pages: decoded with suspicion, encoded anew, kept in a folder of the server's."""

import io
from contextlib import suppress
from pathlib import Path

from PIL import Image

from lorascope.data.pictures import MAX_FILE_BYTES, RefusedError, open_picture
from lorascope.errors import StorageError
from lorascope.store import digest_json, open_regular, write_bytes
from lorascope.web.workspace import MissingError

SIDES = (96, 160, 256, 512, 1024)
_SMALL_PX = 128


def thumbnail(path: Path, side: int, kept_in: Path) -> bytes:
    """A picture file as WebP, its longer side at most `side` pixels, from `kept_in` where it is there.

    What is sent to a browser is never the file itself, so that nothing in it but pixels gets there. Raises
    `MissingError` where the file is not there and `RefusedError` where it is no picture that can be used.
    """
    side = min(SIDES, key=lambda known: (known < side, abs(known - side)))
    try:
        status = path.stat()
    except OSError as error:
        raise MissingError(f"{path.name}: is not there any more") from error
    key = digest_json([str(path), status.st_mtime_ns, status.st_size, side])
    kept = kept_in / key[:2] / f"{key}.webp"
    try:
        return kept.read_bytes()
    except OSError:
        pass
    try:
        with open_regular(path, MissingError) as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise MissingError(f"{path.name}: cannot be read ({error.strerror})") from error
    if len(content) > MAX_FILE_BYTES:
        raise RefusedError(f"more bytes than the limit of {MAX_FILE_BYTES}")
    picture = open_picture(content)
    is_small = max(picture.size) <= _SMALL_PX  # these stay as they are, pixel for pixel
    if not is_small:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", lossless=is_small, quality=82, method=2)
    with suppress(StorageError):  # on a full disk it is made again the next time
        write_bytes(kept, buffer.getvalue())
    return buffer.getvalue()
