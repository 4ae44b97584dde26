"""Claim 15: directions at prompt and response positions agree.

At the study's layer, which prompts alone have chosen. They agree if their cosine, free of noise
(``geometry/cross_half.py``), lies above that of 80 degrees, and the labels have to do with it. They
do not if it lies below. R on the prompt side is refused against accepted within harmful and within
harmless prompts, as the response side compares replies to harmful requests alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from geometry.contrasts import Contrast
from geometry.cross_half import cross_half
from study.claims.evidence import Evidence
from study.claims.registry import CLAIMS, ClaimTest
from study.verdicts import ABOVE, Check, Claim, cosine_check

DRAWS = 999


def measure(evidence: Evidence) -> Claim:
    study = evidence.study
    sides = evidence.responses
    paper = "R, response side as in the paper"
    code = "R, response side as in the code"
    checks = (
        _check(evidence, "H", study.harmfulness, sides.harmfulness),
        _check(evidence, paper, study.apart(), sides.refusal_paper),
        # an alternative definition is told, not required
        _check(evidence, code, study.apart(), sides.refusal_code).told(),
        _check(
            evidence, f"{paper}, prompt side as it is", study.refusal, sides.refusal_paper
        ).told(),
    )
    held_back = ["the refusals are ours, the model's own are too few"] if sides.forced else []
    held_back += evidence.confounded()
    sizes = {
        c.name: [len(c.positive), len(c.negative)] for c in (sides.harmfulness, sides.refusal_paper)
    }
    note = f"layer {study.layer}; {evidence.setting()}"
    return replace(TEST.claim(evidence, checks, note, held_back), settings=sizes)


def _check(evidence: Evidence, name: str, prompt: Contrast, reply: Contrast) -> Check:
    layer = evidence.study.layer
    generator = torch.Generator().manual_seed(evidence.study.config.seed)
    found = cross_half(prompt, reply, (layer, layer), DRAWS, generator)
    return cosine_check(f"cosine of prompt and response, {name}", found, claimed=ABOVE)


TEST = CLAIMS.add(
    ClaimTest(
        number=15,
        title="Directions at prompt and response positions agree",
        measure=measure,
        needs=("responses",),
    )
)
