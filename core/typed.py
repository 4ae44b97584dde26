"""Values from files against the types of a dataclass: the one reader of settings and rows.

Types are taken strictly: ``true`` is no number, ``1.5`` no whole number, ``"8"`` neither, and a
number must be finite. Lists stand for tuples.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, TypeVar

from core.errors import AttackPlaneError, nearest
from core.rows import Row

T = TypeVar("T")
MISSING = dataclasses.MISSING


def from_values(cls: type[T], values: Row, where: str, *, of: str = "setting") -> T:
    """Build a dataclass from a table of a file, or a row.

    Args:
        of: what a field is called in messages.

    Raises:
        AttackPlaneError: an unknown field (the nearest known one is named), a missing one, a value
            of a wrong type, or one that the class itself refuses.
    """
    checked = _checked_at_once(cls, values)
    if checked is None:  # something is wrong: what?
        checked = _checked_one_by_one(cls, values, where, of)
    try:
        return cls(**checked)
    except AttackPlaneError as error:
        raise error.at(where) from error


def _checked_at_once(cls: Any, values: Row) -> Row | None:
    """The values, if all are of their types; None where one is not, is unknown or lacks.

    Rows come by the million, and one call takes a fifth of the time of one for each field.
    """
    try:
        return dict(_whole(cls)(values, strict=True))
    except ValueError:  # pydantic's ValidationError is one
        return None


def _checked_one_by_one(cls: type[Any], values: Row, where: str, of: str) -> Row:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise AttackPlaneError(
                f"unknown {of} {name!r}", where=where, remedy=nearest(str(name), list(fields))
            )
    needed = [f.name for f in fields.values() if f.default is f.default_factory is MISSING]
    missing = [name for name in needed if name not in values]
    if missing:
        raise AttackPlaneError(
            f"lacks {', '.join(missing)}", where=where, got=sorted(values) or "{}"
        )
    return {name: _checked(cls, name, value, where) for name, value in values.items()}


def _checked(cls: Any, name: str, value: Any, where: str) -> Any:
    from pydantic import ValidationError

    if isinstance(value, list) and _is_tuple(cls, name):
        value = tuple(value)
    try:
        return _adapters(cls)[name].validate_python(value, strict=True)
    except ValidationError as error:
        raise _fault(error, where, name) from None


def _fault(error: Any, where: str, *outer: str, remedy: str | None = None) -> AttackPlaneError:
    """What pydantic's first error is told as; ``outer``: fields around the place that it names."""
    first = error.errors()[0]
    place = ".".join([*outer, *(str(part) for part in first["loc"])])
    got = repr(first["input"])[:200]
    return AttackPlaneError(f"{place}: {first['msg'].lower()}", where=where, got=got, remedy=remedy)


@cache
def _whole(cls: Any) -> Callable[..., Row]:
    """Checks all fields of a class in one call. Lists that stand for tuples are not taken."""
    from pydantic_core import CoreConfig, SchemaValidator, core_schema

    needed = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is MISSING}
    fields = {
        name: core_schema.typed_dict_field(adapter.core_schema, required=name in needed)
        for name, adapter in _adapters(cls).items()
    }
    config = CoreConfig(allow_inf_nan=False, strict=True)
    schema = core_schema.typed_dict_schema(fields, extra_behavior="forbid", config=config)
    return SchemaValidator(schema).validate_python


@cache
def _adapters(cls: Any) -> dict[str, Any]:
    from pydantic import ConfigDict, TypeAdapter

    config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
    return {
        name: TypeAdapter(hint, config=None if typing.get_origin(hint) is Annotated else config)
        for name, hint in ((name, _closed(hint)) for name, hint in _hints(cls).items())
    }


def checked_row(row: Row, kind: Any, where: object, remedy: str) -> Row:
    """A row against a ``TypedDict``; keys that it does not name may be there too.

    Raises:
        AttackPlaneError: it does not fit; the field is named.
    """
    from pydantic import ValidationError

    try:
        _adapter(kind).validate_python(row, strict=True)
    except ValidationError as error:
        raise _fault(error, str(where), remedy=remedy) from None
    return row


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


class _Instance:
    """Marks a dataclass within a type: what is there has been read already, so only its class is
    looked at."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.is_instance_schema(source)


def _closed(hint: Any) -> Any:
    """The type with every dataclass in it marked."""
    if dataclasses.is_dataclass(hint):
        return Annotated[hint, _Instance()]
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    closed = tuple(map(_closed, parts))
    if origin is None or closed == parts:
        return hint
    return typing.Union[closed] if origin is types.UnionType else origin[closed]  # noqa: UP007


@cache
def _hints(cls: Any) -> dict[str, Any]:
    known = typing.get_type_hints(cls)
    return {f.name: known[f.name] for f in dataclasses.fields(cls)}


def _is_tuple(cls: Any, name: str) -> bool:
    hint = _hints(cls)[name]
    return any(typing.get_origin(part) is tuple for part in (hint, *typing.get_args(hint)))
