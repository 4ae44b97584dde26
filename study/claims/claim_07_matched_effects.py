"""Claim 7: effects exceed matched controls.

Outcome D under R's ablation (harmful prompts) and addition (harmless prompts), less what searched
random directions do that move every token as far. It is ranked among those, and among the searched
directions of permuted labels, which are ablated and added as R is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core.rows import Row
from geometry.effects import by_behaviour, paired, pick
from study.claims.evidence import NATS, Evidence, control_changes
from study.claims.registry import CLAIMS, ClaimTest
from study.verdicts import ABOVE, BELOW, Check, Claim, mean_check


def measure(evidence: Evidence) -> Claim:
    checks = (
        _check("D on harmful, R ablated - matched", evidence.ablated_controls("R"), BELOW),
        _check("D on harmless, R added - matched", evidence.additions, ABOVE),
    )
    held_back = [*evidence.too_few_refusals(), *evidence.inadmissible("R"), *evidence.idle("R")]
    return TEST.claim(evidence, checks, evidence.setting(), held_back)


def _check(name: str, rows: Sequence[Row], claimed: str) -> Check:
    own, matched = (pick(rows, mode="R", kind=kind) for kind in ("intervention", "matched"))
    values = paired(own, matched, "d")
    alone, others = (by_behaviour(r, "d") for r in (pick(rows, mode="none"), matched))
    usual = float(np.mean([others[b] - alone[b] for b in others]))
    changes = control_changes(rows, "R")[1]
    controls = {kind: [c - usual for c in means] for kind, means in changes.items()}
    return mean_check(name, values, unit=NATS, claimed=claimed, controls=controls)


TEST = CLAIMS.add(ClaimTest(number=7, title="Effects exceed matched controls", measure=measure))
