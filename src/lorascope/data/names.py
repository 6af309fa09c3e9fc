"""Names of files: what of them can be written, how they are shown, and whether they stay in their folder."""

import os
import re
from collections.abc import Sequence

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SHOWN_NAMES = 3


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8: JSON escapes and file names can hold half characters that
    cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(name: str) -> str:
    """A file name as text of one line that can be written as UTF-8."""
    text = name if is_unicode(name) else os.fsencode(name).decode(errors="backslashreplace")
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def name_some(names: Sequence[str]) -> str:
    """The first few of the names, and how many more there are."""
    more = f" and {len(names) - _SHOWN_NAMES:,} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(map(shown, names[:_SHOWN_NAMES])) + more


def is_inside(name: str) -> bool:
    """Whether a normalised name stays within its folder."""
    return not name.startswith(("/", "../")) and name not in (".", "..")
