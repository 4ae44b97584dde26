"""Causal sweeps along a training [SG 2606.16349]: how steeply does D answer to the carriers?

Each mode (H, R, H+R, H-R, R-H) is added at the refusal carrier's layer by lambda times the class
difference of R, lambda in {+-4, +-2, +-1, +-0.5, 0}, on held-out prompts. Matched controls are
random unit directions of the same length.

    slope   least squares of D on lambda within |lambda| <= 1, per prompt, nats per token
    beyond  the slope less the mean slope of the matched controls
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from core.records import HARMFUL, HARMLESS
from core.rows import Row
from evaluation.behaviours import spread
from geometry.controls import design
from geometry.effects import pick
from geometry.interventions import MODES
from study.intervene import SWEEP
from study.outcomes import measure, site_of
from study.study import Study

PROMPTS = 6
"""Held-out prompts of each label."""
TEXTS = 2
"""Refusals, and openings that comply, in outcome D."""
CONTROLS = 1
NEAR = 1.0
UNIT = "nats per token per class difference"


def sweep(study: Study) -> list[Row]:
    """Outcome rows of all modes and strengths, with matched controls."""
    site, made_from = site_of(study, None, operation="steer")
    edits = [
        edit
        for mode in MODES
        for strength in SWEEP
        for edit in design(mode, "steer", strength, site, controls=CONTROLS, seed=study.config.seed)
        if edit.kind in ("intervention", "matched")
    ]
    texts = study.openings.every_other(1, TEXTS)
    rows: list[Row] = []
    for label in (HARMFUL, HARMLESS):
        prompts = spread(study.held_out(label), PROMPTS)
        rows += measure(study, edits, prompts, 0, made_from, texts)
    return rows


def slopes(rows: Sequence[Row]) -> Iterator[tuple[str, list[float]]]:
    """(measure, one slope per prompt) of every mode and label, as they are and beyond controls."""
    for label in (HARMFUL, HARMLESS):
        for mode in MODES:
            own, matched = (
                _slopes(pick(rows, label=label, mode=mode, kind=kind))
                for kind in ("intervention", "matched")
            )
            name = f"slope of D by {mode}, {label}"
            yield name, list(own.values())
            yield f"{name}, beyond controls", [own[b] - matched[b] for b in own]


def _slopes(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Slope of each behaviour, over all draws together."""
    points: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        if abs(r["strength"]) <= NEAR:
            points.setdefault(r["behaviour_id"], []).append((r["strength"], r["d"]))
    found = {}
    for name, own in points.items():
        x, y = np.array(own).T
        found[name] = float(np.polyfit(x, y, 1)[0])
    return found
