"""Claim 8 [SG 2606.16349]: the best carrier relocates from late to early layers.

The layer of the refusal carrier at the last checkpoint less that at the first. One search gives one
layer and no interval: a single training cannot decide this, however many prompts it is asked. Five
seeds that agree can.
"""

from __future__ import annotations

from collections.abc import Sequence

from study.training_claims.evidence import BELOW, Training, Trainings, along
from study.training_claims.registry import TRAINING_CLAIMS, TrainingTest
from study.verdicts import Check


def measure(training: Training, trainings: Trainings) -> Sequence[Check]:
    refusal, harmfulness = (
        along(training, f"layer of {kind}", claimed=BELOW) for kind in ("R", "H")
    )
    return refusal, harmfulness.told()


TRAINING_CLAIMS.add(
    TrainingTest(
        number=8,
        title="The best carrier relocates from late to early layers",
        measure=measure,
        needs="the carriers of two checkpoints; five seeds or more to decide",
        note="one search per checkpoint: needs seeds",
    )
)
