"""Claim 15: directions at prompt and response positions agree.

At the study's layer, which prompts alone have chosen.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from core.errors import AttackPlaneError
from geometry.contrasts import Contrast
from geometry.resampling import cosine_statistics
from study.claims.evidence import Evidence
from study.claims.registry import CLAIMS, ClaimTest
from study.verdicts import Check, Claim


def measure(evidence: Evidence) -> Claim:
    study = evidence.study
    try:
        sides = evidence.responses
    except AttackPlaneError as error:
        return TEST.claim(evidence, (), held_back=[str(error)])
    checks = (
        _check(evidence, "H", study.harmfulness, sides.harmfulness),
        _check(evidence, "R, response side as in the paper", study.refusal, sides.refusal_paper),
    )
    # an alternative definition is told, not required
    code = _check(evidence, "R, response side as in the code", study.refusal, sides.refusal_code)
    note = f"layer {study.layer}; {evidence.setting()}"
    held_back = ["the refusals are ours, the model's own are too few"] if sides.forced else []
    note += f"; R, response side as in the code {code.value:+.2f} "
    note += f"[{code.low:+.2f}, {code.high:+.2f}], nulls {code.threshold:.2f}"
    sizes = {
        c.name: [len(c.positive), len(c.negative)] for c in (sides.harmfulness, sides.refusal_paper)
    }
    return replace(TEST.claim(evidence, checks, note, held_back), settings=sizes)


def _check(evidence: Evidence, name: str, prompt: Contrast, reply: Contrast) -> Check:
    study = evidence.study
    layer = study.layer
    generator = torch.Generator().manual_seed(study.config.seed)
    s = cosine_statistics(prompt, reply, study.config.resamples, generator)
    low, high = s["interval"][layer].tolist()
    nulls = {
        "random_95": float(s["null_random"][layer]),
        "permuted_95": float(s["null_permuted"][layer]),
    }
    return Check(
        f"cos(prompt, response), {name}",
        float(s["value"][layer]),
        low,
        high,
        max(nulls.values()),
        "above",
        "cosine",
        min(prompt.size, reply.size),
        nulls,
        0.0,
    )


TEST = CLAIMS.add(
    ClaimTest(
        number=15,
        title="Directions at prompt and response positions agree",
        measure=measure,
    )
)
