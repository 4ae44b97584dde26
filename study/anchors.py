"""Aligned anchors [SG 2606.16349]: how far do a model's carriers reopen it, beside published rows?

Success of held-out harmful requests with the model left alone, with H, R, and R minus H ablated at
all layers; and the angle between the two carriers. Intervals are Wilson's.
"""

from __future__ import annotations

import math

from core.rows import Row
from core.statistics import wilson
from geometry.effects import by_behaviour, pick
from study.claims.evidence import Evidence
from study.study import Study

MODES = ("none", "H", "R", "R-H")
PUBLISHED: tuple[Row, ...] = (
    {"model": "Llama-3.1-8B", "none": 0.168, "H": 0.140, "R": 0.683, "R-H": 0.658},
    {"model": "Qwen2.5-7B", "none": 0.263, "H": 0.293, "R": 0.405, "R-H": 0.425},
)
"""Angles of the published models: 82 to 90 degrees."""


def anchor_row(study: Study) -> Row:
    """ASR by what is ablated, with intervals, and the angle of the carriers (degrees)."""
    evidence = Evidence(study)
    rows = evidence.ablations
    row: Row = {"model": study.spec, "published": False}
    for mode in MODES:
        won = list(by_behaviour(pick(rows, mode=mode), "complied").values())
        row[mode] = sum(won) / len(won)
        row[f"{mode} interval"] = wilson(sum(won), len(won))
        row["n"] = len(won)
    cosine = float(study.carrier("H").vector @ study.carrier("R").vector)
    row["angle"] = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
    row["admissible"] = not evidence.inadmissible("H", "R", "R-H")
    return row


def published_rows() -> list[Row]:
    return [row | {"published": True} for row in PUBLISHED]
