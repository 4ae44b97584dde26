"""Claim 16 [HARC 2607.00572]: HARC raises in-band cosines beyond the gain of permuted labels.

The cosine of held-out harmful prompts with the reference's H (t_inst) and R (t_post_inst) in its
two best layers by prompts; HARC's own layers, by all factors of Eq. 6, may be others. The gain of a
training, last checkpoint less reference, is compared with that of the same training on directions
of permuted labels (``--directions permuted``), which an audit found to reach half of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from study.training_claims.evidence import ABOVE, Training, Trainings, difference
from study.training_claims.registry import TRAINING_CLAIMS, TrainingTest
from study.verdicts import Check

CONTROL = "directions=permuted"


def measure(training: Training, trainings: Trainings) -> Sequence[Check]:
    control = training.like(trainings, CONTROL)
    checks = []
    for kind in ("H", "R"):
        name = f"harmful with {kind}"
        own, theirs = (t.at(name, t.steps[-1]) for t in (training, control))
        before = training.of_reference(name)
        checks.append(difference(f"cosine {name}, gain", own, before, claimed=ABOVE).told())
        checks.append(difference(f"cosine {name}, gain - permuted's", own, theirs, claimed=ABOVE))
    return checks


TRAINING_CLAIMS.add(
    TrainingTest(
        number=16,
        title="HARC raises in-band cosines beyond the gain of permuted labels",
        measure=measure,
        needs="HARC, and HARC with --directions permuted",
        arms=("harc",),
        without=("directions", "positions", "terms"),
    )
)
