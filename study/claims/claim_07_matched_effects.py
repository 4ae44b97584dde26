"""Claim 7: effects exceed matched controls.

Outcome D under R's ablation (harmful prompts) and addition (harmless prompts), less what searched
random directions do that move every token as far. It is ranked among those, and among the searched
directions of permuted labels, which are ablated and added as R is.

Less than a tenth of the gap in D between harmful and harmless prompts, left alone, counts as no
effect: that refutes the claim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from core.rows import Row
from geometry.effects import by_behaviour, paired, pick
from study.claims.evidence import NATS, Evidence, control_changes
from study.claims.registry import CLAIMS, ClaimTest
from study.verdicts import ABOVE, BELOW, Check, Claim, mean_check

MARGIN = 0.1
"""Of the gap in D; less is no effect."""


def measure(evidence: Evidence) -> Claim:
    ablated, added = evidence.ablated_controls("R"), evidence.additions
    harmful, harmless = (_mean(pick(rows, mode="none")) for rows in (ablated, added))
    margin = MARGIN * max(0.0, harmful - harmless)
    checks = (
        _check("D on harmful, R ablated - matched", ablated, BELOW, margin),
        _check("D on harmless, R added - matched", added, ABOVE, margin),
    )
    held_back = [*evidence.too_few_refusals(), *evidence.inadmissible("R"), *evidence.idle("R")]
    return TEST.claim(evidence, checks, evidence.setting(), held_back)


def _mean(rows: Sequence[Mapping[str, Any]]) -> float:
    return float(np.mean(list(by_behaviour(rows, "d").values())))


def _check(name: str, rows: Sequence[Row], claimed: str, margin: float) -> Check:
    own, matched = (pick(rows, mode="R", kind=kind) for kind in ("intervention", "matched"))
    values = paired(own, matched, "d")
    alone, others = (by_behaviour(r, "d") for r in (pick(rows, mode="none"), matched))
    usual = float(np.mean([others[b] - alone[b] for b in others]))
    changes = control_changes(rows, "R")[1]
    controls = {kind: [c - usual for c in means] for kind, means in changes.items()}
    return mean_check(name, values, unit=NATS, claimed=claimed, controls=controls, margin=margin)


TEST = CLAIMS.add(
    ClaimTest(
        number=7,
        title="Effects exceed matched controls",
        measure=measure,
        needs=("ablations", "controls of R", "additions"),
    )
)
