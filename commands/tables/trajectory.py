"""The table of checkpoints: what is measured inside them, and how they behave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from commands.tables.layout import Columns, ends, text_of
from core.rows import Row
from core.specs import short_spec

SHOWN = (
    "layer of H",
    "layer of R",
    "KL, H ablated",
    "KL, R ablated",
    "D, H ablated - alone",
    "D, R ablated - alone",
    "C_cos",
    "C_sub",
    "C_layer",
    "HRCI v1",
    "HRCI v2",
    "effective rank of R, rows of unit length",
    "drift of H",
    "drift of R",
    "H tells held-out pairs",
    "R tells held-out pairs",
    "D on harmful prompts",
    "ASR fixed",
    "ASR adaptive",
)
"""What is printed; everything is in the files."""


def trajectory_table(rows: Sequence[Row]) -> str:
    """One block per measure, one row per checkpoint, with intervals and nulls."""
    blocks = []
    for name in SHOWN:
        own = [r for r in rows if r["measure"] == name]
        if own:
            unit = f" ({own[0]['unit']})" if own[0]["unit"] else ""
            blocks.append(f"{name}{unit}\n{_block(own)}")
    return "\n\n".join(blocks)


def anchors_table(rows: Sequence[Row]) -> str:
    """ASR left alone and with carriers ablated, under the published rows."""
    from study.anchors import MODES, published_rows

    def rate(mode: str) -> Callable[[Any], str]:
        def fill(row: Row) -> str:
            interval = row.get(f"{mode} interval")
            return f"{row[mode]:.3f}" + (f" {ends(interval, '.2f')}" if interval else "")

        return fill

    columns: Columns = [
        ("model", lambda row: short_spec(row["model"]) + ", published" * row["published"]),
        *((f"{mode} ablated" if mode != "none" else "alone", rate(mode)) for mode in MODES),
        ("H-R angle", lambda row: f"{row['angle']:.0f}" if "angle" in row else "82 to 90"),
        ("admissible", lambda row: {True: "yes", False: "no"}.get(row.get("admissible"), "")),
    ]
    return text_of(columns, [*published_rows(), *rows])


def predictions_table(rows: Sequence[Row]) -> str:
    """Predictors of TASR, best first within each group of targets."""

    def beyond(row: Row) -> str:
        if not row["beyond"]:
            return ""
        name, found = next(iter(row["beyond"].items()))
        low, high = found["interval"]
        return f"{found['value']:+.2f} [{low:+.2f}, {high:+.2f}] of {name}"

    columns: Columns = [
        ("TASR", lambda row: row["of"]),
        ("targets", lambda row: row["targets"]),
        ("predictor", lambda row: row["predictor"]),
        ("rho", lambda row: f"{row['rho']:+.2f}"),
        ("interval", lambda row: "[{:+.2f}, {:+.2f}]".format(*row["interval"])),
        ("p", lambda row: f"{row['p']:.3f}"),
        ("checkpoints", lambda row: str(row["n_targets"])),
        ("would need", lambda row: "" if row["needed"] is None else str(row["needed"])),
        ("beyond the next", beyond),
    ]
    return text_of(columns, rows)


def _block(rows: Sequence[Row]) -> str:
    def null(name: str) -> Callable[[Any], str]:
        return lambda row: "" if row[name] is None else f"{row[name]:.2f}"

    def interval(row: Row) -> str:
        return "" if row["low"] is None else f"[{row['low']:+.2f}, {row['high']:+.2f}]"

    columns: Columns = [
        ("model", lambda row: short_spec(row["model"])),
        ("seed", lambda row: "" if row["seed"] is None else str(row["seed"])),
        ("value", lambda row: f"{row['value']:+.3f}"),
        ("interval", interval),
        ("random 95 %", null("null_random")),
        ("permuted 95 %", null("null_permuted")),
        ("place", lambda row: _place(row)),
    ]
    return text_of(columns, rows)


def _place(row: Row) -> str:
    if "position" not in row:
        return ""
    return f"{row['position']}{'' if row['admissible'] else ', not admissible'}"
