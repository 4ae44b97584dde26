"""Claim 13: suppression of H or R on the prompt side predicts success within an attack class.

Outcome D of attacked prompts is regressed on how far H (at t_inst) and R (at t_post_inst) moved
from the plain request, less what the wrapper alone moves them (a harmless request in it), with an
effect for every class and every behaviour. H and R are tested apart: a positive coefficient means
that less of it goes with leaning to comply. Each behaviour contributes one number to the score of
the regression, and the test flips the signs of these numbers (``geometry/prediction.py``). D is
read from the same states, so many directions would predict it: H and R are ranked among directions
of permuted labels too. One of the two is enough, for which p is doubled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from core.readings import PlanePoint
from core.records import BASELINES
from core.statistics import permutation_p
from geometry.plane import plain_requests
from geometry.prediction import POOLED, regress, success_prediction
from geometry.resampling import permuted
from pipeline.plane import PlaneReading
from study.claims.evidence import NATS, Evidence
from study.claims.registry import CLAIMS, ClaimTest
from study.study import Study
from study.verdicts import Claim, p_check

FEWEST = 12
"""Behaviours. Of fewer the test rejects too often (7 to 9 % at a true null)."""
DRAWS = 999
"""Directions of permuted labels."""


def measure(evidence: Evidence) -> Claim:
    study, reading = evidence.study, evidence.reading
    d = {
        r.artifact_id: r.d
        for r in evidence.replays
        if r.target_model == study.spec and r.d is not None
    }
    attacked = [p for p in evidence.placed("t_inst") if p.attack not in BASELINES]
    points = [p for p in attacked if p.prompt_id in d and p.beyond_wrapper]
    behaviours = len({p.behaviour_id for p in points})
    if reading is None or behaviours < FEWEST:
        why = f"attacked prompts with a harmless counterpart on {behaviours} behaviours only"
        return TEST.claim(evidence, (), held_back=[why])
    outcome = [d[p.prompt_id] for p in points]
    groups, classes = [p.behaviour_id for p in points], [p.class_name for p in points]
    moved = np.array([p.beyond_wrapper for p in points])
    found = regress(moved, outcome, groups, classes)
    nulls = _nulls(study, reading, points, moved, outcome)
    checks = []
    for name, row in found.items():
        ranks = [permutation_p(s * row.score, s * nulls[name]) for s in (1, -1)]
        checks.append(
            p_check(
                f"D by {name} moved, within class and behaviour",
                row.slope,
                row.interval,
                max(row.p, ranks[0]),
                max(row.p_below, ranks[1]),
                f"score test, sign flips over {behaviours} behaviours; rank among {DRAWS} permuted",
                unit=f"{NATS} per s.d.",
                n=behaviours,
                threshold=0.0,
            )
        )
    rates = {r["score"]: r["auroc"] for r in success_prediction(attacked) if r["class"] == POOLED}
    told = ", ".join(f"{name} {value:.2f}" for name, value in rates.items())
    note = f"{len(points)} prompts; R by the estimator {study.estimator}"
    note += f"; AUROC of success within classes: {told or 'one outcome only'}"
    return replace(TEST.claim(evidence, tuple(checks), note), any_of=True)


def _nulls(
    study: Study,
    reading: PlaneReading,
    points: Sequence[PlanePoint],
    moved: np.ndarray,
    outcome: Sequence[float],
) -> dict[str, np.ndarray]:
    """Scores of the regression along directions of permuted labels, in place of H and of R."""
    layer, generator = study.layer, torch.Generator().manual_seed(study.config.seed)
    row_of = {info.prompt_id: n for n, info in enumerate(reading.infos)}
    plain = plain_requests(reading.infos)
    rows = [row_of[p.prompt_id] for p in points]
    starts = [n for n in (plain[row] for row in rows) if n is not None]
    wraps = [reading.wrappers[row] for row in rows]
    groups, classes = [p.behaviour_id for p in points], [p.class_name for p in points]
    scores: dict[str, np.ndarray] = {}
    sides = (("H", study.harmfulness, "t_inst"), ("R", study.refusal, "t_post_inst"))
    for column, (name, contrast, position) in enumerate(sides):
        resid = reading.activations.of(layer, position).double()
        own = resid[rows] - resid[starts]
        own = own - resid[[w[0] for w in wraps]] + resid[[w[1] for w in wraps]]
        dealt = permuted([contrast.at_layer(layer)], DRAWS, generator)[0][:, 0].double()
        along = (own @ dealt.T).numpy()
        drawn = []
        for k in range(DRAWS):
            other = moved.copy()
            other[:, column] = along[:, k]
            found = regress(other, outcome, groups, classes, resamples=2)
            drawn.append(found[name].score if name in found else 0.0)
        scores[name] = np.array(drawn)
    return scores


TEST = CLAIMS.add(
    ClaimTest(
        number=13,
        title="Suppression of H or R on the prompt side predicts success within an attack class",
        measure=measure,
        needs=("attacks",),
    )
)
