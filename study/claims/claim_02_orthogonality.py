"""Claim 2: the carriers of H and R are near orthogonal on aligned models.

Noise pulls a cosine towards zero, so it is divided by what the two directions have in common with
themselves (split halves, Spearman-Brown). Published angles are 82 to 90 degrees.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from core.rows import Row
from geometry.contrasts import Contrast, cosine
from geometry.coupling import (
    effective_rank,
    hrci,
    layer_closeness,
    principal_cosines,
    random_nulls,
    subspace,
    subspace_overlap,
)
from geometry.resampling import (
    basic_interval,
    permuted,
    reliability,
    resampled,
    spearman_brown,
    upper,
)
from study.claims.evidence import Evidence
from study.claims.registry import CLAIMS, ClaimTest
from study.study import Study
from study.verdicts import Check, Claim

NEAR_ORTHOGONAL = math.cos(math.radians(80))
ALIGNED = 0.5
"""Share of harmful prompts refused, and"""
UNRELIABLE = 0.5
"""a direction's estimated cosine with the true one. Below them nothing is said of angles."""
SPLITS = 100


def measure(evidence: Evidence) -> Claim:
    study = evidence.study
    h, r = study.carrier("H"), study.carrier("R")
    pair = study.field("H")[h.position], study.field("R")[r.position]
    generator = torch.Generator().manual_seed(study.config.seed)
    a, b = resampled(pair, study.config.resamples, generator)
    p, q = permuted(pair, study.config.resamples, generator)
    trust = [
        spearman_brown(_split_half(contrast, carrier.layer, generator))
        for contrast, carrier in zip(pair, (h, r), strict=True)
    ]
    reliable = min(trust) > UNRELIABLE  # else the correction would make anything of nothing
    attenuation = trust[0] * trust[1] if reliable else 1.0
    raw = h.vector @ r.vector
    draws = cosine(a[:, h.layer], b[:, r.layer])[:, None]
    ends = (basic_interval(raw[None], draws)[0] / attenuation).clamp(-1, 1)
    low, high = sorted(abs(end) for end in ends.tolist())
    if ends[0] * ends[1] < 0:
        low = 0.0
    coupled = coupling(study)
    nulls = {
        "random_95": coupled["nulls"]["cos_95"],
        "permuted_95": float(upper(cosine(p[:, h.layer], q[:, r.layer]))),
    }
    check = Check(
        "|cos(H carrier, R carrier)|, corrected for noise",
        abs(float(raw) / attenuation),
        low,
        high,
        NEAR_ORTHOGONAL,
        "below",
        "cosine",
        min(c.size for c in pair),
        nulls,
    )
    note = evidence.setting()
    note += f"; cosines with their true directions: H {trust[0]:.2f}, R {trust[1]:.2f}"
    note += f"; uncorrected {coupled['c_cos']:+.2f}"
    held_back = evidence.inadmissible("H", "R")
    if study.refusal_rate < ALIGNED:
        held_back.append(
            f"not an aligned model: it refuses {study.refusal_rate:.0%} of the harmful prompts"
        )
    if not reliable:
        held_back.append(
            f"a direction is too unreliable to correct the angle for noise: cosines with the true "
            f"directions H {trust[0]:.2f}, R {trust[1]:.2f}, at least {UNRELIABLE} each"
        )
    return replace(
        TEST.claim(evidence, (check,) if reliable else (), note, held_back), settings=coupled
    )


def _split_half(contrast: Contrast, layer: int, generator: torch.Generator) -> float:
    return float(reliability(contrast, contrast.size // 2, SPLITS, generator)[:, layer].mean())


def coupling(study: Study) -> Row:
    """C_cos, C_sub, C_layer, both HRCI, effective ranks of the fields, and their random nulls."""
    h, r = study.carrier("H"), study.carrier("R")
    stacked = [torch.cat([c.difference for c in study.field(kind).values()]) for kind in ("H", "R")]
    spaces = [subspace(rows) for rows in stacked]
    c_cos, c_sub = float(h.vector @ r.vector), subspace_overlap(*spaces)
    c_layer = layer_closeness(h.layer, r.layer)
    angles = torch.rad2deg(torch.acos(principal_cosines(*spaces)))
    nulls = random_nulls(study.loaded.d_model, torch.Generator().manual_seed(study.config.seed))
    ranks = {
        name: {
            kind: effective_rank(rows, normalise=normalise)
            for kind, rows in zip("HR", stacked, strict=True)
        }
        for name, normalise in (("effective_rank", False), ("effective_rank_normalised", True))
    }
    return {
        "carrier_h": h.to_row(),
        "carrier_r": r.to_row(),
        "estimator": study.estimator,
        "c_cos": c_cos,
        "c_sub": c_sub,
        "c_layer": c_layer,
        "hrci_v1": hrci(c_cos, c_sub, c_layer),
        "hrci_v2": hrci(c_cos, c_sub),
        "hrci_v1_random_95": hrci(nulls["cos_95"], nulls["c_sub_95"], c_layer),
        "hrci_v2_random_95": hrci(nulls["cos_95"], nulls["c_sub_95"]),
        "principal_angles": [round(v, 2) for v in angles.tolist()],
        **ranks,
        "nulls": nulls,
    }


TEST = CLAIMS.add(
    ClaimTest(
        number=2,
        title="H and R carriers are near orthogonal on aligned models",
        measure=measure,
    )
)
