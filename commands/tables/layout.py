"""How a table is laid out: columns as (title, how a row fills it), one line per row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from core.statistics import Interval
from core.text import aligned

Row = Mapping[str, Any]
Columns = Sequence[tuple[str, Callable[[Any], str]]]


def text_of(columns: Columns, rows: Iterable[Any]) -> str:
    """A header line, then one line per row; "" without rows."""
    lines = [[fill(row) for _, fill in columns] for row in rows]
    return aligned([[title for title, _ in columns], *lines]) if lines else ""


def plain_table(rows: Sequence[Row]) -> str:
    """A column for each key of the rows."""
    return aligned([[*rows[0]], *([*map(str, r.values())] for r in rows)]) if rows else ""


def ends(interval: Sequence[float] | Interval | None, form: str = "+.2f") -> str:
    """An interval as text; "" for none."""
    return f"[{interval[0]:{form}}, {interval[1]:{form}}]" if interval else ""
