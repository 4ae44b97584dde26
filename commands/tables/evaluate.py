"""The table of checkpoints: robustness, usability, capability, integrity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from commands.tables.layout import Columns, ends, text_of
from core.rows import Row
from core.specs import short_spec

SHOWN = ("plain", "fixed", "adaptive")


def evaluation_table(rows: Sequence[Row]) -> str:
    """One row per model. Rates are raw, with 95 % intervals; corrected ones stand behind."""

    def rate(kind: str) -> Callable[[Any], str]:
        def fill(row: Row) -> str:
            cell = row["robustness"].get(kind)
            if not cell or cell["asr"] is None:
                return "-"
            text = f"{cell['asr']:.2f} {ends(cell['wilson'], '.2f')}"
            return text if cell["corrected"] is None else f"{text} ({cell['corrected']:.2f})"

        return fill

    def leaning(row: Row) -> str:
        cell = row["robustness"].get("plain")
        return "-" if not cell or cell["d"] is None else f"{cell['d']:+.2f}"

    def refused(name: str) -> Callable[[Any], str]:
        def fill(row: Row) -> str:
            cell = row["usability"].get(name)
            return f"{cell['full']:.2f} + {cell['partial']:.2f}" if cell else "-"

        return fill

    def number(name: str, form: str = ".2f") -> Callable[[Any], str]:
        return lambda row: "-" if row.get(name) is None else f"{row[name]:{form}}"

    def outside(row: Row) -> str:
        if row.get("outside") is None:
            return "-"
        return f"{row['outside']:.3f} ({row['outside_null']:.3f})"

    sets = list(dict.fromkeys(name for row in rows for name in row["usability"]))
    columns: Columns = [
        ("model", lambda row: short_spec(row["model"])),
        ("arm", lambda row: row["arm"] or "-"),
        ("seed", lambda row: "-" if row["seed"] is None else str(row["seed"])),
        *((f"ASR {kind}", rate(kind)) for kind in SHOWN),
        ("D", leaning),
        *((f"refused {name.replace('_', '-')}", refused(name)) for name in sets),
        ("instructions", number("instructions")),
        ("KL", number("kl", ".3f")),
        ("perplexity", number("perplexity", ".1f")),
        ("degenerate", number("degenerate")),
        ("outside H-R (null)", outside),
    ]
    tasks = dict.fromkeys(task for row in rows for task in row.get("tasks", {}))
    columns = [*columns, *((task, _task(task)) for task in tasks)]
    return text_of(columns, rows)


def _task(name: str) -> Callable[[Any], str]:
    def fill(row: Row) -> str:
        scores = row.get("tasks", {}).get(name, {})
        return ", ".join(f"{k.split(',')[0]} {v:.3f}" for k, v in scores.items()) or "-"

    return fill
