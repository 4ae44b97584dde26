"""Effects of interventions as a picture: one row per model, one column per outcome.

Strength goes along x, and each mode is a line.

Filled: the intervention with its 95 % interval (of the change from leaving the model alone);
dashed: mean over the matched controls;
dotted: mean over the papers' controls; the grey line is the model left alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.errors import AttackPlaneError
from core.files import read_rows
from core.rows import Row
from core.specs import short_spec
from plots.style import COLOURS, MARKERS, save

PANELS = (
    ("harmful", "complied", "ASR on harmful prompts"),
    ("harmful", "d", "outcome D on harmful, nats per token"),
    ("harmless", "refused", "refusals of harmless prompts"),
    ("pseudo_harmful", "refused", "refusals of pseudo-harmful prompts"),
    ("harmless", "kl", "KL on harmless prompts, nats"),
)


ROWS = "interventions_summary.jsonl"


def draw(folder: Path) -> Path:
    """Read ``interventions_summary.jsonl`` in ``folder`` and write ``interventions.png`` there."""
    path = folder / "interventions.png"
    save(figure_of(_rows(folder)), path, 120)
    return path


def draw_each(folder: Path, name: str) -> list[Path]:
    """The same rows, one picture per model: ``NAME_1.png`` and so on, in the models' order."""
    rows = _rows(folder)
    files = []
    for number, model in enumerate(dict.fromkeys(r["model"] for r in rows), start=1):
        files.append(folder / f"{name}_{number}.png")
        save(figure_of([r for r in rows if r["model"] == model]), files[-1], 120)
    return files


def _rows(folder: Path) -> list[Row]:
    rows = [r for r in read_rows(folder / ROWS) if r["value"] is not None]
    if not rows:
        raise AttackPlaneError(
            "no interventions in this run",
            where=folder,
            remedy="measure interventions in this run first",
        )
    return rows


def figure_of(rows: list[Row]) -> Any:
    """One row per model, one column per outcome."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(r["model"] for r in rows))
    modes = list(dict.fromkeys(r["mode"] for r in rows))
    panels = [p for p in PANELS if any((r["label"], r["outcome"]) == p[:2] for r in rows)]
    figure = Figure(figsize=(3.9 * len(panels), 0.7 + 3.1 * len(models)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(models), len(panels), squeeze=False, sharey="col")
    for line, model in enumerate(models):
        for column, (label, outcome, title) in enumerate(panels):
            here = [
                r for r in rows if (r["model"], r["label"], r["outcome"]) == (model, label, outcome)
            ]
            _panel(axes[line][column], here, modes)
            axes[line][column].set_title(f"{short_spec(model)}\n{title}", fontsize=8)
    axes[0][0].legend(fontsize=7)
    figure.supxlabel(
        f"strength ({rows[0]['operation']}); dashed: matched controls, dotted: random, wrong "
        "layer and position",
        fontsize=8,
    )
    return figure


def _panel(axis: Any, rows: list[Row], modes: list[str]) -> None:
    if rows:
        axis.axhline(rows[0]["alone"], color="#999999", linewidth=1)
    offset = 0.03 * (max([abs(r["strength"]) for r in rows], default=1) or 1)
    for n, mode in enumerate(modes):
        here = sorted((r for r in rows if r["mode"] == mode), key=lambda r: r["strength"])
        if not here:
            continue
        x = [r["strength"] + (n - (len(modes) - 1) / 2) * offset for r in here]
        low = [r["alone"] + r["change_interval"][0] for r in here]
        high = [r["alone"] + r["change_interval"][1] for r in here]
        colour = COLOURS[n % len(COLOURS)]
        axis.vlines(x, low, high, color=colour, linewidth=1.5)
        axis.plot(
            x, [r["value"] for r in here], "-" + MARKERS[n], color=colour, markersize=4, label=mode
        )
        for key, style, marker in (("matched", "--", "_"), ("controls", ":", ".")):
            known = [(a, r[key]) for a, r in zip(x, here, strict=True) if r[key] is not None]
            if known:
                axis.plot(
                    *zip(*known, strict=True),
                    style,
                    marker=marker,
                    color=colour,
                    linewidth=1,
                    alpha=0.8,
                )
    strengths = sorted({r["strength"] for r in rows})
    axis.set_xticks(strengths, [f"{s:g}" for s in strengths])
    axis.set_xlim(min(strengths, default=0) - 4 * offset, max(strengths, default=0) + 4 * offset)
    axis.tick_params(labelsize=7)
