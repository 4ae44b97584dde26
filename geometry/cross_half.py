"""Cosines of two directions without the noise that the directions have.

Two directions that are estimated from the same prompts share the noise of those prompts, which
moves their cosine to either side. And each has noise of its own, which pulls it towards zero. Both
go if each direction is estimated on a different half of the units, and the cosine is divided by the
square root of the two split-half reliabilities. Averaged over all splits this is, in closed form,

    cos(a, b) = U(a, b) / sqrt( U(a, a) U(b, b) )
    U(a, b)   = mean over item i of a and item j of b, of different units, of a_i . b_j, taken over
                (positive, positive) - (positive, negative) - (negative, positive) + (negative,
                negative)

U(a, b) is an unbiased estimate of the inner product of the true differences of means. (The average
over splits is one of ratios, this is a ratio of averages; the tests show that they agree.) It may
exceed 1 in size, and does not exist where U(a, a) is not positive: then nothing is known of a.

    trust     sqrt(U(a, a)) / |a|: estimated cosine of the estimated direction with the true one
    draws     of the cosine: bootstrap over units, no unit ever meets itself; spread about the value
              by Student's factor, since a bootstrap of few units is too narrow
    null      U(a, b) with the labels dealt anew, in the same way in both contrasts
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.significance import students_factor
from core.statistics import Interval, percentile_interval, permutation_p
from geometry.contrasts import Contrast
from geometry.resampling import permuted_sides, unit_counts

Weights = tuple[Tensor, Tensor]
"""(draw, item) float64: how often each draw has each item on the positive and negative side."""


@dataclass(frozen=True)
class CrossHalf:
    """A cosine without noise, and how far it can be trusted.

    Attributes:
        value: the cosine; NaN where a direction does not rise above its noise.
        draws: (draw,) of the bootstrap; NaN where that happens in a draw.
        trust: of the two directions.
        p_labels: one-sided p of U(a, b) among permuted labels: are the two alike at all?
        units: on the smaller side of the smaller contrast.
    """

    value: float
    draws: NDArray[np.float64]
    trust: tuple[float, float]
    p_labels: float
    units: int

    @property
    def interval(self) -> Interval:
        return percentile_interval(self.draws)


def cross_half(
    first: Contrast,
    second: Contrast,
    layers: tuple[int, int],
    draws: int,
    generator: torch.Generator,
) -> CrossHalf:
    """The cosine of ``first`` at one layer with ``second`` at one layer."""
    sides = (first, second)
    a, b = (_centred(c, layer) for c, layer in zip(sides, layers, strict=True))
    ab, aa, bb = (
        _Pairs(first, second, a, b),
        _Pairs(first, first, a, a),
        _Pairs(second, second, b, b),
    )
    whole = [_memberships(c) for c in sides]
    value = _cosine(ab, aa, bb, *whole)[0]
    counts, index = unit_counts(sides, draws, generator)
    sampled = [
        tuple(w * counts.double()[:, [index.get(u, 0) for u in c.units]] for w in own)
        for c, own in zip(sides, whole, strict=True)
    ]
    drawn = _cosine(ab, aa, bb, *((w[0], w[1]) for w in sampled))
    dealt = [
        _dealt(c, s) for c, s in zip(sides, permuted_sides(sides, draws, generator), strict=True)
    ]
    alike = ab.inner(*whole)[0]
    trust = [
        math.sqrt(max(0.0, float(own.inner(w, w)[0])))
        / max(1e-12, float(c.difference[layer].norm()))
        for own, w, c, layer in zip((aa, bb), whole, sides, layers, strict=True)
    ]
    units = min(c.size for c in sides)
    return CrossHalf(
        float(value),
        (value + (drawn - value) * students_factor(units)).numpy(),
        (trust[0], trust[1]),
        permutation_p(float(alike), ab.inner(*dealt).numpy()),
        units,
    )


def _centred(contrast: Contrast, layer: int) -> Tensor:
    """(item, d_model) float64. U does not change with a common shift; rounding does."""
    resid = contrast.resid[:, layer].double()
    return resid - resid[torch.cat([contrast.positive, contrast.negative])].mean(0)


def _memberships(contrast: Contrast) -> Weights:
    weights = torch.zeros(2, 1, len(contrast.units), dtype=torch.float64)
    weights[0, 0, contrast.positive] = 1
    weights[1, 0, contrast.negative] = 1
    return weights[0], weights[1]


def _dealt(contrast: Contrast, sides: tuple[Tensor, Tensor]) -> Weights:
    shape = len(sides[0]), len(contrast.units)
    both = [torch.zeros(shape, dtype=torch.float64).scatter_(1, side, 1.0) for side in sides]
    return both[0], both[1]


class _Pairs:
    """Inner products of the items of two contrasts, those of one unit left out."""

    def __init__(self, first: Contrast, second: Contrast, a: Tensor, b: Tensor) -> None:
        names = {u: n for n, u in enumerate(dict.fromkeys((*first.units, *second.units)))}
        own = [torch.tensor([names[u] for u in c.units]) for c in (first, second)]
        self.apart = (own[0][:, None] != own[1][None]).double()
        self.products = self.apart * (a @ b.T)

    def inner(self, first: Weights, second: Weights) -> Tensor:
        """(draw,) U under these weights."""
        total = torch.zeros(max(len(first[0]), len(second[0])), dtype=torch.float64)
        for w, sign in zip(first, (1.0, -1.0), strict=True):
            products, apart = w @ self.products, w @ self.apart
            for v, other in zip(second, (1.0, -1.0), strict=True):
                total += sign * other * (products * v).sum(1) / (apart * v).sum(1)
        return total


def _cosine(ab: _Pairs, aa: _Pairs, bb: _Pairs, first: Weights, second: Weights) -> Tensor:
    """(draw,); NaN where a direction does not rise above its noise."""
    lengths = aa.inner(first, first), bb.inner(second, second)
    known = (lengths[0] > 0) & (lengths[1] > 0)
    cosines = ab.inner(first, second) / (lengths[0] * lengths[1]).clamp_min(1e-300).sqrt()
    return torch.where(known, cosines, torch.nan)
