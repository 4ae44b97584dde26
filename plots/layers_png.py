"""Profiles over layers as a picture, one row per model.

Columns: separation, cosines, criteria, reliability, and the field of positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.errors import AttackPlaneError
from core.files import read_rows
from core.rows import Row
from core.specs import short_spec
from plots.style import COLOURS, save

SHOWN = {"harmful - harmless": ("t_inst", "-1"), "refused - accepted": ("-1",)}


def draw(folder: Path) -> Path:
    """Read ``layers_*.jsonl`` in ``folder`` and write ``layers.png`` there."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    field, profile, sizes, selection = (
        read_rows(folder / f"layers_{name}.jsonl")
        for name in ("field", "profile", "sizes", "selection")
    )
    if not profile:
        raise AttackPlaneError(
            "no layer profiles in this run",
            where=folder,
            remedy="profile the layers in this run first",
        )
    models = [s["model"] for s in selection]
    figure = Figure(figsize=(22, 0.6 + 4.0 * len(models)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(models), 5, squeeze=False)
    for line, model in enumerate(models):
        mine = [[r for r in rows if r["model"] == model] for rows in (field, profile, sizes)]
        chosen = next(s["layers"] for s in selection if s["model"] == model)
        _separation(axes[line][0], mine[0])
        _cosines(axes[line][1], mine[1])
        _criteria(axes[line][2], mine[1], chosen)
        _reliability(axes[line][3], mine[2])
        _field(figure, axes[line][4], mine[0])
        axes[line][0].set_ylabel(f"{short_spec(model)}\n\nheld-out AUROC", fontsize=9)
    path = folder / "layers.png"
    save(figure, path, 110)
    return path


def _separation(axis: Any, rows: list[Row]) -> None:
    n = 0
    for kind, positions in SHOWN.items():
        for position in positions:
            here = [r for r in rows if (r["kind"], r["position"]) == (kind, position)]
            if here:
                x, colour = [r["layer"] for r in here], COLOURS[n]
                axis.plot(
                    x, [r["auroc"] for r in here], color=colour, label=f"{kind} at {position}"
                )
                axis.plot(x, [r["auroc_null_95"] for r in here], ":", color=colour, linewidth=1)
                n += 1
    axis.set_title("separation (dotted: permuted labels, 95 %)", fontsize=10)
    axis.set(xlabel="layer", ylim=(0.3, 1.02))
    axis.legend(fontsize=7, loc="lower right")


def _cosines(axis: Any, rows: list[Row]) -> None:
    x = [r["layer"] for r in rows]
    for n, name in enumerate(rows[0]["cosines"]):
        c, colour = [r["cosines"][name] for r in rows], COLOURS[n]
        null = [max(v["null_permuted_95"], v["null_random_95"]) for v in c]
        axis.plot(x, [v["value"] for v in c], color=colour, label=name)
        axis.fill_between(
            x, *zip(*(v["interval"] for v in c), strict=True), color=colour, alpha=0.12
        )
        axis.plot(x, null, ":", color=colour, linewidth=0.9)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set(xlabel="layer", ylim=(-0.7, 1.02))
    axis.set_title("cosines, 95 % intervals (dotted: larger null, 95 %)", fontsize=10)
    axis.legend(fontsize=6.5, loc="lower left", ncol=2)


def _criteria(axis: Any, rows: list[Row], chosen: dict[str, int | None]) -> None:
    for n, name in enumerate(rows[0]["scores"]):
        known = [(r["layer"], r["scores"][name]) for r in rows if r["scores"][name] is not None]
        largest = max((abs(v) for _, v in known), default=0) or 1
        at = chosen.get(name)
        axis.plot(
            *zip(*((layer, v / largest) for layer, v in known), strict=True),
            color=COLOURS[n],
            label=f"{name}: layer {at}",
        )
        if at is not None:
            axis.axvline(at, color=COLOURS[n], linewidth=0.8, linestyle="--")
    tried = [r for r in rows if "arditi" in r]
    if tried:
        x = [r["layer"] for r in tried]
        for key, marker in (("kl", "x"), ("steering", "^"), ("refusal", "v")):
            axis.plot(
                x,
                [r["arditi"][key] for r in tried],
                marker,
                color="black",
                markersize=4,
                label=f"arditi {key}",
            )
        axis.axhline(0.1, color="black", linewidth=0.6, linestyle=":")
    axis.set(
        xlabel="layer",
        ylim=(-0.3, 1.3),
    )
    axis.set_title(
        f"criteria over their largest (arditi in nats: layer {chosen.get('arditi')})", fontsize=10
    )
    axis.legend(fontsize=6.5, loc="upper left")


def _reliability(axis: Any, rows: list[Row]) -> None:
    for n, name in enumerate(dict.fromkeys(r["direction"] for r in rows)):
        here = [r for r in rows if r["direction"] == name]
        x = [r["n"] for r in here]
        axis.plot(
            x,
            [r["cosine"] for r in here],
            "o-",
            color=COLOURS[n],
            label=f"{name}, layer {here[0]['layer']}",
        )
        axis.fill_between(
            x, *zip(*(r["interval"] for r in here), strict=True), color=COLOURS[n], alpha=0.15
        )
        axis.plot(x, [r["null_95"] for r in here], ":", color=COLOURS[n])
    axis.set(xlabel="prompts a side", ylim=(-0.2, 1.0))
    axis.set_title("cosine of directions from two disjoint samples", fontsize=10)
    axis.legend(fontsize=7, loc="lower right")


def _field(figure: Any, axis: Any, rows: list[Row]) -> None:
    here = [r for r in rows if r["kind"] == "harmful - harmless"]
    positions = list(dict.fromkeys(r["position"] for r in here))
    grid = [[r["auroc"] for r in here if r["position"] == p] for p in positions]
    image = axis.imshow(
        grid, aspect="auto", vmin=0.5, vmax=1.0, cmap="viridis", interpolation="nearest"
    )
    axis.set_yticks(range(len(positions)), positions, fontsize=7)
    axis.set_title("held-out AUROC, harmful - harmless, by position", fontsize=10)
    axis.set(xlabel="layer")
    figure.colorbar(image, ax=axis, shrink=0.8)
