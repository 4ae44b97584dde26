"""The claims as a picture: one row per check, one column per model.

Every estimate stands with its interval against its threshold.

Each cell has a scale of its own, centred on the threshold: the claimed side is right of the line,
whatever the claim says.
Green: the check says yes; red: it says no; grey: undecided, or the model has not what the claim is
about. Checks without a say in the verdict are thin.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from core.errors import AttackPlaneError
from core.files import read_rows
from core.rows import Row
from core.specs import short_spec
from plots.style import save

COLOURS = {"yes": "#1b7837", "no": "#b2182b", "unclear": "#777777"}


def draw(folder: Path) -> Path:
    """Read ``claims.jsonl`` in ``folder`` and write ``claims.png`` there."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    claims = read_rows(folder / "claims.jsonl")
    if not claims:
        raise AttackPlaneError(
            "no claims in this run",
            where=folder,
            remedy="measure claims in this run first",
        )
    models = list(dict.fromkeys(c["model"] for c in claims))
    checks = list(dict.fromkeys((c["number"], k["name"]) for c in claims for k in c["checks"]))
    cells = {
        (c["model"], c["number"], k["name"]): (k, c["applicable"])
        for c in claims
        for k in c["checks"]
    }
    verdicts = {(c["model"], c["number"]): c["verdict"] for c in claims}
    figure = Figure(
        figsize=(4.6 + 2.7 * len(models), 1.0 + 0.42 * max(1, len(checks))), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axis, model in zip(axes, models, strict=True):
        for line, key in enumerate(checks):
            if (model, *key) in cells:
                _cell(axis, line, *cells[(model, *key)])
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(xlim=(-1.15, 1.15), ylim=(max(1, len(checks)) - 0.5, -0.5), xticks=[])
        axis.set_title(short_spec(model), fontsize=9)
        last = None
        for line, (number, _) in enumerate(checks):
            if number != last:
                axis.axhline(line - 0.5, color="#cccccc", linewidth=0.6)
                axis.text(
                    1.13,
                    line - 0.42,
                    verdicts.get((model, number), ""),
                    fontsize=6.5,
                    ha="right",
                    va="top",
                    style="italic",
                )
            last = number
    axes[0].set_yticks(
        range(len(checks)), [f"{number}. {name}" for number, name in checks], fontsize=7.5
    )
    figure.supxlabel(
        "left: against the claim · line: threshold · right: as claimed; bars: 95 % intervals; "
        "numbers: estimate, threshold",
        fontsize=7.5,
    )
    path = folder / "claims.png"
    save(figure, path, 150)
    return path


def _cell(axis: Any, line: int, check: Row, applicable: bool) -> None:
    if not all(
        isinstance(check[k], int | float) and math.isfinite(check[k])
        for k in ("value", "low", "high", "threshold")
    ):
        axis.text(0, line, "not measured", fontsize=7, ha="center", va="center", color="#777777")
        return
    sign = 1 if check["claimed"] == "above" else -1
    ends = [check["low"], check["value"], check["high"]]
    if check["claimed"] == "within":  # the distance from 0 counts
        crosses = check["low"] < 0 < check["high"]
        outer = sorted(map(abs, (check["low"], check["high"])))
        ends = [0.0 if crosses else outer[0], abs(check["value"]), outer[1]]
    low, value, high = (sign * (end - check["threshold"]) for end in ends)
    scale = max(abs(low), abs(value), abs(high), 1e-9)
    colour = COLOURS[check["outcome"]] if applicable else COLOURS["unclear"]
    axis.plot(
        [low / scale, high / scale],
        [line, line],
        color=colour,
        linewidth=2.2 if check["decides"] else 0.9,
        solid_capstyle="butt",
    )
    axis.plot(value / scale, line, "o", color=colour, markersize=4)
    text = f"{check['value']:+.2f} | {check['threshold']:.2f}"
    axis.text(-1.13, line + 0.36, text, fontsize=6, ha="left", va="center", color="#444444")
