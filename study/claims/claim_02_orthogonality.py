"""Claim 2: the carriers of H and R are near orthogonal on aligned models.

An equivalence test: both one-sided bounds of the cosine lie within those of 80 degrees. The cosine
is free of noise (``geometry/cross_half.py``). Beside it stands a positive control, the same concept
read at the other concept's site: harmfulness where R is read. If that cannot be told from
orthogonal either, nothing was learnt. Published angles are 82 to 90 degrees.

The prompts that a model refuses are mostly the harmful ones, so its usual R is partly harmfulness.
What decides is R within harmful and within harmless prompts, at the same place. The usual R is told
beside it.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import torch

from core.rows import Row
from geometry.cross_half import cross_half
from study.claims.evidence import Evidence
from study.claims.registry import CLAIMS, ClaimTest
from study.coupling import angles_of, coupling, draw_fields
from study.study import Study
from study.verdicts import ABOVE, WITHIN, Claim, cosine_check

UNRELIABLE = 0.5
"""Estimated cosine of a direction with the true one. Below it nothing is said of angles."""
DRAWS = 999


def measure(evidence: Evidence) -> Claim:
    study = evidence.study
    h, r = study.carrier("H"), study.carrier("R")
    first, usual = study.field("H")[h.position], study.field("R")[r.position]
    generator = torch.Generator().manual_seed(study.config.seed)
    layers = h.layer, r.layer
    there = study.contrast("harm", r.position)
    found, control, mixed = (
        cross_half(first, c, layers, DRAWS, generator)
        for c in (study.apart(r.position), there, usual)
    )
    name = "cosine of the H and the R carrier, R within labels, without noise"
    positive = cosine_check("positive control: harmfulness at R's site", control, claimed=ABOVE)
    checks = (
        cosine_check(name, found, claimed=WITHIN),
        positive.told(),
        cosine_check("the same, R as it is", mixed, claimed=WITHIN).told(),
    )
    settings = _settings(study)
    note = evidence.setting()
    note += f"; cosines with their true directions: H {found.trust[0]:.2f}, R {found.trust[1]:.2f}"
    note += f" (as it is {mixed.trust[1]:.2f})"
    note += f"; cosine with noise {settings['coupling']['C_cos']['value']:+.2f}"
    held_back = [*evidence.not_aligned(), *evidence.inadmissible("H", "R"), *evidence.idle("R")]
    if min(found.trust) < UNRELIABLE:
        held_back.append(
            f"a direction is too unreliable: cosines with the true directions H "
            f"{found.trust[0]:.2f}, R {found.trust[1]:.2f}, at least {UNRELIABLE} each"
        )
    held_back += (confounded := evidence.confounded())
    if not confounded and positive.outcome != "yes":
        held_back.append(
            "the positive control is not told from orthogonal: a small cosine may come from the "
            "two sites alone"
        )
    return replace(TEST.claim(evidence, checks, note, held_back), settings=settings)


def _settings(study: Study) -> Row:
    """The carriers, and how coupled their fields are."""
    drawn = draw_fields([study], study.config.resamples, study.config.seed)
    return {
        "carrier_h": study.carrier("H").to_row(),
        "carrier_r": study.carrier("R").to_row(),
        "estimator": study.estimator,
        "coupling": {name: asdict(e) for name, e in coupling(study, drawn).items()},
        "principal_angles": [round(v, 2) for v in angles_of(drawn)["H, R"]],
    }


TEST = CLAIMS.add(
    ClaimTest(
        number=2,
        title="H and R carriers are near orthogonal on aligned models",
        measure=measure,
        needs=("ablations",),
    )
)
