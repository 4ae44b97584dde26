"""How coupled harmfulness and refusal are in a model, and how far both have drifted.

The formulas are those of ``geometry/coupling.py`` [SG 2606.16349, RG 2604.27019]. The carriers are
the best ones, at fixed places; their fields are drawn anew:

    interval        basic bootstrap over pairs, of all fields together (and those of the reference):
                    2 v - q, since drawing again adds the same noise once more
    null permuted   95th percentile of the absolute value with the labels dealt anew, in the same
                    way in all fields
    null random     the same of random directions and subspaces

C_layer is a number of the two layers alone and has neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from core.rows import Row
from geometry.contrasts import Contrast, unit
from geometry.coupling import (
    effective_rank,
    hrci,
    layer_closeness,
    principal_cosines,
    random_pair,
    subspace,
    subspace_overlap,
)
from geometry.resampling import permuted_differences, permuted_sides, resampled_differences
from study.study import KINDS, Study

RANDOM = 500
"""Random pairs of directions and subspaces."""
V1, V2 = "HRCI v1", "HRCI v2"
RANK, RANK_OF_UNIT = "effective rank of {}", "effective rank of {}, rows of unit length"
DRIFT, COSINE = "drift of {}", "cosine of {} with the reference's"


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval and its nulls, where it has them."""

    value: float
    interval: tuple[float, float] | None = None
    null_random: float | None = None
    null_permuted: float | None = None


def row_of(family: str, name: str, found: Estimate, unit: str, n: int | None = None) -> Row:
    """One measure of one checkpoint; ``n`` units, where the interval is over them."""
    low, high = found.interval or (None, None)
    return {
        "family": family,
        "measure": name,
        "value": found.value,
        "low": low,
        "high": high,
        "null_random": found.null_random,
        "null_permuted": found.null_permuted,
        "unit": unit,
        "n": n,
    }


@dataclass(frozen=True)
class Fields:
    """The differences of class means of one model's two fields, (position, layer, d_model) each.

    Attributes:
        h, r: as estimated, or of one draw.
    """

    h: Tensor
    r: Tensor

    def rows(self, kind: str) -> Tensor:
        """(position x layer, d_model)."""
        return (self.h if kind == "H" else self.r).flatten(0, 1)


@dataclass(frozen=True)
class Drawn:
    """Fields of several models as they are, resampled, and of permuted labels, drawn together.

    Each list holds the fields of all models in their order.
    """

    own: list[Fields]
    resampled: list[list[Fields]]
    permuted: list[list[Fields]]


def draw_fields(studies: Sequence[Study], draws: int, seed: int) -> Drawn:
    """Draw the fields of several models of one contrast set together."""
    contrasts, ends = [], [0]
    for study in studies:
        for kind in KINDS:
            contrasts += list(study.field(kind).values())
            ends.append(len(contrasts))
    generator = torch.Generator().manual_seed(seed)
    bootstrap = resampled_differences(contrasts, draws, generator)
    sides = permuted_sides(contrasts, draws, generator)
    dealt = [permuted_differences(c, s) for c, s in zip(contrasts, sides, strict=True)]
    own = [_own(c)[None] for c in contrasts]

    def fields(tensors: Sequence[Tensor], draw: int) -> list[Fields]:
        parts = [
            torch.stack([t[draw] for t in tensors[ends[n] : ends[n + 1]]])
            for n in range(len(ends) - 1)
        ]
        return [Fields(*parts[n : n + 2]) for n in range(0, len(parts), 2)]

    return Drawn(
        fields(own, 0),
        [fields(bootstrap, k) for k in range(draws)],
        [fields(dealt, k) for k in range(draws)],
    )


def _own(contrast: Contrast) -> Tensor:
    return (contrast.difference * contrast.alive[:, None]).float()


def estimates(drawn: Drawn, of: Callable[[list[Fields]], dict[str, float]]) -> dict[str, Estimate]:
    """Numbers of the fields, each with its interval and its null of permuted labels."""
    values = of(drawn.own)
    resampled, dealt = ([of(f) for f in draws] for draws in (drawn.resampled, drawn.permuted))
    found = {}
    for name, value in values.items():
        low, high = np.quantile([row[name] for row in resampled], (0.025, 0.975))
        null = float(np.quantile(np.abs([row[name] for row in dealt]), 0.95))
        found[name] = Estimate(
            value, (float(2 * value - high), float(2 * value - low)), null_permuted=null
        )
    return found


def coupling(study: Study, drawn: Drawn) -> dict[str, Estimate]:
    """C_cos, C_sub, C_layer, both HRCI and effective ranks of the first model of ``drawn``."""
    h, r = study.carrier("H"), study.carrier("R")
    places = [
        (list(study.field(k)).index(c.position), c.layer)
        for k, c in zip(KINDS, (h, r), strict=True)
    ]
    close = layer_closeness(h.layer, r.layer)

    def numbers(fields: list[Fields]) -> dict[str, float]:
        own = fields[0]
        a, b = (unit(f[place]) for f, place in zip((own.h, own.r), places, strict=True))
        c_cos = float(a @ b)
        c_sub = subspace_overlap(*(subspace(own.rows(kind)) for kind in KINDS))
        ranks = {
            name.format(kind): effective_rank(own.rows(kind), normalise=normalise)
            for kind in KINDS
            for name, normalise in ((RANK, False), (RANK_OF_UNIT, True))
        }
        both = {"C_cos": c_cos, "C_sub": c_sub}
        return both | {V1: hrci(c_cos, c_sub, close), V2: hrci(c_cos, c_sub)} | ranks

    found = estimates(drawn, numbers)
    random = _random_nulls(study, close)
    found |= {name: replace(found[name], null_random=value) for name, value in random.items()}
    return found | {"C_layer": Estimate(close)}


def _random_nulls(study: Study, close: float) -> dict[str, float]:
    """95th percentiles of absolute values, of random directions and subspaces."""
    generator = torch.Generator().manual_seed(study.config.seed)
    pairs = [random_pair(study.loaded.d_model, generator) for _ in range(RANDOM)]
    values = {
        "C_cos": [c for c, _ in pairs],
        "C_sub": [s for _, s in pairs],
        V1: [hrci(c, s, close) for c, s in pairs],
        V2: [hrci(c, s) for c, s in pairs],
    }
    return {name: float(np.quantile(np.abs(own), 0.95)) for name, own in values.items()}


def drift(drawn: Drawn, layer: int) -> dict[str, Estimate]:
    """How far the first model's fields have turned from those of the second, the reference.

    The mean principal angle of the leading subspaces (degrees), and the cosine of the directions
    that the plane uses (t_inst, and the last template token) at one layer.
    """

    def numbers(fields: list[Fields]) -> dict[str, float]:
        row = {}
        for kind in KINDS:
            cosines = principal_cosines(*(subspace(f.rows(kind)) for f in fields))
            row[DRIFT.format(kind)] = float(torch.rad2deg(torch.acos(cosines)).mean())
            mine, theirs = (unit((f.h if kind == "H" else f.r)[-1, layer]) for f in fields)
            row[COSINE.format(kind)] = float(mine @ theirs)
        return row

    return estimates(drawn, numbers)


def angles_of(drawn: Drawn) -> dict[str, list[float]]:
    """Principal angles (degrees): of H with R, and of each with the reference's."""

    def angles(a: Tensor, b: Tensor) -> list[float]:
        return torch.rad2deg(torch.acos(principal_cosines(subspace(a), subspace(b)))).tolist()

    own = drawn.own
    found = {"H, R": angles(own[0].rows("H"), own[0].rows("R"))}
    if len(own) > 1:
        found |= {f"{k}, reference's": angles(*(f.rows(k) for f in own)) for k in KINDS}
    return found
