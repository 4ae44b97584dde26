"""Claim 18 [HARC 2607.00572]: coupling at both positions over-refuses less than at one.

Over-refusal of held-out pseudo-harmful requests at the last checkpoint, against the same training
with one position (``--positions``); against each that is there.
"""

from __future__ import annotations

from collections.abc import Sequence

from core.errors import NothingToMeasure
from study.training_claims.evidence import BELOW, Training, Trainings, difference
from study.training_claims.registry import TRAINING_CLAIMS, TrainingTest
from study.verdicts import Check
from training.harc import POSITIONS

NAME = "refused, pseudo_harmful"


def measure(training: Training, trainings: Trainings) -> Sequence[Check]:
    checks = []
    for position in POSITIONS[1:]:
        try:
            single = training.like(trainings, f"positions={position}")
        except NothingToMeasure:
            continue
        own, theirs = (t.at(NAME, t.steps[-1]) for t in (training, single))
        title = f"{NAME}, both - {position} alone"
        checks.append(difference(title, own, theirs, claimed=BELOW))
    if not checks:
        raise NothingToMeasure(
            "no harc at one position",
            where=training.name,
            remedy=f"train one with --positions {POSITIONS[1]}",
        )
    return checks


TRAINING_CLAIMS.add(
    TrainingTest(
        number=18,
        title="Dual position beats single position on over-refusal",
        measure=measure,
        needs="HARC, and HARC at one position",
        arms=("harc",),
        without=("directions", "positions", "terms"),
    )
)
