"""Profiles over layers as a picture: a row a model; separation, cosines, criteria, reliability, and the field of positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.errors import AttackPlaneError
from core.store import read_rows
from core.text import short_spec
from plots.style import COLOURS

SHOWN = {"harmful - harmless": ("t_inst", "-1"), "refused - accepted": ("-1",)}


def draw(folder: Path) -> Path:
    """Read ``layers_*.jsonl`` in ``folder`` and write ``layers.png`` there."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    field, profile, sizes, selection = (
        read_rows(folder / f"layers_{name}.jsonl") for name in ("field", "profile", "sizes", "selection")
    )
    if not profile:
        raise AttackPlaneError(
            "no layer profiles in this run",
            where=folder,
            remedy="python cli.py layers --run RUN --model MODEL",
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
    figure.savefig(path, dpi=110)
    return path


def _separation(axis: Any, rows: list[dict[str, Any]]) -> None:
    n = 0
    for kind, positions in SHOWN.items():
        for position in positions:
            here = [r for r in rows if (r["kind"], r["position"]) == (kind, position)]
            if here:
                x, colour = [r["layer"] for r in here], COLOURS[n]
                axis.plot(x, [r["auroc"] for r in here], color=colour, label=f"{kind} at {position}")
                axis.plot(x, [r["auroc_null_95"] for r in here], ":", color=colour, linewidth=1)
                n += 1
    axis.set(title="separation (dotted: permuted labels, 95 %)", xlabel="layer", ylim=(0.3, 1.02))
    axis.legend(fontsize=7, loc="lower right")


def _cosines(axis: Any, rows: list[dict[str, Any]]) -> None:
    x = [r["layer"] for r in rows]
    null = [
        max([0.0, *(max(c["null_permuted_95"], c["null_random_95"]) for c in r["cosines"].values())])
        for r in rows
    ]
    axis.fill_between(x, [-v for v in null], null, color="#dddddd", label="nulls, 95 % (largest)")
    for n, name in enumerate(rows[0]["cosines"]):
        c = [r["cosines"][name] for r in rows]
        axis.plot(x, [v["value"] for v in c], color=COLOURS[n], label=name)
        axis.fill_between(x, *zip(*(v["interval"] for v in c), strict=True), color=COLOURS[n], alpha=0.15)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set(title="cosines with 95 % intervals", xlabel="layer", ylim=(-1, 1))
    axis.legend(fontsize=6.5, loc="lower left")


def _criteria(axis: Any, rows: list[dict[str, Any]], chosen: dict[str, int | None]) -> None:
    for n, name in enumerate(rows[0]["scores"]):
        values = [r["scores"][name] for r in rows]
        largest = max(map(abs, values)) or 1
        at = chosen.get(name)
        axis.plot(
            [r["layer"] for r in rows],
            [v / largest for v in values],
            color=COLOURS[n],
            label=f"{name}: layer {at}",
        )
        if at is not None:
            axis.axvline(at, color=COLOURS[n], linewidth=0.8, linestyle="--")
    tried = [r for r in rows if "arditi" in r]
    if tried:
        x = [r["layer"] for r in tried]
        for key, marker in (("kl", "x"), ("refuse", "^"), ("comply", "v")):
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
        title=f"criteria (scores over their largest; arditi in nats: layer {chosen.get('arditi')})",
        xlabel="layer",
        ylim=(-0.3, 1.3),
    )
    axis.legend(fontsize=6.5, loc="upper left")


def _reliability(axis: Any, rows: list[dict[str, Any]]) -> None:
    for n, name in enumerate(dict.fromkeys(r["direction"] for r in rows)):
        here = [r for r in rows if r["direction"] == name]
        x = [r["n"] for r in here]
        axis.plot(
            x, [r["cosine"] for r in here], "o-", color=COLOURS[n], label=f"{name}, layer {here[0]['layer']}"
        )
        axis.fill_between(x, *zip(*(r["interval"] for r in here), strict=True), color=COLOURS[n], alpha=0.15)
        axis.plot(x, [r["null_95"] for r in here], ":", color=COLOURS[n])
    axis.set(
        title="cosine of directions from two disjoint samples", xlabel="prompts a side", ylim=(-0.2, 1.0)
    )
    axis.legend(fontsize=7, loc="lower right")


def _field(figure: Any, axis: Any, rows: list[dict[str, Any]]) -> None:
    here = [r for r in rows if r["kind"] == "harmful - harmless"]
    positions = list(dict.fromkeys(r["position"] for r in here))
    grid = [[r["auroc"] for r in here if r["position"] == p] for p in positions]
    image = axis.imshow(grid, aspect="auto", vmin=0.5, vmax=1.0, cmap="viridis", interpolation="nearest")
    axis.set_yticks(range(len(positions)), positions, fontsize=7)
    axis.set(title="held-out AUROC, harmful - harmless, by position", xlabel="layer")
    figure.colorbar(image, ax=axis, shrink=0.8)
