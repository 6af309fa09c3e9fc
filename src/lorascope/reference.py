"""The schema read back: what may stand at a key, its type in words, the table of all keys for the docs."""

import json
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from lorascope.schema import StudyConfig
from lorascope.sections import Section


def reference_table() -> str:
    """The table of all keys for the docs, in Markdown, made from the schema."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for section, field in StudyConfig.model_fields.items():
        lines.extend(_reference_rows(section, field))
    return "\n".join(lines) + "\n"


def _reference_rows(key: str, field: FieldInfo) -> Iterator[str]:
    """A row for a key, or for every key of a table or of a list of tables."""
    kind: Any = annotation_at([*key.split("."), "0"]) or field.annotation
    if not _is_section(kind):
        default = "" if field.default is None else f"`{json.dumps(field.default)}`"
        yield f"| `{key}` | {type_name(field.annotation)} | {default} | {field.description} |"
        return
    for name, item in kind.model_fields.items():
        yield from _reference_rows(f"{key}.{name}", item)


def annotation_at(keys: Sequence[str]) -> Any:
    """The annotation of what stands at a dotted key; None where nothing is known to stand."""
    kind: Any = StudyConfig
    for key in keys:
        if _is_section(kind):
            kind = kind.model_fields[key].annotation if key in kind.model_fields else None
        else:
            kind = next(
                (get_args(branch)[0] for branch in alternatives(kind) if get_origin(branch) is tuple), None
            )
    return kind


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def alternatives(annotation: Any) -> list[Any]:
    """The types an annotation allows, without constraints and None."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [
            kind for branch in get_args(annotation) if branch is not NoneType for kind in alternatives(branch)
        ]
    return [annotation]


def type_name(annotation: Any) -> str:
    """An annotation in words, such as `whole number or list of whole numbers`."""
    return " or ".join(_plain_name(kind) for kind in alternatives(annotation))


def _plain_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is tuple:
        item, *others = get_args(kind)
        count = "" if Ellipsis in others else f"{1 + len(others)} "
        plural = type_name(item)
        return f"list of {count}{f'{plural}s' if plural.endswith(('number', 'table')) else plural}"
    if _is_section(kind) or get_origin(kind) is dict:
        return "table"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}[kind]
