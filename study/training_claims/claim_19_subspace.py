"""Claim 19 [HARC 2607.00572]: HARC's change stays within the H-R subspace.

The share of the change of states that lies outside the reference's H-R plane, against that of the
checkpoint of another arm whose KL to the reference is nearest: a LoRA that changes the model as
much. A change without preference has 1 - 2 / d_model outside.
"""

from __future__ import annotations

from collections.abc import Sequence

from core.errors import NothingToMeasure
from study.training_claims.evidence import BELOW, Training, Trainings, difference, level
from study.training_claims.registry import TRAINING_CLAIMS, TrainingTest
from study.verdicts import Check

SHARE, KL = "share outside H-R", "kl"
FACTOR = 2.0
"""By how much the two KLs may differ."""


def measure(training: Training, trainings: Trainings) -> Sequence[Check]:
    step = training.steps[-1]
    own, kl = training.at(SHARE, step), training.at(KL, step)["value"]
    others = [
        (t, s)
        for t in trainings.all
        if t.arm != training.arm
        for s in t.steps
        if s in t.measures.get(KL, {}) and s in t.measures.get(SHARE, {})
    ]
    near = [
        (max(k / kl, kl / k), t, s)
        for t, s in others
        if kl > 0 and (k := t.at(KL, s)["value"]) > 0 and max(k / kl, kl / k) <= FACTOR
    ]
    if not near:
        raise NothingToMeasure(
            f"no checkpoint of another arm within a factor of {FACTOR:.0f} of its KL",
            where=training.name,
            got=f"KL {kl:.3f}, {len(others)} other checkpoints",
        )
    _, other, at = min(near, key=lambda found: found[0])
    matched = other.at(SHARE, at)
    name = (
        f"share outside, less that of {other.name} step {at} (KL {other.at(KL, at)['value']:.2f})"
    )
    null = own["null_random"]
    return (
        difference(name, own, matched, claimed=BELOW),
        level("share outside below no preference", own, claimed=BELOW, threshold=null).told(),
    )


TRAINING_CLAIMS.add(
    TrainingTest(
        number=19,
        title="HARC's change stays within the H-R subspace more than another LoRA's of equal KL",
        measure=measure,
        needs="the change and KL of the last checkpoint and of other arms' checkpoints",
        arms=("harc",),
        without=("directions", "positions", "terms"),
    )
)
