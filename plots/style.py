"""One look for the picture and the page: colour and marker of each class, sizes, what a class is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.errors import AttackPlaneError
from core.store import read_rows

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = ("#d55e00", "#0072b2", "#cc79a7", "#e69f00", "#56b4e9", "#009e73", "#7f3c8d", "#333333")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PLOTLY_MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star")
ANCHORS = {
    "harmful (anchor)": ("#b2182b", "x"),
    "harmless (anchor)": ("#1b7837", "+"),
    "pseudo_harmful (anchor)": ("#998200", "1"),
}
PLOTLY_ANCHORS = {"x": "x-thin", "+": "cross-thin", "1": "y-down"}


def read_exports(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of plane.jsonl and plane_classes.jsonl."""
    rows, classes = read_rows(folder / "plane.jsonl"), read_rows(folder / "plane_classes.jsonl")
    if not rows:
        raise AttackPlaneError(
            "no plane in this run",
            where=folder,
            remedy=f"python cli.py plane --run {folder}",
        )
    return rows, classes


def name_of(row: dict[str, Any]) -> str:
    return row["attack"] if row["kind"] == "attack" else f"{row['label']} (anchor)"


def attack_names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Attack classes, optimised ones first, in order of appearance."""
    names = list(dict.fromkeys(r["attack"] for r in rows if r["kind"] == "attack"))
    baselines = ("plain", "initial_suffix", "random_suffix")
    return [n for n in names if n not in baselines] + [n for n in baselines if n in names]


def short(spec: str) -> str:
    """A spec that fits a panel's title."""
    base, plus, adapter = spec.partition("+")
    return f"{base}+{Path(adapter).name}" if plus else base
