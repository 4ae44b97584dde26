"""Claim 13: suppression of H or R on the prompt side predicts success within an attack class.

Outcome D of attacked prompts is regressed on how far H (at t_goal) and R (at t_post_inst) moved
from the plain request, with an effect for every class and every behaviour. H and R are tested
apart: a positive coefficient means that less of it goes with leaning to comply. The statistic of a
behaviour is its part of the score; its signs are flipped (``geometry/prediction.py``). One of the
two is enough, for which p is doubled.
"""

from __future__ import annotations

from dataclasses import replace

from core.records import BASELINES
from geometry.prediction import POOLED, regress, success_prediction
from study.claims.evidence import NATS, Evidence
from study.claims.registry import CLAIMS, ClaimTest
from study.verdicts import Claim, p_check

FEWEST = 3
"""Behaviours."""


def measure(evidence: Evidence) -> Claim:
    d = {
        r.artifact_id: r.d
        for r in evidence.replays
        if r.target_model == evidence.study.spec and r.d is not None
    }
    points = [
        replace(p, x=p.x_t_goal)
        for p in evidence.points
        if p.attack not in BASELINES and p.prompt_id in d and p.x_t_goal is not None
    ]
    found = regress(points, [d[p.prompt_id] for p in points])
    if not found or found[0]["behaviours"] < FEWEST:
        return TEST.claim(evidence, (), held_back=["too few attacked prompts with a plain request"])
    checks = tuple(
        p_check(
            f"D by {row['name']} moved, within class and behaviour",
            row["slope"],
            row["interval"],
            row["p"],
            row["p_below"],
            f"score test, sign flips over {row['behaviours']} behaviours",
            unit=f"{NATS} per s.d.",
            n=row["behaviours"],
            threshold=0.0,
        )
        for row in found
    )
    attacked = [p for p in evidence.points if p.attack not in BASELINES]
    rates = {r["score"]: r["auroc"] for r in success_prediction(attacked) if r["class"] == POOLED}
    told = ", ".join(f"{name} {value:.2f}" for name, value in rates.items())
    note = f"{len(points)} prompts; AUROC of success within classes: {told or 'one outcome only'}"
    return replace(TEST.claim(evidence, checks, note), any_of=True)


TEST = CLAIMS.add(
    ClaimTest(
        number=13,
        title="Suppression of H or R on the prompt side predicts success within an attack class",
        measure=measure,
        needs_attacks=True,
    )
)
