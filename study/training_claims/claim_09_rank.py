"""Claim 9 [SG 2606.16349]: the effective rank of the refusal field stays flat along training.

An equivalence test: the last checkpoint's lies within a tenth of the first one's. Of rows of unit
length, since raw rows are ruled by the lengths of late layers; raw ones are told.
"""

from __future__ import annotations

from collections.abc import Sequence

from study.training_claims.evidence import WITHIN, Training, Trainings, along
from study.training_claims.registry import TRAINING_CLAIMS, TrainingTest
from study.verdicts import Check

FLAT = 0.1
"""Share of the first checkpoint's rank; a smaller change is none."""


def measure(training: Training, trainings: Trainings) -> Sequence[Check]:
    rank = "effective rank of R"
    of_unit_rows = along(training, f"{rank}, rows of unit length", claimed=WITHIN, flat=FLAT)
    return of_unit_rows, along(training, rank, claimed=WITHIN, flat=FLAT).told()


TRAINING_CLAIMS.add(
    TrainingTest(
        number=9,
        title="Effective rank stays flat along training",
        measure=measure,
        needs="effective rank of two checkpoints",
    )
)
