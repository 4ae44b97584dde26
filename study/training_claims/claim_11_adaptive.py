"""Claim 11 [SG 2606.16349]: fixed-source ASR understates adaptive ASR.

GCG made anew on the last checkpoint against frozen GCG prompts of another model (other behaviours,
the same attack). All frozen classes together are told.
"""

from __future__ import annotations

from collections.abc import Sequence

from study.training_claims.evidence import ABOVE, Training, Trainings, difference
from study.training_claims.registry import TRAINING_CLAIMS, TrainingTest
from study.verdicts import Check


def measure(training: Training, trainings: Trainings) -> Sequence[Check]:
    step = training.steps[-1]
    adaptive, gcg, fixed = (
        training.at(f"ASR {name}", step) for name in ("adaptive", "gcg", "fixed")
    )
    return (
        difference("ASR of GCG, adaptive - fixed", adaptive, gcg, claimed=ABOVE),
        difference("ASR, adaptive - all fixed classes", adaptive, fixed, claimed=ABOVE).told(),
    )


TRAINING_CLAIMS.add(
    TrainingTest(
        number=11,
        title="Fixed-source ASR understates adaptive ASR",
        measure=measure,
        needs="adaptive and fixed-source ASR of GCG on at least 12 behaviours",
    )
)
