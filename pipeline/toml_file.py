"""TOML files of settings: read whole, checked table by table, every fault with its place."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from attacks.registry import Attack, find_attack
from core.errors import AttackPlaneError
from core.files import require_regular
from core.rows import Row
from core.typed import from_values

T = TypeVar("T")
AttackChoice = tuple[Attack, Any]
"""An attack and its config."""


def read_toml(path: Path, what: str) -> Row:
    """The file's values.

    Raises:
        AttackPlaneError: it cannot be read, or is no TOML.
    """
    require_regular(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise AttackPlaneError(f"cannot read the {what}", where=path, got=error) from error
    except (ValueError, RecursionError) as error:
        raise AttackPlaneError("not a TOML file", where=path, got=error) from error


@contextmanager
def faults_of(path: Path) -> Iterator[None]:
    """While open, every fault that is found names the file."""
    try:
        yield
    except AttackPlaneError as error:
        if str(path) in str(error):
            raise
        raise error.at(path) from error


def table_of(cls: type[T], values: Any, where: str) -> T:
    """A config dataclass from one table.

    Raises:
        AttackPlaneError: no table, an unknown key (the nearest known one is named), or a bad value.
    """
    if not isinstance(values, dict):
        raise AttackPlaneError("expected a table", where=where, got=repr(values))
    return from_values(cls, values, where)


def attack_of(name: str, values: Any, where: str, judge: str | None = None) -> AttackChoice:
    """One attack's table; an attack with a success test takes ``judge``."""
    attack, fixed = find_attack(name)
    if not isinstance(values, dict):
        raise AttackPlaneError("expected a table", where=where, got=repr(values))
    if not attack.command:
        raise AttackPlaneError(f"{name} is a baseline and comes by itself", where=where)
    if judge and "judge" in attack.config.__dataclass_fields__:
        values = {"judge": judge, **values}
    return attack, attack.make_config({**values, **fixed}, where=where)
