"""Losses of a training over its updates: one panel per column of losses.csv.

The thin line is what was logged, the bold one its running mean over about a twentieth of the
training. Dashed lines are checkpoints.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from core.errors import AttackPlaneError
from plots.style import COLOURS, save

NAME, LOSSES = "losses.png", "losses.csv"
LOGGED = ("loss", "gradient_norm", "learning_rate")
"""Columns that every arm has; the others are its components and what it measures."""


def draw(folder: Path) -> Path:
    """Draw ``losses.png`` from the table in a training's folder."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not (folder / LOSSES).is_file():
        raise AttackPlaneError(
            "no training in this folder", where=folder, got=f"no {LOSSES}", remedy="train first"
        )
    with open(folder / LOSSES, newline="") as file:
        rows = list(csv.DictReader(file))
    steps = np.array([int(row["step"]) for row in rows])
    own = [name for name in rows[0] if name not in ("step", *LOGGED)]
    names = [*own, *LOGGED]
    across = min(4, len(names))
    down = -(-len(names) // across)
    figure = Figure(figsize=(3.4 * across, 2.5 * down), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    saved = [int(path.name[5:]) for path in folder.glob("step-*") if path.name[5:].isdigit()]
    window = max(1, len(steps) // 20)
    for axis, name in zip(axes, names, strict=False):
        values = np.array([float(row[name] or "nan") for row in rows])
        colour = COLOURS[1] if name in own else COLOURS[7]
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axis.plot(steps, values, color=colour, linewidth=0.6, alpha=0.45)
        middle = (window - 1) // 2
        axis.plot(steps[middle : middle + len(smooth)], smooth, color=colour, linewidth=1.8)
        for step in saved:
            axis.axvline(step, color="#999999", linewidth=0.5, linestyle="--")
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("update", fontsize=7)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    save(figure, folder / NAME, 120)
    return folder / NAME
