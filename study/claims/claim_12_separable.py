"""Claim 12: attack classes occupy separable regions of the plane.

The attack classes of one target in its own frame, without baselines: plain requests, initial and
random suffixes, and seed prompts are no attacks.
"""

from __future__ import annotations

from core.records import BASELINES
from geometry.separability import separability
from study.claims.evidence import Evidence
from study.claims.registry import CLAIMS, ClaimTest
from study.verdicts import Check, Claim


def measure(evidence: Evidence) -> Claim:
    r = separability([p for p in evidence.points if p.attack not in BASELINES])
    if r is None:
        why = "fewer than two attack classes or three behaviours on the plane"
        return TEST.claim(evidence, (), held_back=[why])
    low, high = r["interval"]
    check = Check(
        "held-out balanced accuracy of telling the classes apart",
        r["accuracy"],
        low,
        high,
        r["null_95"],
        "above",
        "share",
        r["n"],
        {"permuted_95": r["null_95"], "chance": r["chance"]},
        r["null_mean"],
    )
    note = f"{len(r['classes'])} classes, {r['behaviours']} behaviours, p {r['p']:.3f}"
    return TEST.claim(evidence, (check,), note)


TEST = CLAIMS.add(
    ClaimTest(
        number=12,
        title="Attack classes occupy separable regions of the plane",
        measure=measure,
        needs_attacks=True,
    )
)
