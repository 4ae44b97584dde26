"""What a command prints: tables for people, or with ``--json`` their rows for programs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import click

ROWS = "attack_plane_rows"
"""Where a command keeps the stream of its rows."""


def _to_rows(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    """Send rows to standard output, and all else to standard error, for this command."""
    if value:
        ctx.meta[ROWS] = sys.stdout
        ctx.with_resource(contextlib.redirect_stdout(sys.stderr))


json_option = click.option(
    "--json",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_to_rows,
    help="Print the rows of tables as JSON lines; all else goes to standard error.",
)
"""``--json``, for a command that prints tables with ``echo_table``."""


def echo_table(
    table: Callable[..., str],
    of: Any,
    *,
    title: str = "",
    name: str = "",
    rows: Iterable[Any] | None = None,
    **how: Any,
) -> None:
    """Print a table under its title, or its rows; each says the table's name.

    Args:
        table: of ``commands/tables``; its name is that of the function, without ``_table``.
        of: what it is made of.
        name: of the table in rows, where the function's does not say enough.
        rows: what is printed with ``--json``, where it is not ``of``: mappings, dataclasses, or
            things with ``to_row``.
        how: passed to ``table``.
    """
    if not as_json():
        if text := table(of, **how):
            click.echo(f"{title}\n{text}" if title else text)
        return
    echo_rows(name or table.__name__.removesuffix("_table"), of if rows is None else rows)


def as_json() -> bool:
    """Whether this command was asked for rows."""
    return ROWS in click.get_current_context().meta


def echo_rows(name: str, rows: Iterable[Any]) -> None:
    """Print rows as JSON lines, if the command was asked for them."""
    stream: TextIO | None = click.get_current_context().meta.get(ROWS)
    if stream is not None:
        for row in rows:
            print(json.dumps({"table": name} | _plain(row)), file=stream)


def _plain(value: Any) -> Any:
    """What JSON has a form for; a number that is not finite is null."""
    if hasattr(value, "to_row"):
        value = value.to_row()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return [_plain(item) for item in value]
