"""The trade-off of checkpoints: success of attacks against refusals of safe requests.

One panel per kind of attack. Each point is a model; its size grows with the share of verifiable
instructions that it follows. Arms have colours, trainings of one arm markers. Checkpoints of one
training are joined in the order of their steps, and the last one is filled. Lower left is better.
Bars are 95 % intervals of the last checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired

from annotated_types import Len
from typing_extensions import TypedDict

from core.errors import AttackPlaneError
from core.records import HARMFUL
from core.rows import Row
from core.specs import short_spec
from core.statistics import wilson
from core.store import RunFolder
from plots.style import COLOURS, MARKERS, save

NAME, ROWS = "tradeoff.png", "evaluation.jsonl"
PANELS = (
    ("fixed", "fixed-source attacks"),
    ("adaptive", "adaptive GCG"),
    ("plain", "plain requests"),
)
SMALLEST, LARGEST = 20.0, 260.0
"""Areas of points that follow no instruction and all of them."""


_Pair = Annotated[list[float], Len(2, 2)]


class _Success(TypedDict):
    behaviours: int
    asr: float | None
    wilson: _Pair | None
    corrected: float | None
    corrected_interval: _Pair | None


class _Use(TypedDict):
    label: str
    n: int
    full: float
    none: float
    full_wilson: _Pair | None
    refused_wilson: _Pair | None
    d: float | None


class EvaluationRow(TypedDict):
    """What is read of a model's evaluation; the rows hold more."""

    model: str
    fingerprint: str
    arm: str | None
    step: int
    seed: int | None
    training: list[Any]
    robustness: dict[str, _Success]
    usability: dict[str, _Use]
    instructions: NotRequired[float | None]
    instructions_wilson: NotRequired[_Pair | None]
    degenerate: NotRequired[float | None]
    kl: NotRequired[float | None]
    perplexity: NotRequired[float | None]


def evaluation_rows(folder: Path) -> list[Row]:
    """The rows of ``evaluation.jsonl``; none where there is no such file.

    Raises:
        AttackPlaneError: a row that is none.
    """
    return list(RunFolder(folder).checked(ROWS, EvaluationRow, "remove that line; evaluate again"))


def draw(folder: Path) -> Path:
    """Draw ``tradeoff.png`` from the rows in ``folder``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = evaluation_rows(folder)
    if not rows:
        raise AttackPlaneError("no evaluation in this run", where=folder, remedy="evaluate first")
    panels = [(k, t) for k, t in PANELS if any(k in row["robustness"] for row in rows)]
    figure = Figure(figsize=(5.2 * len(panels), 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (kind, title) in zip(axes, panels, strict=True):
        _panel(axis, rows, kind)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("safe requests refused, fully or in part", fontsize=9)
        axis.set_xlim(-0.05, 1.05)
        axis.set_ylim(-0.05, 1.05)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("attack success rate (raw)", fontsize=9)
    axes[-1].legend(fontsize=8, loc="upper right")
    figure.suptitle("size: verifiable instructions followed", fontsize=9)
    save(figure, folder / NAME, 120)
    return folder / NAME


def trajectories(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of one training in the order of their steps, by a name for the legend."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        own = (row["arm"], row["seed"], *row["training"])
        key = own if row["arm"] else (row["model"],)
        groups.setdefault(key, []).append(row)
    named: dict[str, list[Row]] = {}
    for group in groups.values():
        name = _legend(group, named)
        named[name] = sorted(group, key=lambda row: row["step"])
    return named


def _legend(group: Sequence[Row], taken: Mapping[str, Any]) -> str:
    """A training's name: arm and seed; where that is taken, its folder too, or the whole spec."""
    row = group[0]
    spec = str(row["model"])
    if not row["arm"]:
        return short_spec(spec) if short_spec(spec) not in taken else spec
    name = f"{row['arm']}, seed {row['seed']}"
    folder = Path(spec.partition("+")[2].partition("?")[0]).parent.name
    return next((n for n in (name, f"{name} ({folder})") if n not in taken), spec)


def over_refusal(row: Row) -> tuple[float, tuple[float, float]] | None:
    """Share of safe requests refused, fully or in part, over all sets, with Wilson's interval."""
    safe = [v for v in row["usability"].values() if v["label"] != HARMFUL]
    n = sum(v["n"] for v in safe)
    if not n:
        return None
    refused = sum(v["n"] * (1 - v["none"]) for v in safe)
    return refused / n, wilson(refused, n)


def _style(arm: str | None, seen: dict[str, int]) -> tuple[str, str]:
    """(colour, marker) of the next training of this arm; ``seen`` counts trainings by arm."""
    if not arm:
        return "#000000", "*"
    seen[arm] = seen.get(arm, -1) + 1
    colour = COLOURS[list(seen).index(arm) % len(COLOURS)]
    return colour, MARKERS[seen[arm] % (len(MARKERS) - 1)]  # the last one is the base's


def _panel(axis: Any, rows: Sequence[Row], kind: str) -> None:
    seen: dict[str, int] = {}
    for name, group in trajectories(rows).items():
        colour, marker = _style(group[0]["arm"], seen)
        places = []
        for row in group:
            x, rate = over_refusal(row), row["robustness"].get(kind)
            if x is None or not rate or rate["asr"] is None:
                continue
            last = row is group[-1]
            share = row.get("instructions")
            area = SMALLEST + (LARGEST - SMALLEST) * (0.5 if share is None else share)
            places.append((x[0], rate["asr"]))
            axis.scatter(
                *places[-1],
                s=area,
                color=colour if last else "white",
                edgecolors=colour,
                marker=marker,
                zorder=3 if last else 2,
                label=name if last else None,
            )
            if last:
                axis.plot(x[1], [rate["asr"]] * 2, color=colour, linewidth=0.7, alpha=0.6)
                axis.plot([x[0]] * 2, rate["wilson"], color=colour, linewidth=0.7, alpha=0.6)
            elif row is group[0]:
                axis.annotate(str(row["step"]), places[-1], fontsize=6, ha="center", va="center")
        if len(places) > 1:
            axis.plot(*zip(*places, strict=True), color=colour, linewidth=1.0, alpha=0.7, zorder=1)
