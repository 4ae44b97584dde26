"""The plane as one HTML file: choose target and frame, hover for the prompt, hide classes."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

from core.files import each_row, read_rows, write_atomically
from core.rows import Row
from core.specs import short_spec
from core.statistics import FEW
from core.store import ATTACKS, BEHAVIOURS
from plots.plane_png import ellipse_axes, frames_of
from plots.style import (
    ANCHORS,
    NOT_JUDGED,
    PLOTLY_ANCHORS,
    PLOTLY_MARKERS,
    attack_names,
    centre_start,
    centres_of,
    class_styles,
    left_out,
    read_exports,
)


def draw(folder: Path) -> Path:
    """Read the exports in ``folder`` and write ``plane.html`` there; the page needs no network."""
    import plotly.graph_objects as go

    rows, classes = read_exports(folder)
    drawn = {r["prompt_id"] for r in rows}
    prompts = {
        r["artifact_id"]: r["prompt"]
        for _, r in each_row(folder / ATTACKS)
        if r["artifact_id"] in drawn
    }
    prompts |= {r["behaviour_id"]: r["request"] for r in read_rows(folder / BEHAVIOURS)}
    targets = list(dict.fromkeys(r["target"] for r in rows))
    names = attack_names(rows)
    style = {n: (colour, PLOTLY_ANCHORS[marker]) for n, (colour, marker) in ANCHORS.items()}
    style |= class_styles(names, PLOTLY_MARKERS)
    figure, owners = go.Figure(), []
    views = [(t, f) for f in frames_of(rows) for t in targets]
    for view in views:
        here = [r for r in rows if (r["target"], r["frame"]) == view]
        for trace in _traces(here, classes, style, prompts):
            trace.visible = view == views[0]
            figure.add_trace(trace)
            owners.append(view)
    buttons: list[Row] = []
    for view in views:
        first = next(r for r in rows if (r["target"], r["frame"]) == view)
        title = _title(first, left_out(rows, classes))
        buttons.append(
            {
                "label": html.escape(f"{short_spec(view[0])}, {view[1]} frame"),
                "method": "update",
                "args": [
                    {"visible": [owner == view for owner in owners]},
                    {"title.text": title},
                ],
            }
        )
    position = html.escape(rows[0]["position"])
    figure.update_layout(
        title={"text": buttons[0]["args"][1]["title.text"], "font": {"size": 15}},
        template="plotly_white",
        updatemenus=[
            {"buttons": buttons, "x": 1.0, "y": 1.02, "xanchor": "right", "yanchor": "bottom"}
        ],
        xaxis_title=f"harmfulness projection at {position} (residual units)",
        yaxis_title="refusal projection at t_post_inst (residual units)",
        legend={"itemsizing": "constant"},
        margin={"t": 130},
        height=760,
    )
    path = folder / "plane.html"
    write_atomically(path, figure.to_html(include_plotlyjs=True, full_html=True))
    return path


def _title(row: Row, more: str) -> str:
    return (
        f"Attack plane of {html.escape(short_spec(row['target']))}, {row['frame']} frame, layer "
        f"{row['layer']}"
        f"<br><sub>cos(base, own): harmfulness {row['cos_base_own_harmfulness']:.2f}, refusal "
        f"{row['cos_base_own_refusal']:.2f}. Filled: jailbroken, hollow: not, grey: not judged. "
        "Ellipses: one standard deviation. Dashed: the wrapper with a harmless request"
        f"{more}.</sub>"
    )


def _traces(
    rows: list[Row],
    classes: list[Row],
    style: dict[str, tuple[str, str]],
    prompts: dict[str, str],
) -> list[Any]:
    import plotly.graph_objects as go

    traces = []
    centres = centres_of(classes, rows[0]["target"], rows[0]["frame"])
    for name, (colour, symbol) in style.items():
        members = [r for r in rows if r["class_name"] == name]
        if not members:
            continue
        shown = html.escape(name)
        attacked = members[0]["kind"] == "attack"
        fill = {True: colour, False: "white", None: NOT_JUDGED if attacked else colour}
        traces.append(
            go.Scatter(
                x=[r["x"] for r in members],
                y=[r["y"] for r in members],
                mode="markers",
                name=shown,
                legendgroup=shown,
                marker={
                    "symbol": symbol,
                    "size": 11 if attacked else 8,
                    "color": [fill[r["jailbroken"]] for r in members],
                    "line": {"color": colour, "width": 2},
                    "opacity": 0.95 if attacked else 0.6,
                },
                text=[_hover(r, prompts) for r in members],
                hoverinfo="text",
            )
        )
        centre = centres.get(name)
        if centre and centre["covariance"] is not None and centre["n"] >= FEW:
            outline = _outline(centre["centroid"], centre["covariance"])
            traces.append(_line(*outline, colour, shown, 1, fill="toself"))
        if any(r["plain_x"] is not None for r in members):
            x: list[Any] = []
            y: list[Any] = []
            for r in members:
                if r["plain_x"] is not None:
                    x += [r["plain_x"], r["x"], None]
                    y += [r["plain_y"], r["y"], None]
            traces.append(_line(x, y, colour, shown, 1, dash="dot", arrows=True))
            if centre and centre.get("displaced", FEW) >= FEW and (start := centre_start(centre)):
                (x0, y0), (x1, y1) = start, centre["centroid"]
                traces.append(_line([x0, x1], [y0, y1], colour, shown, 3, arrows=True))
                if centre["wrapper"]:
                    x1, y1 = x0 + centre["wrapper"][0], y0 + centre["wrapper"][1]
                    traces.append(_line([x0, x1], [y0, y1], colour, shown, 2, dash="dash"))
    return traces


def _line(
    x: list[Any],
    y: list[Any],
    colour: str,
    group: str,
    width: int,
    *,
    fill: str | None = None,
    dash: str | None = None,
    arrows: bool = False,
) -> Any:
    import plotly.graph_objects as go

    marker = {"symbol": "arrow", "angleref": "previous", "size": 9, "color": colour}
    return go.Scatter(
        x=x,
        y=y,
        mode="lines+markers" if arrows else "lines",
        marker=marker if arrows else None,
        line={"color": colour, "width": width, "dash": dash},
        fill=fill,
        opacity=0.35 if fill or width == 1 else 0.9,
        legendgroup=group,
        showlegend=False,
        hoverinfo="skip",
    )


def _outline(
    centroid: list[float], covariance: list[list[float]]
) -> tuple[list[float], list[float]]:
    """Points of the one-standard-deviation ellipse."""
    width, height, degrees = ellipse_axes(covariance)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = [], []
    for k in range(61):
        u = width / 2 * math.cos(2 * math.pi * k / 60)
        v = height / 2 * math.sin(2 * math.pi * k / 60)
        x.append(centroid[0] + c * u - s * v)
        y.append(centroid[1] + s * u + c * v)
    return x, y


def _hover(row: Row, prompts: dict[str, str]) -> str:
    prompt = prompts.get(row["prompt_id"], "")
    lines = [html.escape(prompt[i : i + 80]) for i in range(0, len(prompt), 80)]
    verdict = {True: "jailbroken", False: "not jailbroken", None: "not judged"}[row["jailbroken"]]
    place = (
        f"harmfulness {row['x']:.2f} (cos {row['x_cosine']:.2f}), refusal {row['y']:.2f} (cos "
        f"{row['y_cosine']:.2f})"
    )
    name, behaviour = (html.escape(str(row[key])) for key in ("class_name", "behaviour_id"))
    return "<br>".join([f"<b>{name}</b> {behaviour}: {verdict}", place, *lines])
