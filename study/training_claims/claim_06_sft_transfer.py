"""Claim 6 [SG 2606.16349]: transfer to SFT checkpoints follows drift or the behaviour state.

Spearman's correlation of TASR with the drift of R, or with the fixed-source ASR, of the target,
over targets of the arm (``transfer/predictors.py``). Published |rho|: drift .591, ASR .562. One of
the two is enough.
"""

from __future__ import annotations

from collections.abc import Sequence

from study.training_claims.evidence import ABOVE, Training, Trainings
from study.training_claims.prediction import prediction_check
from study.training_claims.registry import TRAINING_CLAIMS, TrainingTest
from study.verdicts import Check


def measure(training: Training, trainings: Trainings) -> Sequence[Check]:
    return [
        prediction_check(trainings, training.arm, name, claimed=ABOVE)
        for name in ("drift of R", "ASR fixed")
    ]


TRAINING_CLAIMS.add(
    TrainingTest(
        number=6,
        title="SFT transfer follows drift or behaviour state",
        measure=measure,
        needs="prompts optimised on checkpoints, replayed on at least four of the arm",
        arms=("sft",),
        any_of=True,
    )
)
