"""The condition of a CAST hook: F1 by layer, and the validation prompts at the chosen one."""

from __future__ import annotations

import csv
from pathlib import Path

from core.errors import AttackPlaneError
from plots.style import COLOURS, save

NAME, GRID, SCORES = "condition.png", "condition.csv", "condition_scores.csv"


def draw(folder: Path) -> Path:
    """Draw ``condition.png`` from the two tables in ``folder``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not (folder / GRID).is_file():
        raise AttackPlaneError("no CAST fit in this folder", where=folder, got=f"no {GRID}")
    grid, scores = (
        list(csv.DictReader((folder / name).read_text().splitlines())) for name in (GRID, SCORES)
    )
    best = max(grid, key=lambda row: float(row["f1"]))
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(
        [int(r["layer"]) for r in grid], [float(r["f1"]) for r in grid], "o-", color=COLOURS[1]
    )
    left.set_xlabel("layer of the condition", fontsize=9)
    left.set_ylabel("F1 of harmful, validation", fontsize=9)
    left.set_ylim(0, 1.05)
    for label, name, colour in (("1", "harmful", COLOURS[0]), ("0", "harmless", COLOURS[5])):
        values = [float(r["similarity"]) for r in scores if r["harmful"] == label]
        right.hist(values, bins=15, alpha=0.6, color=colour, label=name)
    right.axvline(float(best["threshold"]), color="#333333", linestyle="--", linewidth=1)
    side = "above" if best["above"] == "1" else "below"
    right.set_title(f"layer {best['layer']}: the vector is added {side} the line", fontsize=9)
    right.set_xlabel("similarity s", fontsize=9)
    right.legend(fontsize=8)
    save(figure, folder / NAME, 120)
    return folder / NAME
