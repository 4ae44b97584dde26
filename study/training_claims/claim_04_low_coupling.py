"""Claim 4 [RG 2604.27019]: SFT has low coupling with high ASR.

Low is what permuted labels show: C_sub of the last checkpoint lies below their 95th percentile.
(HRCI rests on carriers that were searched, and its interval leaves the search out.) High is more
than the reference's ASR. Published for Mistral-7B at update 500: ASR .578.
"""

from __future__ import annotations

from collections.abc import Sequence

from core.errors import NothingToMeasure
from study.training_claims.evidence import ABOVE, BELOW, Training, Trainings, difference, level
from study.training_claims.registry import TRAINING_CLAIMS, TrainingTest
from study.verdicts import Check


def measure(training: Training, trainings: Trainings) -> Sequence[Check]:
    step = training.steps[-1]
    coupling, asr = (training.at(name, step) for name in ("C_sub", "ASR fixed"))
    null = coupling["null_permuted"]
    if null is None:
        raise NothingToMeasure("no null of C_sub", where=training.name)
    before = training.of_reference("ASR fixed")
    return (
        level("C_sub below its permuted labels'", coupling, claimed=BELOW, threshold=null),
        difference("ASR fixed, last - reference", asr, before, claimed=ABOVE),
    )


TRAINING_CLAIMS.add(
    TrainingTest(
        number=4,
        title="SFT: low coupling with high ASR",
        measure=measure,
        needs="C_sub and fixed-source ASR of the last checkpoint and the reference",
        arms=("sft",),
    )
)
