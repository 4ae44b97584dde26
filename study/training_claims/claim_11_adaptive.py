"""Claim 11 [SG 2606.16349]: fixed-source ASR understates adaptive ASR.

GCG made anew on the last checkpoint against the frozen prompts of other models.
"""

from __future__ import annotations

from collections.abc import Sequence

from study.training_claims.evidence import ABOVE, Training, Trainings, difference
from study.training_claims.registry import TRAINING_CLAIMS, TrainingTest
from study.verdicts import Check


def measure(training: Training, trainings: Trainings) -> Sequence[Check]:
    step = training.steps[-1]
    adaptive, fixed = (training.at(name, step) for name in ("ASR adaptive", "ASR fixed"))
    return (difference("ASR, adaptive - fixed", adaptive, fixed, claimed=ABOVE),)


TRAINING_CLAIMS.add(
    TrainingTest(
        number=11,
        title="Fixed-source ASR understates adaptive ASR",
        measure=measure,
        needs="adaptive ASR on at least 12 behaviours, and fixed-source ASR",
    )
)
