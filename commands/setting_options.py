"""Options made from the settings of a config dataclass (``core/settings.py``)."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Collection
from typing import Any

import click

from commands.types import Count, Finite, count
from core.files import json_of
from core.rows import Row
from core.settings import BELOW, CHOICES, FLAG, HELP, HIGH, LOW, default_of

Decorator = Callable[..., Any]


def flag_of(field: dataclasses.Field[Any]) -> str:
    """The option of a setting."""
    return field.metadata.get(FLAG) or f"--{field.name.replace('_', '-')}"


def setting_options(config: type[Any], by_preset: Collection[str] = ()) -> list[Decorator]:
    """One option per field of the config; the settings that presets change say so."""
    hints = typing.get_type_hints(config)
    return [
        _setting_option(field, hints[field.name], field.name in by_preset)
        for field in dataclasses.fields(config)
    ]


def _setting_option(field: dataclasses.Field[Any], hint: Any, by_preset: bool) -> Decorator:
    """A setting as an option; not given is None, and then the preset or the default holds."""
    kind, default = _plain(hint), default_of(field)
    text = field.metadata.get(HELP, "")
    if "[default:" not in text and default not in (None, (), {}) and kind is not bool:
        shown = ", ".join(map(str, default)) if isinstance(default, tuple) else default
        text += " [default: by preset]" if by_preset else f" [default: {shown}]"
    options: Row = {"help": text, "default": None, "show_default": False}
    flag = flag_of(field)
    if kind is bool:
        if by_preset:  # so that a preset's yes can be taken back
            flag += f"/--no-{flag.removeprefix('--')}"
        return click.option(flag, field.name, is_flag=True, **options)
    if kind is dict:
        return click.option(flag, field.name, multiple=True, metavar="NAME=JSON", **options)
    if kind is tuple:
        numbers = int in typing.get_args(hint)
        choices = count() if numbers else click.Choice(field.metadata.get(CHOICES, ()))
        options["metavar"] = "NUMBER" if numbers else "NAME"
        return click.option(flag, field.name, type=choices, multiple=True, **options)
    return click.option(flag, field.name, type=_type_of(kind, field.metadata), **options)


def _plain(hint: Any) -> type[Any]:
    """``int | None`` -> int, ``tuple[str, ...]`` -> tuple."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.get_origin(hint) or hint


def _type_of(kind: type[Any], metadata: Any) -> Any:
    if metadata.get(CHOICES):
        return click.Choice(metadata[CHOICES])
    if kind is int:
        return Count(metadata.get(LOW), metadata.get(HIGH))
    if kind is float:
        below = metadata.get(BELOW)
        high = metadata.get(HIGH) if below is None else below
        return Finite(metadata.get(LOW), high, max_open=below is not None)
    return str


def _json_pairs(pairs: tuple[str, ...]) -> Row:
    """``("buffer_size=4",)`` -> {"buffer_size": 4}."""
    values = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            values[name] = json_of(value)
        except ValueError as error:
            example = "for example buffer_size=4"
            raise click.BadParameter(f"{pair!r}: expected NAME=JSON, {example}") from error
    return values


def given_settings(config: type[Any], options: Row) -> Row:
    """The settings that were given on the command line."""
    hints = typing.get_type_hints(config)
    values = {}
    for name, value in options.items():
        if value is not None and value != ():
            values[name] = _json_pairs(value) if _plain(hints[name]) is dict else value
    return values
