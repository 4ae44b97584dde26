"""Checks on what predicts transfer, from rows of ``transfer/predictors.py``."""

from __future__ import annotations

from core.errors import NothingToMeasure
from study.sparse_transfer import RAW
from study.training_claims.evidence import WITHIN, Trainings
from study.verdicts import Check, p_check

FEWEST = 5
WEAK = 0.3
"""A smaller |rho| ranks nothing."""


def prediction_check(trainings: Trainings, arm: str, predictor: str, *, claimed: str) -> Check:
    """|rho| of a predictor over the arm's targets: above chance, or within ``WEAK`` of zero.

    Raises:
        NothingToMeasure: too few checkpoints of the arm were targets.
    """
    row = next(
        (
            r
            for r in trainings.predictions
            if (r["targets"], r["predictor"], r["of"]) == (arm, predictor, RAW)
        ),
        None,
    )
    if row is None:
        raise NothingToMeasure(
            f"TASR on fewer than four targets of {arm} with a known {predictor!r}",
            remedy="optimise prompts on checkpoints and replay them on all (gcg, transfer)",
        )
    low, high = row["interval"]
    few = row["n_trainings"] < FEWEST
    if claimed == WITHIN:
        inside = low > -WEAK and high < WEAK
        pair = (0.05 if inside else 1.0), row["p"] if abs(row["rho"]) > WEAK else 1.0
        test = "95 % interval over checkpoints and behaviours; against: permuted checkpoints"
    else:
        pair = row["p"], 1.0 if high > WEAK or low < -WEAK else 0.05
        test = "permuted checkpoints; against: 95 % interval within a weak one"
    if few:  # whatever grows along a training correlates with whatever else does
        pair = 1.0, 1.0
        test += f"; {row['n_trainings']} trainings, fewer than {FEWEST}, decide nothing"
    return p_check(
        f"rho of TASR with the target's {predictor}, {arm}",
        row["rho"],
        (low, high),
        *pair,
        test,
        unit="",
        n=row["n_targets"],
        threshold=WEAK if claimed == WITHIN else 0.0,
        claimed=claimed,
    )
