"""Claim 8 [SG 2606.16349]: the best carrier relocates from late to early layers.

The layer of the refusal carrier at the last checkpoint less that at the first. One search gives one
layer and no interval: a single training cannot decide this, however many prompts it is asked. Five
seeds that agree can.
"""

from __future__ import annotations

from collections.abc import Sequence

from study.training_claims.evidence import BELOW, Training, Trainings, difference
from study.training_claims.registry import TRAINING_CLAIMS, TrainingTest
from study.verdicts import Check


def measure(training: Training, trainings: Trainings) -> Sequence[Check]:
    checks = []
    for kind in ("R", "H"):
        first, last = training.ends(f"layer of {kind}")
        checks.append(difference(f"layer of {kind}, last - first", last, first, claimed=BELOW))
    return (checks[0], checks[1].told())


TRAINING_CLAIMS.add(
    TrainingTest(
        number=8,
        title="The best carrier relocates from late to early layers",
        measure=measure,
        needs="the carriers of two checkpoints; five seeds or more to decide",
        note="one search per checkpoint: needs seeds",
    )
)
