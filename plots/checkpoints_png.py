"""Measures of checkpoints over their training: one picture per family, one panel per measure.

Each way of training has a colour. Its line is the mean over seeds, its band goes from the lowest to
the highest of them; with one seed, bars are that checkpoint's 95 % intervals. The dashed line is
the reference. Dotted lines are what meaningless directions reach: random ones (grey) and, of each
checkpoint, permuted labels (in its colour).

``trajectory_plane.png`` shows held-out prompts along the reference's H and R: the centroid of
harmful ones (filled) and of harmless ones (open), joined in the order of the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.errors import AttackPlaneError
from core.files import read_rows
from core.rows import Row
from core.specs import short_spec
from plots.style import COLOURS, MARKERS, save

ROWS, NAME = "trajectory.jsonl", "trajectory_{}.png"
TRANSFERS = "trajectory_transfers.jsonl"
CELLS = {
    "tasr": "TASR",
    "tasr_given_source": "TASR given success on the source",
    "d": "mean D of the target (nats per token)",
}
"""Panels of the heat map."""
PLANE = "plane"
ACROSS = 4

Method = tuple[str | None, str | None]
"""Arm, and the hash of its settings without the seed."""


def draw(folder: Path) -> list[Path]:
    """Draw all pictures of the rows in ``folder``."""
    rows = read_rows(folder / ROWS)
    if not rows:
        raise AttackPlaneError("no trajectory in this run", where=folder, remedy="run trajectory")
    files = []
    for family in dict.fromkeys(r["family"] for r in rows):
        own = [r for r in rows if r["family"] == family]
        figure = plane_of(own) if family == PLANE else figure_of(own)
        files.append(folder / NAME.format(family))
        save(figure, files[-1], 120)
    transfers = read_rows(folder / TRANSFERS)
    if transfers:
        files.append(folder / NAME.format("transfers"))
        save(heat_map(transfers, [r["model"] for r in rows]), files[-1], 120)
    return files


def methods(rows: Sequence[Row]) -> dict[Method, str]:
    """Ways of training, and a name for each: the arm, with a number where an arm has several."""
    arms: dict[str, list[Method]] = {}
    for r in rows:
        own = r["arm"], r["method"]
        if r["arm"] and own not in arms.setdefault(r["arm"], []):
            arms[r["arm"]].append(own)
    return {
        own: arm if len(group) == 1 else f"{arm} {n}"
        for arm, group in arms.items()
        for n, own in enumerate(group, start=1)
    }


def figure_of(rows: Sequence[Row]) -> Any:
    """One family."""
    names = list(dict.fromkeys(r["measure"] for r in rows))
    across = min(ACROSS, len(names))
    down = -(-len(names) // across)
    figure, axes = _figure(across, down, 3.5, 2.8)
    for axis, name in zip(axes, names, strict=False):
        own = [r for r in rows if r["measure"] == name]
        for number, (method, label) in enumerate(methods(rows).items()):
            here = [r for r in own if (r["arm"], r["method"]) == method]
            _line(axis, here, COLOURS[number % len(COLOURS)], label)
        for r in own:
            if not r["arm"]:
                axis.axhline(r["value"], color="black", linewidth=0.9, linestyle="--")
        random = next((r["null_random"] for r in own if r["null_random"] is not None), None)
        if random is not None:
            axis.axhline(random, color="#777777", linewidth=0.9, linestyle=":")
        unit = next((r["unit"] for r in own), "")
        axis.set_title(name if not unit else f"{name} ({unit})", fontsize=8)
        axis.set_xlabel("update", fontsize=7)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    _finish(figure, axes, len(names))
    return figure


def _line(axis: Any, rows: Sequence[Row], colour: str, label: str) -> None:
    """One way of training: all its seeds."""
    if not rows:
        return
    at: dict[int, list[Row]] = {}
    for r in rows:
        at.setdefault(r["step"], []).append(r)
    steps = sorted(at)
    means = [sum(r["value"] for r in at[s]) / len(at[s]) for s in steps]
    axis.plot(steps, means, color=colour, marker="o", markersize=3, linewidth=1.4, label=label)
    if any(len(at[s]) > 1 for s in steps):
        ends = [[pick(r["value"] for r in at[s]) for s in steps] for pick in (min, max)]
        axis.fill_between(steps, *ends, color=colour, alpha=0.2, linewidth=0)
    else:
        for s in steps:
            row = at[s][0]
            if row["low"] is not None:
                axis.plot([s, s], [row["low"], row["high"]], color=colour, linewidth=0.8, alpha=0.7)
    nulls = [[r["null_permuted"] for r in at[s]] for s in steps]
    if all(None not in group for group in nulls):
        highest = [max(group) for group in nulls]
        axis.plot(steps, highest, color=colour, linewidth=0.9, linestyle=":")


def plane_of(rows: Sequence[Row]) -> Any:
    """Centroids of held-out prompts along the reference's directions, over training."""
    figure, axes = _figure(1, 1, 6.4, 5.4)
    axis = axes[0]
    places = {(r["model"], r["measure"]): r["value"] for r in rows}
    whose = {r["model"]: r for r in rows}
    groups = methods(rows)
    for label, filled in (("harmful", True), ("harmless", False)):
        lines: dict[tuple[Method | None, int | None], list[tuple[int, float, float]]] = {}
        for model, r in whose.items():
            x, y = (places[model, f"{label} along {kind}"] for kind in "HR")
            own = (r["arm"], r["method"]) if r["arm"] else None
            lines.setdefault((own, r["seed"]), []).append((r["step"], x, y))
        base = [line[0] for (own, _), line in lines.items() if own is None][:1]
        seeds: dict[Method, int] = {}
        for (own, _), points in lines.items():
            if own is None:
                axis.scatter(*points[0][1:], marker="*", s=130, zorder=4, **_face("black", filled))
                continue
            colour = COLOURS[list(groups).index(own) % len(COLOURS)]
            seed = seeds[own] = seeds.get(own, -1) + 1
            ordered = [*base, *sorted(points)]
            axis.plot(*zip(*(p[1:] for p in ordered), strict=True), color=colour, linewidth=0.9)
            name = groups[own] if filled and not seed else None
            xs, ys = zip(*(p[1:] for p in sorted(points)), strict=True)
            mark = MARKERS[seed % (len(MARKERS) - 1)]
            axis.scatter(xs, ys, marker=mark, s=34, zorder=3, label=name, **_face(colour, filled))
    reference = next((short_spec(m) for m, r in whose.items() if not r["arm"]), "the reference")
    axis.set_xlabel(f"along H of {reference} at t_inst", fontsize=9)
    axis.set_ylabel(f"along R of {reference} at t_post_inst", fontsize=9)
    axis.set_title("held-out prompts: harmful filled, harmless open; star: reference", fontsize=9)
    axis.grid(alpha=0.25)
    _finish(figure, axes, 1)
    return figure


def heat_map(rows: Sequence[Row], order: Sequence[str]) -> Any:
    """TASR of sources (rows) on targets (columns), raw and given source success; mean D."""
    import numpy as np

    places = list(dict.fromkeys(order))
    targets = [m for m in places if any(r["target"] == m for r in rows)]
    sources = [m for m in places if any(r["source"] == m for r in rows)]
    size = 1.8 + 0.42 * len(targets), 0.9 + 0.5 * len(sources)
    figure, axes = _figure(1, len(CELLS), max(5.0, size[0]), max(2.2, size[1] + 1.2))
    for axis, (key, title) in zip(axes, CELLS.items(), strict=True):
        values = np.full((len(sources), len(targets)), np.nan)
        for r in rows:
            value = r[key]
            place = sources.index(r["source"]), targets.index(r["target"])
            values[place] = np.nan if value is None else value
        axis.set_facecolor("#dddddd")
        low, high = 0.0, 1.0
        if key == "d" and not np.isnan(values).all():
            low, high = float(np.nanmin(values)), float(np.nanmax(values))
        axis.imshow(values, vmin=low, vmax=high, cmap="cividis", aspect="auto")
        for i, j in np.ndindex(*values.shape):
            missing = np.isnan(values[i, j])
            text = "-" if missing else f"{values[i, j]:.2f}"
            colour = "black" if missing or values[i, j] > low + 0.6 * (high - low) else "white"
            axis.text(j, i, text, ha="center", va="center", fontsize=6, color=colour)
        axis.set_xticks(range(len(targets)), [_label(t) for t in targets], fontsize=6)
        axis.tick_params(axis="x", labelrotation=90)
        axis.set_yticks(range(len(sources)), [_label(s) for s in sources], fontsize=6)
        axis.set_title(f"{title}; rows: source, columns: target; grey: missing", fontsize=8)
    return figure


def _label(spec: str) -> str:
    """A checkpoint by its training and step, another model by the last part of its name."""
    base, _, adapter = short_spec(spec).partition("?")[0].partition("+")
    return adapter or Path(base).name


def _face(colour: str, filled: bool) -> Row:
    return {"color": colour if filled else "white", "edgecolors": colour}


def _figure(across: int, down: int, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * across, height * down + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(down, across, squeeze=False).flatten())


def _finish(figure: Any, axes: Sequence[Any], used: int) -> None:
    for axis in axes[used:]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
