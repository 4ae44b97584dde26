"""Trajectories on the plane: prompts along their optimisation, classes across checkpoints.

Upper row, a panel a target: each thin line is one prompt from its first snapshot (hollow) to its
last (filled), the bold one the mean of an attack's prompts over five equal parts of their way.
Lower row: centroids of every class from target to target, in the order of the run, in the base
model's frame; numbers count the targets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from core.errors import AttackPlaneError
from core.files import read_rows
from core.rows import Row
from core.specs import short_spec
from plots.style import MARKERS, attack_names, class_styles, read_exports, save

PARTS = 5
NAME = "plane_trajectories.png"


def draw(folder: Path) -> Path:
    """Draw ``plane_trajectories.png`` from the rows and the plane's exports in ``folder``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [r for r in read_rows(folder / "plane_trajectories.jsonl") if r["frame"] == "own"]
    if not rows:
        raise AttackPlaneError(
            "no trajectories in this run",
            where=folder,
            remedy="run `gcg` or `autodan`, then `plane`",
        )
    points, classes = read_exports(folder)
    targets = list(dict.fromkeys(r["target"] for r in rows))
    attacks = list(dict.fromkeys(r["attack"] for r in rows))
    style = class_styles(attacks, MARKERS)
    figure = Figure(figsize=(1 + 4.0 * len(targets), 8.8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, len(targets))
    for column, target in enumerate(targets):
        axis = figure.add_subplot(grid[0, column])
        for attack in attacks:
            _optimisation(
                axis,
                [r for r in rows if (r["target"], r["attack"]) == (target, attack)],
                attack,
                style[attack][0],
            )
        axis.set_title(f"{short_spec(target)}, own frame, layer {rows[0]['layer']}", fontsize=9)
        axis.set_xlabel("harmfulness at t_inst", fontsize=8)
        axis.legend(fontsize=7)
        if column == 0:
            axis.set_ylabel("refusal at t_post_inst", fontsize=8)
    _checkpoints(figure.add_subplot(grid[1, :]), classes, attack_names(points))
    path = folder / NAME
    save(figure, path, 120)
    return path


def _optimisation(axis: Any, rows: list[Row], attack: str, colour: str) -> None:
    ways = []
    for artifact in dict.fromkeys(r["artifact_id"] for r in rows):
        way = sorted((r for r in rows if r["artifact_id"] == artifact), key=lambda r: r["step"])
        x, y = [r["x"] for r in way], [r["y"] for r in way]
        axis.plot(x, y, color=colour, linewidth=0.6, alpha=0.5)
        axis.plot(x[0], y[0], "o", color=colour, markerfacecolor="white", markersize=4)
        axis.plot(x[-1], y[-1], "o", color=colour, markersize=4)
        along = np.linspace(0, 1, PARTS + 1)
        at = np.linspace(0, 1, len(x))
        ways.append([np.interp(along, at, x), np.interp(along, at, y)])
    if ways:
        mean = np.mean(ways, 0)
        axis.plot(*mean, color=colour, linewidth=2.4, label=f"{attack}, mean of {len(ways)}")
        axis.annotate(
            "",
            xy=mean[:, -1],
            xytext=mean[:, -2],
            arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 2.4},
        )


def _checkpoints(axis: Any, classes: list[Row], names: list[str]) -> None:
    style = class_styles(names, MARKERS)
    for name in names:
        way = [c for c in classes if (c["class"], c["frame"]) == (name, "base")]
        x, y = [c["centroid"][0] for c in way], [c["centroid"][1] for c in way]
        axis.plot(
            x, y, "-" + style[name][1], color=style[name][0], label=name, markersize=5, linewidth=1
        )
        for n, place in enumerate(zip(x, y, strict=True), start=1):
            axis.annotate(str(n), place, fontsize=7, xytext=(3, 3), textcoords="offset points")
    order = ", ".join(
        f"{n} {short_spec(t)}"
        for n, t in enumerate(dict.fromkeys(c["target"] for c in classes), start=1)
    )
    axis.set_title(f"class centroids across targets, base frame: {order}", fontsize=9)
    axis.set_xlabel("harmfulness at t_inst", fontsize=8)
    axis.set_ylabel("refusal at t_post_inst", fontsize=8)
    axis.legend(fontsize=7, ncol=2)
