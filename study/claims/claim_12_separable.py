"""Claim 12: attack classes occupy separable regions of the plane.

The attack classes of one target by its own directions, without baselines: plain requests, initial
and random suffixes, and seed prompts are no attacks. A wrapper's constant ending decides t_inst, so
a class would be told from others by its last words. What decides is a point's displacement from the
plain request, less the displacement that a matched harmless request shows in the same wrapper.
Where the points themselves lie is told beside it. Classes that are told apart by less than five
points more than under permuted labels do not occupy regions: that refutes the claim.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from core.readings import PlanePoint
from core.records import BASELINES
from geometry.separability import MARGIN, separability
from study.claims.evidence import Evidence
from study.claims.registry import CLAIMS, ClaimTest
from study.verdicts import Check, Claim, p_check

DRAWS = 999


def measure(evidence: Evidence) -> Claim:
    inst = [p for p in evidence.placed("t_inst") if p.attack not in BASELINES]
    goal = [p for p in evidence.placed("t_goal") if p.attack not in BASELINES]
    less = [
        replace(p, x=p.beyond_wrapper[0], y=p.beyond_wrapper[1]) for p in inst if p.beyond_wrapper
    ]
    decides = _check("displacement less the wrapper's", less)
    if decides is None:
        why = "fewer than two attack classes or three behaviours with harmless counterparts"
        return TEST.claim(evidence, (), held_back=[why])
    told = [_check("at t_goal", goal), _check("at t_inst", inst)]
    counts = Counter(p.class_name for p in less)
    note = ", ".join(f"{name} {n}" for name, n in counts.items())
    note += f"; R by the estimator {evidence.study.estimator}"
    return TEST.claim(evidence, (decides, *(c.told() for c in told if c)), note)


def _check(name: str, points: Sequence[PlanePoint]) -> Check | None:
    r = separability(points, draws=DRAWS)
    if r is None:
        return None
    return p_check(
        f"held-out accuracy of telling classes apart, {name}",
        r["accuracy"],
        r["interval"],
        max(r["p"], r["p_present"]),
        r["p_absent"],
        f"{DRAWS} permutations within behaviours; bootstrap, more or less than {MARGIN} beyond",
        unit="share",
        n=r["behaviours"],
        threshold=r["null_mean"],
        nulls={"permuted_95": r["null_95"], "chance": r["chance"]},
    )


TEST = CLAIMS.add(
    ClaimTest(
        number=12,
        title="Attack classes occupy separable regions of the plane",
        measure=measure,
        needs=("attacks",),
    )
)
