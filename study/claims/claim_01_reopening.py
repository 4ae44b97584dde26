"""Claim 1: R-only interventions reopen a model more than H-only ones, beyond controls.

On held-out harmful prompts. The outcome that decides is D: how far the model leans towards refusing
(``evaluation/refusal_score.py``). Success of greedy replies (ASR) is told beside it.

    1. Ablating R lowers D, more than controls that were searched for as hard.
    2. (R - its matched controls) - (H - its matched controls) is below zero: R is compared with H
       at equal length and equal search.
    3. R minus H keeps more than half of R's fall.
"""

from __future__ import annotations

from collections.abc import Mapping

from geometry.effects import differences, paired, pick
from study.claims.evidence import NATS, Evidence, control_changes
from study.claims.registry import CLAIMS, ClaimTest
from study.verdicts import BELOW, Check, Claim, mean_check


def measure(evidence: Evidence) -> Claim:
    bad = evidence.ablations
    alone = pick(bad, mode="none")
    of = {mode: pick(bad, mode=mode, kind="intervention") for mode in ("H", "R", "R-H")}
    controls = {
        "R": evidence.ablated_controls("R"),
        "H": evidence.ablated_controls("H", ("matched",)),
    }
    beyond = {
        mode: differences(
            pick(rows, mode=mode, kind="intervention"), pick(rows, mode=mode, kind="matched"), "d"
        )
        for mode, rows in controls.items()
    }
    own, changes = control_changes(controls["R"], "R")
    fall, rest = (differences(of[mode], alone, "d") for mode in ("R", "R-H"))
    checks = (
        mean_check(
            "D, R ablated - alone",
            list(fall.values()),
            unit=NATS,
            claimed=BELOW,
            controls=changes,
            ranked=own,
        ),
        mean_check(
            "D, (R - R matched) - (H - H matched)",
            _less(beyond["R"], beyond["H"]),
            unit=NATS,
            claimed=BELOW,
        ),
        mean_check(
            "D, R minus H: fall beyond half of R's",
            _less(rest, {name: value / 2 for name, value in fall.items()}),
            unit=NATS,
            claimed=BELOW,
        ),
        *(_asr(name, of["R"], other) for name, other in (("alone", alone), ("H ablated", of["H"]))),
    )
    held_back = [*evidence.too_few_refusals(), *evidence.inadmissible("H", "R", "R-H")]
    held_back += [*evidence.idle("R"), *evidence.confounded()]
    return TEST.claim(evidence, checks, evidence.setting(), held_back)


def _less(first: Mapping[str, float], second: Mapping[str, float]) -> list[float]:
    return [first[name] - second[name] for name in first if name in second]


def _asr(name: str, own: list, other: list) -> Check:
    values = paired(own, other, "complied")
    return mean_check(f"ASR, R ablated - {name}", values, unit="share").told()


TEST = CLAIMS.add(
    ClaimTest(
        number=1,
        title="R-only interventions reopen a model more than H-only, beyond controls; "
        "R minus H is about R-only",
        measure=measure,
        needs=("ablations", "controls of R", "controls of H"),
    )
)
