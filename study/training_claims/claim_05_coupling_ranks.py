"""Claim 5 [SG 2606.16349]: coupling ranks transfer in R2D2, not in SFT.

Spearman's correlation of TASR with the target's HRCI v2, over targets of one arm
(``transfer/predictors.py``). Published |rho|: R2D2 .965, SFT .030. In R2D2 it exceeds permuted
numbers; in SFT it lies below ``WEAK`` in size, by its interval. It is a claim about arms: every
training of an arm is told the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from study.training_claims.evidence import ABOVE, WITHIN, Training, Trainings
from study.training_claims.prediction import prediction_check
from study.training_claims.registry import TRAINING_CLAIMS, TrainingTest
from study.verdicts import Check

NAME = "HRCI v2"


def measure(training: Training, trainings: Trainings) -> Sequence[Check]:
    claimed = ABOVE if training.arm == "r2d2" else WITHIN
    return (prediction_check(trainings, training.arm, NAME, claimed=claimed),)


TRAINING_CLAIMS.add(
    TrainingTest(
        number=5,
        title="Coupling ranks transfer in R2D2, not in SFT",
        measure=measure,
        needs="prompts optimised on checkpoints, replayed on at least four of the arm",
        arms=("r2d2", "sft"),
    )
)
