"""The errors a user can cause or meet. The command line prints each as one line and exits with its code.

Every message names the value received, the constraint and the remedy. Anything that is not a `LorascopeError`
is a fault of ours and exits with code 1.
"""

import json
from typing import Any

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_INPUT = 2
EXIT_RUN_FAILED = 3
EXIT_GATE_REJECTED = 4
EXIT_INTERRUPTED = 130


class LorascopeError(Exception):
    """Base of all errors that are the user's to fix."""

    exit_code = EXIT_INPUT


class ConfigError(LorascopeError):
    """A study file, preset, override or run folder that cannot be used as given."""


class DataError(LorascopeError):
    """Pictures, captions or prompts that cannot be used."""


class BaseModelError(LorascopeError):
    """A base model or scorer that cannot be loaded."""


class HubError(LorascopeError):
    """A model or data set that the hub does not give, or that cannot be fetched from it."""


class AdapterError(LorascopeError):
    """Adapter targets, files or merges that do not fit the base."""


class WeightsError(LorascopeError):
    """A weight file that cannot be used."""


class CacheError(LorascopeError):
    """Encoded latents or text states that do not belong to this run's inputs."""


class StorageError(LorascopeError):
    """The run folder cannot be written: full, read-only, or in use by another process."""

    exit_code = EXIT_RUN_FAILED


class RunError(LorascopeError):
    """Training, sampling or scoring failed; what was finished is kept."""

    exit_code = EXIT_RUN_FAILED


def first_line(error: BaseException) -> str:
    """The first line of a library's error, at most 200 characters, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def shown(value: Any) -> str:
    """A received value for an error message, as JSON, at most 80 characters."""
    try:
        text = "nothing" if value is None else json.dumps(value, default=str, ensure_ascii=False)
    except ValueError:  # Python writes no numbers of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
