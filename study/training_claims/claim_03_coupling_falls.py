"""Claim 3 [RG 2604.27019]: in R2D2 coupling falls, ASR and utility rise, over-refusal falls.

The last saved checkpoint against the first one. Published for Mistral-7B from update 50 to 500: ASR
0 to .250, XSTest refusal 1 to .228, utility 0 to 1.117. Utility here is the share of verifiable
instructions that are followed. Coupling is C_sub, of the whole fields: HRCI rests on carriers that
were searched, and its interval leaves the search out. It is told.
"""

from __future__ import annotations

from collections.abc import Sequence

from study.training_claims.evidence import ABOVE, BELOW, Training, Trainings, along
from study.training_claims.registry import TRAINING_CLAIMS, TrainingTest
from study.verdicts import Check

MEASURES = (
    ("C_sub", BELOW),
    ("ASR fixed", ABOVE),
    ("instructions", ABOVE),
    ("refused, pseudo_harmful", BELOW),
)


def measure(training: Training, trainings: Trainings) -> Sequence[Check]:
    checks = [along(training, name, claimed=claimed) for name, claimed in MEASURES]
    return [*checks, along(training, "HRCI v2", claimed=BELOW).told()]


TRAINING_CLAIMS.add(
    TrainingTest(
        number=3,
        title="R2D2: coupling falls along training, ASR and utility rise, over-refusal falls",
        measure=measure,
        needs="HRCI, fixed-source ASR, instructions and over-refusal of two checkpoints",
        arms=("r2d2",),
    )
)
