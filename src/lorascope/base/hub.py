"""Models and data sets of the hub: fetched once, then taken from the local cache. Each failure has one clear
message.

The transfer is huggingface_hub's own. Files of a snapshot appear in its cache complete or not at all; an
interrupted fetch keeps those that arrived whole.
"""

import fnmatch
import io
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from lorascope.console import track
from lorascope.errors import HubError, LorascopeError, first_line
from lorascope.store import storage_errors

log = logging.getLogger("lorascope")

_TRIES = 3
_WAIT_S = 2.0
_LISTED_FILES = 5
# The transport's errors are told by name: its package is httpx2 from huggingface_hub 2 on and httpx before.
_NO_CONNECTION = frozenset(("ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol"))
_BAD_TOKEN = frozenset(("LocalProtocolError", "UnicodeEncodeError"))  # it cannot even be sent as a header


def fetch_snapshot(
    repo_id: str,
    *,
    kind: Literal["model", "dataset"],
    revision: str | None,
    patterns: Sequence[str],
    what: str,
) -> Path:
    """The folder with the files of a hub repository that match `patterns`, fetched where the local cache
    lacks them.

    `revision` is a branch, tag or 40-digit commit, `main` where it is None; a commit whose files are cached
    needs no network. `patterns` are shell patterns on paths within the repository, `*` also over `/`; that
    single files are there is for the caller to check. `what` is the key and value a message starts with, such
    as `base.model = 'owner/name'`.

    The folder's name is the commit. When the hub cannot be reached or refuses, a complete cached copy is
    taken and a warning says which commit it is. A passing fault (a cut connection, a busy hub) is tried
    again. Raises `HubError` with the remedy, or `StorageError` where the cache cannot be written.
    """
    from huggingface_hub import constants

    for attempt in range(1, _TRIES + 1):
        try:
            folder = _fetch(repo_id, kind, revision, list(patterns), what)
            break
        except LorascopeError:
            raise
        except OSError as error:
            if error.errno is not None and not _is_answer(error):
                with storage_errors(Path(constants.HF_HUB_CACHE)):
                    raise
            _raise_or_wait(error, attempt, repo_id, kind, revision, what)
        except Exception as error:  # the client passes on whatever its transports raise
            _raise_or_wait(error, attempt, repo_id, kind, revision, what)
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    if not any(fnmatch.fnmatch(file, pattern) for file in files for pattern in patterns):
        found = _file_names(repo_id, kind, folder.name)
        raise HubError(
            f"{what}: none of the files needed ({', '.join(patterns)}) at {revision or 'main'}, which "
            f"has {_some(found)}: give another {_noun(kind)}, or another revision"
        )
    return folder


def _fetch(repo_id: str, kind: str, revision: str | None, patterns: list[str], what: str) -> Path:
    """One try. Raises what the client raises; with neither network nor copy, the network's error."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

    def take(local: bool) -> Path:
        with _progress() as bar:
            return Path(
                snapshot_download(
                    repo_id,
                    repo_type=kind,
                    revision=revision,
                    allow_patterns=patterns,
                    local_files_only=local,
                    tqdm_class=bar,
                )
            )

    if constants.is_offline_mode():
        folder = take(local=True)
        log.info("%s: HF_HUB_OFFLINE is set: using the cached commit %s", what, folder.name)
        return folder
    if revision is not None and _is_commit(revision) and _file_names(repo_id, kind, revision):
        with suppress(LocalEntryNotFoundError):
            return take(local=True)
    # The client would fall back on its cache in silence, and only after long retries.
    try:
        HfApi().repo_info(repo_id, repo_type=kind, revision=revision)
    except RevisionNotFoundError:
        raise
    except Exception as error:
        try:
            folder = take(local=True)
        except LocalEntryNotFoundError:
            raise error from None
        log.warning("%s: %s: using the cached commit %s", what, _reason(error), folder.name)
        return folder
    return take(local=False)


def _raise_or_wait(
    error: Exception, attempt: int, repo_id: str, kind: str, revision: str | None, what: str
) -> None:
    """Raise the `HubError` that says what `error` means, or return after a pause where another try may
    help.
    """
    if not _may_pass(error):
        raise HubError(f"{what}: {_explain(error, repo_id, kind, revision)}") from error
    if attempt == _TRIES:
        raise HubError(
            f"{what}: {_explain(error, repo_id, kind, revision)}; {_TRIES} tries were made"
        ) from error
    log.info("%s: %s: trying again", what, _reason(error))
    time.sleep(_WAIT_S * attempt)


def _explain(error: Exception, repo_id: str, kind: str, revision: str | None) -> str:
    """What happened and the remedy, for the user."""
    from huggingface_hub.errors import HFValidationError

    root = _root(error)
    if isinstance(root, HFValidationError):
        return f"no hub id ({first_line(root)}): give owner/name"
    return _explain_answer(root, repo_id, kind, revision) or _explain_connection(root)


def _explain_answer(root: BaseException, repo_id: str, kind: str, revision: str | None) -> str | None:
    """What the hub refuses and the remedy; None where it did not answer."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    endpoint, noun = constants.ENDPOINT, _noun(kind)
    page = f"{endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
    login = "`hf auth login` or HF_TOKEN"
    status = _status(root)
    if _names(root) & _BAD_TOKEN or (status == 401 and "invalid credentials" in str(root).lower()):
        return (
            f"the hub does not accept your token: make a new one at {endpoint}/settings/tokens ({login}), "
            "or unset HF_TOKEN"
        )
    if isinstance(root, GatedRepoError):
        return f"gated: log in on {page} and accept its terms, then log in here with {login}"
    if isinstance(root, DisabledRepoError):
        return f"disabled on the hub, see {page}: give another {noun}, or a local folder"
    is_of_the_whole = not isinstance(root, RemoteEntryNotFoundError | RevisionNotFoundError)
    if isinstance(root, RepositoryNotFoundError) or (status in (401, 404) and is_of_the_whole):
        return f"no {noun} of this id at {endpoint}, or a private one: check the id, or log in with {login}"
    if isinstance(root, RevisionNotFoundError):
        return (
            f"has no revision {revision or 'main'!r}: give a branch, a tag or a full commit hash from "
            f"{page}/commits"
        )
    if isinstance(root, RemoteEntryNotFoundError):
        path = root.response.url.path
        return (
            f"the hub lists {path} and does not have it: give another revision, or download the files by "
            "hand and give the folder"
        )
    match status:
        case None:
            return None
        case 403:
            return f"the hub refuses access (403): use a token that may read {page} ({login})"
        case 429:
            wait = root.response.headers.get("Retry-After") if hasattr(root, "response") else None
            return (
                f"the hub limits your rate (429): wait {f'{wait} s' if wait else 'some minutes'} and run "
                f"again; {login} raises the limit"
            )
    return f"the hub answered {status}: run the same command again later; what arrived whole is kept"


def _explain_connection(root: BaseException) -> str:
    """Why there is no answer, or only a part of it, and the remedy."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    endpoint = constants.ENDPOINT
    if isinstance(root, LocalEntryNotFoundError):
        offline = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the hub cannot be reached"
        return (
            f"not complete in the cache ({constants.HF_HUB_CACHE}) and {offline}: go online once, or give a "
            "local folder"
        )
    if _names(root) & _NO_CONNECTION or (_is_transport(root) and not _may_pass(root)):
        return (
            f"{endpoint} cannot be reached ({_reason(root)}): check network, proxy and HF_ENDPOINT, or give "
            "a local folder"
        )
    if _may_pass(root):
        return (
            f"the transfer broke off ({_reason(root)}): run the same command again; files that arrived "
            "whole are kept"
        )
    if isinstance(root, ValueError | KeyError):
        return (
            f"{endpoint} does not answer as a hub ({_reason(root)}): check HF_ENDPOINT and the proxy, or "
            "give a local folder"
        )
    return (
        f"could not be fetched ({_reason(root)}): run again, with HF_HUB_DISABLE_XET=1 for plain transfers, "
        "or give a local folder"
    )


def _root(error: BaseException) -> BaseException:
    """The error that tells most: the client hides the hub's answer behind "not found in the cache"."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause = error.__cause__
    hides = (
        isinstance(error, LocalEntryNotFoundError)
        and cause is not None
        and "OfflineModeIsEnabled" not in _names(cause)
    )
    return _root(cause) if hides and cause is not None else error


def _may_pass(error: BaseException) -> bool:
    """Whether another try may help: the connection stood and broke, or the hub is busy."""
    root = _root(error)
    status = _status(root)
    if status is not None:
        return status in (408, 429) or status >= 500
    if _is_transport(root):
        return not _names(root) & (_NO_CONNECTION | _BAD_TOKEN)
    # The client's words where fewer bytes came than announced.
    return isinstance(root, OSError) and "Consistency check failed" in str(root)


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _names(error: BaseException) -> set[str]:
    return {base.__name__ for base in type(error).__mro__}


def _is_transport(error: BaseException) -> bool:
    return "TransportError" in _names(error)


def _is_answer(error: BaseException) -> bool:
    """Whether an `OSError` tells of the hub or its cache rather than of a file that cannot be written."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    return isinstance(error, HfHubHTTPError | LocalEntryNotFoundError) or _is_transport(error)


def _reason(error: BaseException) -> str:
    status = _status(error)
    return f"the hub answered {status}" if status else f"{type(error).__name__}: {first_line(error)}"


def _is_commit(revision: str) -> bool:
    return len(revision) == 40 and set(revision) <= set("0123456789abcdef")


def _noun(kind: str) -> str:
    return "data set" if kind == "dataset" else "model"


def _file_names(repo_id: str, kind: str, commit: str) -> list[str]:
    """The names of all files of a commit that was listed before, without asking the hub; empty for any
    other.
    """
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return sorted(file.path for file in get_cached_repo_tree(repo_id, repo_type=kind, revision=commit))
    except CachedRepoTreeNotFoundError:
        return []


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED_FILES} more" if len(names) > _LISTED_FILES else ""
    return f"{', '.join(names[:_LISTED_FILES])}{more}" if names else "no files"


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar class for the client that reports the bytes of all files together to our own console."""
    from tqdm import tqdm

    with track("fetch", 0, "MiB") as task:
        lock = threading.Lock()

        class Bar(tqdm):  # type: ignore[misc]
            monitor_interval = 0

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, "file": io.StringIO()})

            def display(self, *args: Any, **kwargs: Any) -> None:
                # The client keeps several bars; those in bytes all count the same files.
                if self.unit == "B":
                    with lock:
                        task.set_total(max(task.total, round((self.total or 0) / 2**20)))
                        task.advance(max(0, int(self.n / 2**20) - task.completed))

        yield Bar
