"""The study file as a form: every key with its type, range, default and meaning from the schema, and texts of
a browser as values.
"""

import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from lorascope.errors import ConfigError
from lorascope.reference import alternatives, annotation_at, type_name
from lorascope.schema import StudyConfig
from lorascope.sections import Section

TITLES = {
    "": "The study",
    "base": "Base model",
    "data": "Pictures and captions",
    "adapter": "Layers that are adapted",
    "arms": "Arms: the adapters to compare",
    "train": "Training",
    "sample": "Pictures that are drawn",
    "score": "Scores",
    "diagnose": "Diagnosis",
    "verdict": "Verdict",
    "export": "Files for other programs",
}
_TABLES = ("arms", "adapter.groups")  # of which there may be several
_LIMITS = (
    (annotated_types.Ge, "ge", "at least {}"),
    (annotated_types.Gt, "gt", "more than {}"),
    (annotated_types.Le, "le", "at most {}"),
    (annotated_types.Lt, "lt", "less than {}"),
    (annotated_types.MultipleOf, "multiple_of", "a multiple of {}"),
)


@dataclass(frozen=True)
class Field:
    """One key as a form shows it. `value` is what the file says, empty where it says nothing, `default` what
    then holds; `options` are all there are, where there are few.
    """

    key: str
    kind: str
    limits: str
    meaning: str
    options: tuple[str, ...]
    default: str
    value: str

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition(".")[2]

    @property
    def place(self) -> str:
        """The key as the id of an element."""
        return place_of(self.key)


@dataclass(frozen=True)
class Table:
    """The fields of one table. `number` is its place among several, None where there is one."""

    key: str
    title: str
    number: int | None
    fields: tuple[Field, ...]

    @property
    def num_given(self) -> int:
        """How many keys the file says something of."""
        return sum(field.value != "" for field in self.fields)


@dataclass(frozen=True)
class Part:
    """A part of the form. `several` is the key of tables of which there may be more, or empty."""

    key: str
    title: str
    tables: tuple[Table, ...]
    several: str


def place_of(key: str) -> str:
    """A key as the id of an element."""
    return "key-" + re.sub(r"[^A-Za-z0-9]", "-", key)


def build_form(table: Mapping[str, Any], config: StudyConfig | None) -> list[Part]:
    """All parts of the form for what a file says; `config` is the study where it is right."""
    shown = config.model_dump(mode="json") if config is not None else {}
    parts = [Part("", TITLES[""], (_table("", TITLES[""], None, StudyConfig, table, shown),), "")]
    for key, info in StudyConfig.model_fields.items():
        kind = annotation_at([key])
        if key == "arms":
            parts.append(Part(key, TITLES[key], tuple(_several(key, table, shown)), key))
        elif isinstance(kind, type) and issubclass(kind, Section):
            given, holds = _at(table, key), _at(shown, key)
            tables = [_table(key, info.description or TITLES[key], None, kind, given, holds)]
            if key == "adapter":
                tables += _several("adapter.groups", table, shown)
            parts.append(Part(key, TITLES[key], tuple(tables), "adapter.groups" if key == "adapter" else ""))
    return parts


def _several(key: str, table: Mapping[str, Any], shown: Mapping[str, Any]) -> Iterator[Table]:
    kind = annotation_at([*key.split("."), "0"])
    given, holds = _list_at(table, key), _list_at(shown, key)
    for index in range(max(len(given), len(holds) if not given else 0)):
        own = given[index] if index < len(given) and isinstance(given[index], dict) else {}
        held = holds[index] if index < len(holds) else {}
        yield _table(f"{key}.{index}", f"Table {index + 1}", index, kind, own, held)


def _at(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = table.get(key, {})
    return found if isinstance(found, dict) else {}


def _list_at(table: Mapping[str, Any], key: str) -> list[Any]:
    *path, last = key.split(".")
    place: Any = table
    for part in path:
        place = _at(place, part)
    found = place.get(last, [])
    return list(found) if isinstance(found, list | tuple) else []


def _table(
    key: str,
    title: str,
    number: int | None,
    kind: type[Section],
    given: Mapping[str, Any],
    holds: Mapping[str, Any],
) -> Table:
    prefix = f"{key}." if key else ""
    fields = []
    for name, info in kind.model_fields.items():
        if f"{prefix}{name}" in _TABLES or _is_section(info.annotation):
            continue
        value = given.get(name)
        default = holds.get(name, info.default) if value is None else info.default
        fields.append(
            Field(
                key=f"{prefix}{name}",
                kind=type_name(info.annotation),
                limits=limits_of(info),
                meaning=info.description or "",
                options=_options(info.annotation),
                default=as_text(default),
                value="" if value is None else as_text(value),
            )
        )
    return Table(key, title, number, tuple(fields))


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _options(annotation: Any) -> tuple[str, ...]:
    kinds = alternatives(annotation)
    if kinds == [bool]:
        return ("true", "false")
    if len(kinds) == 1 and get_origin(kinds[0]) is Literal:
        return tuple(map(str, get_args(kinds[0])))
    return ()


def limits_of(info: FieldInfo) -> str:
    """The range of a key in words, empty where there is none."""
    metadata = [*info.metadata, *_metadata_in(info.annotation)]
    words = []
    for kind, attribute, template in _LIMITS:
        found = next((item for item in metadata if isinstance(item, kind)), None)
        if found is not None:
            limit = getattr(found, attribute)
            # Of what only must not be absurd nothing is said.
            if not (isinstance(limit, float) and limit == 1e-12) and limit < 1e15:
                words.append(template.format(f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"))
    return ", ".join(words)


def _metadata_in(annotation: Any) -> Iterator[Any]:
    """Constraints within an annotation, of the items where it is a list."""
    if annotation is NoneType:
        return
    if get_origin(annotation) is Annotated:
        inner, *constraints = get_args(annotation)
        for item in constraints:
            yield from item.metadata if isinstance(item, FieldInfo) else [item]
        yield from _metadata_in(inner)
    elif get_origin(annotation) is not Literal:
        for item in get_args(annotation):
            if item is not Ellipsis and not isinstance(item, str):
                yield from _metadata_in(item)


# -- texts and values ----------------------------------------------------------------------------------------


def as_text(value: Any) -> str:
    """A value as a form shows it."""
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case str():
            return value
        case int() | float():
            return f"{value:.15g}"
        case list() | tuple():
            return ", ".join(map(as_text, value)) if all(map(_is_scalar, value)) else str(list(value))
        case dict():
            return (
                "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
                if value
                else ""
            )
        case _:
            return str(value)


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, list | tuple | dict)


def _toml(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else as_text(value)


def as_value(key: str, text: str) -> Any:
    """A text of a form as the value that it is for this key; what is none is left to the schema to refuse."""
    text = text.strip()
    kinds = alternatives(annotation_at(key.split(".")))
    lists = [kind for kind in kinds if get_origin(kind) is tuple]
    if lists and (len(lists) == len(kinds) or "," in text or text.startswith("[")):
        if text.startswith("["):
            return _parsed(text)
        items = [item.strip() for item in text.split(",")]
        return [_as_scalar(get_args(lists[0])[0], item) for item in items if item]
    return _as_scalar(next((kind for kind in kinds if kind not in lists), str), text)


def _as_scalar(kind: Any, text: str) -> Any:
    kinds = alternatives(kind)
    if all(item is str or get_origin(item) is Literal for item in kinds):
        return text
    return _parsed(text)


def _parsed(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def set_keys(table: dict[str, Any], texts: Mapping[str, str], config: StudyConfig | None) -> None:
    """Lay the texts of a form over a file's table; an empty one takes the key away.

    Where arms are changed that stand in no file, but in the defaults or the preset, they are written down.
    Raises `ConfigError` for a key that no study has.
    """
    for key, text in texts.items():
        path = key.split(".")
        if annotation_at(path) is None or annotation_at(path[:-1]) is None:
            raise ConfigError(f"{key[:80]}: unknown key: see `lorascope keys`")
        if path[0] == "arms" and "arms" not in table:
            if not text.strip():
                continue
            table["arms"] = _written(config)
        place = _open(table, path[:-1])
        if not text.strip():
            place.pop(path[-1], None)
            continue
        place[path[-1]] = as_value(key, text)
        _drop_rival(place, path[-1], texts, key)
    for key in [key for key, value in table.items() if value == {}]:
        del table[key]


def _drop_rival(place: dict[str, Any], key: str, texts: Mapping[str, str], whole: str) -> None:
    """Of two keys that exclude each other the one that was set last stays, where one alone was set."""
    rivals = {"alpha": "alpha_per_rank", "lr": "match_gain"}
    rivals |= {second: first for first, second in rivals.items()}
    rival = rivals.get(key)
    if rival in place and f"{whole.rpartition('.')[0]}.{rival}" not in texts:
        del place[rival]


def _written(config: StudyConfig | None) -> list[dict[str, Any]]:
    if config is None:
        return [{}]
    return [grid.model_dump(mode="json", exclude_none=True, exclude_defaults=True) for grid in config.arms]


def _open(table: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The table at a path, made where it is not there."""
    place: Any = table
    for index, part in enumerate(path):
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise ConfigError(f"{'.'.join(path)}: there is no such table any more: load the page again")
            place = place[int(part)]
            continue
        is_list = index + 1 < len(path) and path[index + 1].isdigit()
        found = place.get(part)
        if not isinstance(found, list if is_list else dict):
            found = place[part] = [] if is_list else {}
        place = found
    return place if isinstance(place, dict) else {}


def add_table(table: dict[str, Any], key: str, config: StudyConfig | None) -> None:
    """One more table of `arms` or of `adapter.groups`, to be filled in."""
    tables = _tables_at(table, key, config)
    tables.append({"rank": 16} if key == "arms" else {"targets": ["proj_in"]})


def remove_table(table: dict[str, Any], key: str, number: int, config: StudyConfig | None) -> None:
    """Take a table of `arms` or of `adapter.groups` away."""
    tables = _tables_at(table, key, config)
    if not 0 <= number < len(tables):
        raise ConfigError(f"{key}.{number}: there is no such table any more: load the page again")
    if key == "arms" and len(tables) == 1:
        raise ConfigError("arms: a study has at least one table of arms: change this one")
    del tables[number]


def _tables_at(table: dict[str, Any], key: str, config: StudyConfig | None) -> list[dict[str, Any]]:
    if key not in _TABLES:
        raise ConfigError(
            f"{key[:80]}: of this there is one table: tables are added to {' and '.join(_TABLES)}"
        )
    if key == "arms" and not isinstance(table.get("arms"), list):
        table["arms"] = _written(config)
    *path, last = key.split(".")
    place = _open(table, path)
    if not isinstance(place.get(last), list):
        place[last] = []
    tables: list[dict[str, Any]] = place[last]
    return tables


def fault_at(message: str, origins: Iterable[str]) -> tuple[str, str]:
    """The key that a message on a study is about, empty where it is about none, and what is wrong there."""
    rest = next(
        (message.removeprefix(f"{origin}: ") for origin in origins if message.startswith(f"{origin}: ")),
        message,
    )
    found = re.match(r"([a-z_]+(?:\.[\w-]+)*)(?: = |: )", rest)
    if found is None or (
        annotation_at(found[1].split(".")) is None and found[1].split(".")[0] not in StudyConfig.model_fields
    ):
        return "", rest
    item = re.fullmatch(r"(.+)\.\d+", found[1])
    is_in_list = item is not None and item[1] not in _TABLES
    return (item[1] if item is not None and is_in_list else found[1]), rest
