"""One look for the picture and the page: each class's colour, marker, size and name."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import AttackPlaneError
from core.files import each_row, read_rows, write_atomically
from core.records import BASELINES
from core.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = ("#d55e00", "#0072b2", "#cc79a7", "#e69f00", "#56b4e9", "#009e73", "#7f3c8d", "#333333")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PLOTLY_MARKERS = (
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "triangle-down",
    "cross",
    "x",
    "star",
)
ANCHORS = {
    "harmful (anchor)": ("#b2182b", "x"),
    "harmless (anchor)": ("#1b7837", "+"),
    "pseudo_harmful (anchor)": ("#998200", "1"),
}
DRAWN = 2000
"""Most points of one class in one panel that are drawn."""
NOT_JUDGED = "#bbbbbb"
"""Fill of points that no judge has judged; failures are white."""
PLOTLY_ANCHORS = {"x": "x-thin", "+": "cross-thin", "1": "y-down"}


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure as PNG, whole or not at all."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # a name may hold a dollar sign, which is no formula
        text.set_parse_math(False)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=dpi)
    write_atomically(path, image.getvalue())


def read_exports(folder: Path) -> tuple[list[Row], list[Row]]:
    """Rows of plane.jsonl and plane_classes.jsonl; of a large class some, drawn at random."""
    classes = read_rows(folder / "plane_classes.jsonl")
    kept = {
        (c["target"], c["frame"], c["class"]): set(random.Random(0).sample(range(c["n"]), DRAWN))
        for c in classes
        if c["n"] > DRAWN
    }
    seen: Counter[tuple[str, str, str]] = Counter()
    rows = []
    for _, row in each_row(folder / "plane.jsonl"):
        key = row["target"], row["frame"], row["class_name"]
        if key not in kept or seen[key] in kept[key]:
            rows.append(row)
        seen[key] += 1
    if not rows:
        raise AttackPlaneError(
            "no plane in this run",
            where=folder,
            remedy="draw the plane of this run first",
        )
    return rows, classes


def left_out(rows: Sequence[Row], classes: Sequence[Row]) -> str:
    """Says that not all points are drawn, where it is so."""
    fewer = len(rows) < sum(c["n"] for c in classes)
    return f"; of each class at most {DRAWN} points" if fewer else ""


def attack_names(rows: Sequence[Row]) -> list[str]:
    """Names of the attack classes, optimised ones first, in order of appearance."""
    attacks = {r["class_name"]: r["attack"] for r in rows if r["kind"] == "attack"}
    return sorted(attacks, key=lambda name: attacks[name] in BASELINES)


def class_styles(names: Sequence[str], markers: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each class: eight colours, with another marker each time round."""
    n = len(COLOURS)
    return {
        name: (COLOURS[i % n], markers[(i + i // n) % len(markers)]) for i, name in enumerate(names)
    }


def centres_of(classes: Sequence[Row], target: str, frame: str) -> dict[str, Row]:
    """Class rows of one panel by class name."""
    return {c["class"]: c for c in classes if (c["target"], c["frame"]) == (target, frame)}


def centre_start(centre: Row) -> tuple[float, float] | None:
    """Where a class's mean displacement from the plain requests begins."""
    if not centre["displacement"]:
        return None
    (x, y), (dx, dy) = centre["centroid"], centre["displacement"]
    return x - dx, y - dy
