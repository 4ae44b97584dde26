"""The plane as a PNG: one panel per target, one row per frame.

Colour and shape name the class, a filled marker is a success, a hollow one a failure, a grey one
was not judged. Thin arrows run from the plain request to the attacked one, the bold one is a
class's mean displacement and ends at its centroid; the dashed one is what harmless requests in the
same wrappers show. Ellipses are one standard deviation about the centroid.
"""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.rows import Row
from core.specs import short_spec
from core.statistics import FEW
from plots.style import (
    ANCHORS,
    MARKERS,
    NOT_JUDGED,
    attack_names,
    centre_start,
    centres_of,
    class_styles,
    left_out,
    read_exports,
    save,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRAMES = ("base", "own")
TOGETHER = 20
"""Points of one look that are drawn at once: classes take turns, so that none hides the others."""
ARROWS = 200
"""Of a class with more points no thin arrows are drawn: they would hide the points."""
CROWDED, MANY = 8, 1000
"""With more classes, or more points in a panel than this, points are small and pale and each
centroid is drawn with its marker."""


def draw(folder: Path) -> Path:
    """Read the exports in ``folder`` and write ``plane.png`` there."""
    path = folder / "plane.png"
    save(figure_of(*read_exports(folder)), path, 130)
    return path


def figure_of(rows: list[Row], classes: list[Row]) -> Figure:
    """The picture of plane rows and their class rows: one column per target, one row per frame.

    Where the base model is the only target, one row: its frames are one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    targets = list(dict.fromkeys(r["target"] for r in rows))
    frames = frames_of(rows)
    names = attack_names(rows)
    style = class_styles(names, MARKERS) | ANCHORS
    size = (max(6.0, 1.2 + 3.9 * len(targets)), 0.9 + 3.85 * len(frames))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(frames), len(targets), squeeze=False, sharex="row", sharey="row")
    for line, frame in enumerate(frames):
        for column, target in enumerate(targets):
            panel = axes[line][column]
            here = [r for r in rows if r["target"] == target and r["frame"] == frame]
            _panel(panel, here, classes, style, names)
            panel.set_title(_title(here[0]), fontsize=9)
            if column == 0:
                panel.set_ylabel("refusal projection at t_post_inst", fontsize=9)
            if line == len(frames) - 1:
                panel.set_xlabel(f"harmfulness projection at {here[0]['position']}", fontsize=9)
    handles = _legend(style, {r["class_name"] for r in rows})
    columns = max(2, min(len(handles), int(figure.get_figwidth() / 2.2)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9)
    title = "Attack plane: projections relative to the harmless centroid"
    figure.suptitle(title + left_out(rows, classes), fontsize=12)
    return figure


def frames_of(rows: list[Row]) -> list[str]:
    """The frames to show: one where all targets are the base model, whose frames are one."""
    frames = [frame for frame in FRAMES if any(r["frame"] == frame for r in rows)]
    return frames[-1:] if all(_is_base(r) for r in rows) else frames


def _is_base(row: Row) -> bool:
    """Whether the target's own directions are the base frame's."""
    return min(row["cos_base_own_harmfulness"], row["cos_base_own_refusal"]) > 1 - 1e-6


def _title(row: Row) -> str:
    cosines = f"H {row['cos_base_own_harmfulness']:.2f} R {row['cos_base_own_refusal']:.2f}"
    where = f"{row['frame']} frame, layer {row['layer']}"
    return f"{short_spec(row['target'])}\n{where}, cos(base, own) {cosines}"


def _legend(style: dict[str, tuple[str, str]], present: set[str]) -> list[Any]:
    """The classes that are there, then what fill and arrows mean."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=name)
        for name, (colour, marker) in style.items()
        if name in present
    ]
    for label, look in (
        ("jailbroken", {"marker": "o"}),
        ("not jailbroken", {"marker": "o", "fillstyle": "none"}),
        ("not judged", {"marker": "o", "markerfacecolor": NOT_JUDGED}),
        ("from plain to attacked", {"marker": r"$\rightarrow$", "markersize": 11}),
        ("the wrapper alone, with a harmless request", {"linestyle": "--"}),
    ):
        options: Row = {"color": "#555555", "linestyle": "", "label": label}
        handles.append(Line2D([], [], **(options | look)))
    return handles


def _panel(
    panel: Any,
    rows: list[Row],
    classes: list[Row],
    style: dict[str, tuple[str, str]],
    names: list[str],
) -> None:
    from matplotlib.patches import Ellipse

    panel.axhline(0, color="#dddddd", linewidth=0.8, zorder=0)
    panel.axvline(0, color="#dddddd", linewidth=0.8, zorder=0)
    crowded = len(names) > CROWDED or len(rows) > MANY
    look: dict[tuple[str, bool | None], list[Row]] = {}
    for row in rows:
        look.setdefault((row["class_name"], row["jailbroken"]), []).append(row)
    arrows = not crowded and sum(row["class_name"] in names[:1] for row in rows) <= ARROWS
    turns = range(0, max(map(len, look.values())), TOGETHER)
    for turn, (name, jailbroken) in product(turns, look):
        here = look[name, jailbroken][turn : turn + TOGETHER]
        if not here:
            continue
        colour, marker = style[name]
        where = [r["x"] for r in here], [r["y"] for r in here]
        if here[0]["kind"] == "anchor":
            faint: Row = {"linestyle": "", "alpha": 0.55, "markersize": 5, "zorder": 1}
            panel.plot(*where, marker=marker, color=colour, **faint)
            continue
        for row in here if name == names[0] and arrows else ():
            if (start := row["plain_x"]) is not None:
                ends = (start, row["plain_y"]), (row["x"], row["y"])
                _arrow(panel, *ends, colour, 0.7, 0.45)
        panel.plot(
            *where,
            linestyle="",
            marker=marker,
            markeredgecolor=colour,
            markerfacecolor={True: colour, False: "white", None: NOT_JUDGED}[jailbroken],
            alpha=0.45 if crowded else 0.95,
            markersize=4 if crowded else 6.5,
            zorder=3,
        )
    centre = centres_of(classes, rows[0]["target"], rows[0]["frame"])
    for name, c in centre.items():
        colour = style[name][0]
        x, y = c["centroid"]
        if c["covariance"] is not None and c["n"] >= FEW:
            width, height, angle = ellipse_axes(c["covariance"])
            shape = Ellipse((x, y), width, height, angle=angle, zorder=2)
            shape.set(
                facecolor="none" if crowded else colour,
                edgecolor=colour,
                alpha=0.35 if crowded else 0.10,
            )
            panel.add_patch(shape)
        if crowded and c["kind"] == "attack":
            panel.plot(
                x, y, style[name][1], color=colour, markeredgecolor="black", markersize=8, zorder=5
            )
        else:
            panel.plot(x, y, ".", color=colour, markersize=3, zorder=4)
        if (start := centre_start(c)) and c.get("displaced", FEW) >= FEW:
            _arrow(panel, start, (x, y), colour, 2.0, 0.9)
            if c["wrapper"]:
                end = start[0] + c["wrapper"][0], start[1] + c["wrapper"][1]
                _arrow(panel, start, end, colour, 1.2, 0.9, dashed=True)
    panel.tick_params(labelsize=8)


def _arrow(
    panel: Any,
    start: Any,
    end: Any,
    colour: str,
    width: float,
    alpha: float,
    *,
    dashed: bool = False,
) -> None:
    style = {"arrowstyle": "->", "color": colour, "linewidth": width, "alpha": alpha}
    style |= {"linestyle": "--"} if dashed else {}
    panel.annotate(
        "", xy=end, xytext=start, arrowprops={**style, "shrinkA": 2, "shrinkB": 3}, zorder=2
    )


def ellipse_axes(covariance: list[list[float]]) -> tuple[float, float, float]:
    """Full width, full height (two standard deviations each) and angle (degrees) of an ellipse."""
    (a, b), (_, d) = covariance
    middle, spread = (a + d) / 2, math.hypot((a - d) / 2, b)
    angle = math.degrees(0.5 * math.atan2(2 * b, a - d))
    return 2 * math.sqrt(max(0.0, middle + spread)), 2 * math.sqrt(max(0.0, middle - spread)), angle
