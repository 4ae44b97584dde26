"""Claim 13: suppression of H or R on the prompt side predicts success within an attack class.

AUROC of success by how much less H or R a prompt has than its plain request, within classes.
"""

from __future__ import annotations

from core.records import BASELINES
from geometry.prediction import EITHER, POOLED, success_prediction
from study.claims.evidence import Evidence
from study.claims.registry import CLAIMS, ClaimTest
from study.verdicts import Check, Claim


def measure(evidence: Evidence) -> Claim:
    rows = success_prediction([p for p in evidence.points if p.attack not in BASELINES])
    pooled = {r["score"]: r for r in rows if r["class"] == POOLED}
    if EITHER not in pooled:
        why = "no class has both successes and failures"
        return TEST.claim(evidence, (), held_back=[why])
    r = pooled[EITHER]
    low, high = r["interval"]
    check = Check(
        f"AUROC of success, {EITHER}, pooled within classes",
        r["auroc"],
        low,
        high,
        r["null_95"],
        "above",
        "AUROC",
        r["n"],
        {"permuted_95": r["null_95"]},
        0.5,
    )
    parts = ", ".join(
        f"{score} {pooled[score]['auroc']:.2f} (null {pooled[score]['null_95']:.2f})"
        for score in pooled
        if score != EITHER
    )
    note = f"above 0.5: less of it goes with success; {parts}"
    note += f"; {r['successes']} successes, {r['failures']} failures"
    return TEST.claim(evidence, (check,), note)


TEST = CLAIMS.add(
    ClaimTest(
        number=13,
        title="Suppression of H or R on the prompt side predicts success within an attack class",
        measure=measure,
        needs_attacks=True,
    )
)
