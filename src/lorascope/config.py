"""A study file and its layers, read into a `schema.StudyConfig`, or one line that says what is wrong.

Layers, from weakest to strongest: defaults < preset < study file < `LORASCOPE_*` environment < `--set`
overrides.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from lorascope.errors import ConfigError, first_line, shown
from lorascope.reference import alternatives, annotation_at, type_name
from lorascope.schema import StudyConfig
from lorascope.store import read_regular

ENVIRONMENT_PREFIX = "LORASCOPE_"
_LINE_BREAKS = "[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]"  # what str.splitlines takes for the end of a line
_MAX_FILE_BYTES = 2**22  # a preset has 2 kB
_MAX_DEPTH = 16  # tables in tables; the schema has 4
_PAIRS = (("alpha", "alpha_per_rank"), ("lr", "match_gain"))
_EXCLUSIVE = (*_PAIRS, *(pair[::-1] for pair in _PAIRS))
_PRESETS = resources.files("lorascope") / "presets"


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(
        entry.name.removesuffix(".toml") for entry in _PRESETS.iterdir() if entry.name.endswith(".toml")
    )


def preset_text(name: str) -> str:
    """The TOML text of a preset; raise `ConfigError` if there is none of that name."""
    if name not in preset_names():
        raise ConfigError(
            f"preset {name!r}: must be one of "
            f"{', '.join(preset_names())}{_did_you_mean(name, preset_names())}"
        )
    return (_PRESETS / f"{name}.toml").read_text(encoding="utf-8")


def load_study(
    path: Path | str | None = None,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> StudyConfig:
    """Read a study from its layers.

    `path` is a TOML file, whose key `preset` may name the preset it starts from; `preset` wins over that key,
    and with neither file nor preset the study is `pocket`. `environment` stands for `os.environ`. `overrides`
    are `key=value` with a dotted key and a TOML value; a bare word is text, and nothing after the `=` takes
    the key away. Raises `ConfigError`, one line with origin, key, value, constraint and the nearest known
    word.
    """
    with _in_one_line():
        text = None if path is None else _read_text(Path(path))
        return _load(text, Path(path or "study"), preset, overrides, _or_own(environment))


def parse_study(text: str, name: str = "study", environment: Mapping[str, str] | None = None) -> StudyConfig:
    """A study from the text of a study file, with the layers that `load_study` has around a file; messages
    call it `name`, and so is the study where the text does not name it.
    """
    with _in_one_line():
        return _load(text, Path(name), None, (), _or_own(environment))


def _or_own(environment: Mapping[str, str] | None) -> Mapping[str, str]:
    return os.environ if environment is None else environment


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Names and keys of files may hold ends of lines: messages show them escaped."""
    try:
        yield
    except ConfigError as error:
        text = re.sub(_LINE_BREAKS, lambda found: found[0].encode("unicode_escape").decode(), str(error))
        raise ConfigError(text) from error.__cause__


def _load(
    text: str | None,
    path: Path,
    preset: str | None,
    overrides: Sequence[str],
    environment: Mapping[str, str],
) -> StudyConfig:
    layers: list[tuple[str, dict[str, Any]]] = []
    if text is not None:
        table = _parse_toml(text, str(path))
        in_file = table.pop("preset", None)
        if in_file is not None and in_file not in preset_names():
            near = _did_you_mean(str(in_file), preset_names())
            raise ConfigError(
                f"{path}: preset = {shown(in_file)}: must be one of {', '.join(preset_names())}{near}"
            )
        preset = preset or in_file
        table.setdefault("name", _name_of_file(path))
        layers.append((str(path), table))
    elif preset is None:
        preset = "pocket"
    if preset is not None:
        layers.insert(0, (f"preset {preset}", _parse_toml(preset_text(preset), f"preset {preset}")))
    layers.extend(_from_environment(environment))
    layers.extend(("--set", _parse_override(text)) for text in overrides)

    values = StudyConfig().model_dump(mode="json", exclude_none=True)
    origins: dict[str, str] = {}
    for origin, table in layers:
        _require_shallow(table, origin)
        _lay(values, table, origin, origins)
    try:
        return StudyConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, values, origins)) from None


def _require_shallow(table: Mapping[str, Any], origin: str) -> None:
    """Raise `ConfigError` where tables and lists stand in each other so deep that nothing here would take
    them.
    """
    level: list[Any] = [table]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for value in level
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise ConfigError(
        f"{origin}: tables and lists stand in each other more than {_MAX_DEPTH} deep: no key takes that, see "
        "`lorascope keys`"
    )


def _name_of_file(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("._-")[:64] or "study"


def _read_text(path: Path) -> str:
    try:  # some editors write a byte order mark
        return read_regular(path, ConfigError, _MAX_FILE_BYTES).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: no such study file: check the path, or use --preset with one of "
            f"{', '.join(preset_names())}"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error


def _parse_toml(text: str, origin: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: not valid TOML: {first_line(error)}") from error


def _parse_override(text: str) -> dict[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {text}: must be key=value, for example --set train.epochs=2")
    keys = key.strip().split(".")
    if keys == ["preset"]:
        raise ConfigError(
            f"--set {text}: a preset cannot be set over other layers: use --preset {value.strip()}"
        )
    return _nest(keys, _parse_value(keys, value.strip()))


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A layer for each variable: `LORASCOPE_TRAIN_EPOCHS=2` sets `train.epochs`, `LORASCOPE_ARMS_0_LR` sets
    `arms.0.lr`.

    Variables that name neither a section nor a top-level key are left to other parts of the program.
    """
    for variable in sorted(environment):
        section, *rest = variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("_", 1)
        if not variable.startswith(ENVIRONMENT_PREFIX) or section not in StudyConfig.model_fields:
            continue
        keys = [section, *rest[0].split("_", 1)] if section == "arms" and rest else [section, *rest]
        yield f"environment {variable}", _nest(keys, _parse_value(keys, environment[variable].strip()))


def _parse_value(keys: Sequence[str], text: str) -> Any:
    """A TOML value; what is not TOML is text, as is everything for a key that holds text, such as a commit of
    digits.
    """
    if text == "":
        return None
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
    takes_text = alternatives(annotation_at(keys)) == [str]
    return text if takes_text and not isinstance(value, str | list | dict) else value


def _nest(keys: Sequence[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value


def _lay(
    values: Any, table: Mapping[str, Any], origin: str, origins: dict[str, str], prefix: str = ""
) -> None:
    """Lay `table` over `values`, a table or a list: tables are merged and `0`, `1`, .. reach into lists; all
    else is replaced.

    Of two keys that exclude each other, such as `alpha` and `alpha_per_rank`, a layer that gives one takes a
    weaker layer's other away.
    """
    for key, other in _EXCLUSIVE:
        if (
            isinstance(values, dict)
            and key in table
            and _layer(origins.get(f"{prefix}{other}", "")) != _layer(origin)
        ):
            values.pop(other, None)
    for key, value in table.items():
        place = f"{prefix}{key}"
        index: Any = key
        if isinstance(values, list):
            if not (key.isascii() and key.isdigit() and int(key) < len(values)):
                last = f"; the last here is {prefix}{len(values) - 1}" if values else "; there is none here"
                raise ConfigError(f"{origin}: {place}: items are counted from 0{last}")
            index = int(key)
        old = values.get(key) if isinstance(values, dict) else values[index]
        if isinstance(value, dict) and isinstance(old, dict | list):
            origins[place] = origin
            _lay(old, value, origin, origins, f"{place}.")
        else:
            values[index] = value
            origins.update(dict.fromkeys(_places(value, place), origin))


def _layer(origin: str) -> str:
    return origin.partition(f" {ENVIRONMENT_PREFIX}")[0]  # all variables of the environment are one layer


def _places(value: Any, place: str) -> Iterator[str]:
    """`place` and the dotted keys of everything in `value`."""
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, f"{place}.{key}")


_CONSTRAINTS = {
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "finite_number": "a finite number",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "1 to 64 letters, digits, '.', '_' and '-', the first a letter or digit",
    "too_short": "a list with at least one item",
}


def _explain(error: ValidationError, values: Any, origins: Mapping[str, str]) -> str:
    """The first problem as one line: origin, key, value, constraint, nearest match."""
    problems = [(_keys(item["loc"], values), item) for item in error.errors(include_url=False)]
    # A list with a wrong item is also called too short, and "one or a list" fails as both: what counts is the
    # innermost place, and there the constraint rather than the type. An unknown key goes first, since it
    # often explains the rest.
    outer = {tuple(keys[:end]) for keys, _ in problems for end in range(len(keys))}
    innermost = [(keys, item) for keys, item in problems if tuple(keys) not in outer]
    order: dict[tuple[str, ...], int] = {}
    for keys, _ in innermost:
        order.setdefault(tuple(keys), len(order))
    keys, item = min(
        innermost,
        key=lambda problem: (
            problem[1]["type"] != "extra_forbidden",
            order[tuple(problem[0])],
            problem[1]["type"].endswith("_type"),
        ),
    )
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "missing":  # too few items where their number is fixed; `value` is the list
        keys = keys[:-1]
    place = ".".join(key if len(key) <= 80 else f"{key[:77]}..." for key in keys)
    origin = next(
        (
            origins[name]
            for name in (".".join(keys[:end]) for end in range(len(keys), 0, -1))
            if name in origins
        ),
        "study",
    )
    given = f"{origin}: {place}{'' if isinstance(value, dict) else f' = {shown(value)}'}"
    match kind:
        case "extra_forbidden":
            known = [*annotation_at(keys[:-1]).model_fields, *(["preset"] if len(keys) == 1 else [])]
            return (
                f"{origin}: {place}: unknown key; known here: "
                f"{', '.join(known)}{_did_you_mean(keys[-1], known)}"
            )
        case "value_error":
            return (
                f"{given}: {context['error']}"
                if keys
                else f"{origins.get('arms', 'study')}: {context['error']}"
            )
        case "literal_error":
            choices = get_args(annotation_at(keys))
            constraint = f"one of {', '.join(choices)}{_did_you_mean(str(value), choices)}"
        case _ if kind in _CONSTRAINTS:
            constraint = _CONSTRAINTS[kind].format_map(
                {
                    name: f"{limit:.15g}" if isinstance(limit, float) else limit
                    for name, limit in context.items()
                }
            )
        case _:
            names = type_name(annotation_at(keys)).split(" or ")
            constraint = " or ".join(name if name == "text" else f"a {name}" for name in names)
    return f"{origin}: {place} = {shown(value)}: must be {constraint}"


def _keys(location: Sequence[str | int], values: Any) -> list[str]:
    """Pydantic's place of a problem as keys of the study: without the names it puts in between for the
    branches of unions.
    """
    keys = []
    for part in location:
        if isinstance(part, int) or (isinstance(values, dict) and part in values):
            keys.append(str(part))
            values = values[part] if isinstance(part, str) or part < len(values) else None
    return keys


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" - did you mean {near[0]!r}?" if near else ""
