"""Contrasts of two classes of residuals: the one primitive that every direction stands on.

A contrast is the residuals of some items (prompts at one position, or replies) and which items
stand on its positive and on its negative side. Its direction is, layer by layer,

    n( mean(positive) - mean(negative) )        n(.) makes a unit vector; means in float64

and points towards the positive side. Items carry the unit that they are sampled in: the matched
pair of a harmful and a harmless request, or the behaviour where nothing is matched. Whatever is
drawn, split or permuted (``resampling.py``) is drawn by unit.

    separation   held-out d' or AUROC along a direction from the other half of the units
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_CLASS = 4
"""Fewest items on a side that a direction is estimated from."""
DRAWS_AT_ONCE = 25


# --- arithmetic of directions ---------------------------------------------------------------------
def unit(vectors: Tensor) -> Tensor:
    """Vectors of length one along the last dimension."""
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """(..., d_model) unit vectors, or zeros -> (...) cosines."""
    return (first * second).sum(-1)


def indices(keep: Iterable[bool]) -> Tensor:
    """Indices where ``keep`` holds."""
    return torch.tensor([i for i, kept in enumerate(keep) if kept], dtype=torch.long)


def class_weights(positive: Tensor, negative: Tensor, n: int) -> Tensor:
    """(draw, n) float32 weights w with w @ resid = mean(positive) - mean(negative).

    ``positive`` and ``negative`` hold one row of indices per draw.
    """
    weights = torch.zeros(positive.shape[0], n)
    weights.scatter_add_(1, positive, torch.full(positive.shape, 1.0 / positive.shape[1]))
    weights.scatter_add_(1, negative, torch.full(negative.shape, -1.0 / negative.shape[1]))
    return weights


def differences(weights: Tensor, resid: Tensor) -> Tensor:
    """(draw, n) weights on (n, layer, d_model) -> (draw, layer, d_model)."""
    return (weights @ resid.flatten(1)).unflatten(1, resid.shape[1:])


def centred_by(resid: Tensor, groups: Sequence[Hashable]) -> Tensor:
    """(n, layer, d_model) residuals, moved so that all groups have one mean: that of their means.

    A contrast of these has, up to its length, the direction of a regression on the contrast's side
    with an effect for each group: what distinguishes groups alone is no part of it.
    """
    members = [indices(g == group for g in groups) for group in dict.fromkeys(groups)]
    means = [resid[own].double().mean(0) for own in members]
    common = torch.stack(means).mean(0)
    centred = resid.clone()
    for own, mean in zip(members, means, strict=True):
        centred[own] += (common - mean).to(resid.dtype)
    return centred


def d_prime(positive: Tensor, negative: Tensor) -> Tensor:
    """(n, ...) and (m, ...) -> (...): difference of class means over the pooled s.d.

    0 where all scores are equal but for rounding, as at layer 0 of a template token.
    """
    pooled = ((positive.var(0) + negative.var(0)) / 2).sqrt()
    difference = positive.mean(0) - negative.mean(0)
    rounding = 1e-6 * torch.maximum(positive.abs().amax(0), negative.abs().amax(0))
    equal = (pooled <= rounding) & (difference.abs() <= rounding)
    return torch.where(equal, 0.0, difference / pooled.clamp_min(1e-12))


def paired_units(
    positive: Sequence[tuple[str, int]], negative: Sequence[tuple[str, int]]
) -> list[str]:
    """Units with exactly one item on each side; sides are (unit, item) pairs."""
    often = [Counter(unit for unit, _ in side) for side in (positive, negative)]
    return [u for u in often[0] if often[0][u] == often[1][u] == 1]


# --- the contrast ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Contrast:
    """``resid`` (item, layer, d_model); item indices of both sides; one unit's name per item."""

    name: str
    resid: Tensor
    positive: Tensor
    negative: Tensor
    units: tuple[str, ...]

    @property
    def size(self) -> int:
        """Items on the smaller side."""
        return min(len(self.positive), len(self.negative))

    @property
    def difference(self) -> Tensor:
        """(layer, d_model) float64 difference of class means."""
        sides = (self.resid[side].double().mean(0) for side in (self.positive, self.negative))
        return next(sides) - next(sides)

    @property
    def alive(self) -> Tensor:
        """(layer,) 1 where the class means differ beyond rounding, else 0.

        At layer 0 every prompt may have the same residual at a template token: rounding is no
        direction.
        """
        scale = self.resid.double().norm(dim=-1).mean(0)
        return (self.difference.norm(dim=-1) > 1e-6 * scale).float()

    @property
    def direction(self) -> Tensor:
        """(layer, d_model) unit, or zeros where the classes do not differ."""
        return unit(self.difference).float() * self.alive[:, None]

    @property
    def aligned(self) -> tuple[Tensor, Tensor]:
        """Both sides; units with one item on each stand first, in the same order on both."""
        own = [
            [(self.units[i], i) for i in side.tolist()] for side in (self.positive, self.negative)
        ]
        paired = paired_units(*own)
        sides = []
        for side in own:
            first = [dict(side)[u] for u in paired]
            sides.append(torch.tensor(first + [i for u, i in side if u not in set(paired)]))
        return sides[0].long(), sides[1].long()

    def separation(self, measure: Callable[[Tensor, Tensor], Tensor] = d_prime) -> Tensor:
        """(layer,) held-out d' (or another measure) along the direction."""
        return held_out_separation(self.resid, *self.aligned, measure)

    def at_layer(self, layer: int) -> Contrast:
        """The same contrast at one layer alone."""
        resid = self.resid[:, layer : layer + 1]
        return Contrast(self.name, resid, self.positive, self.negative, self.units)

    def up_to(self, layers: int) -> Contrast:
        """The same contrast at the first so many layers."""
        resid = self.resid[:, :layers]
        return Contrast(self.name, resid, self.positive, self.negative, self.units)


def between(positive: Tensor, negative: Tensor, name: str = "contrast") -> Contrast:
    """The contrast of two stacks of residuals, (item, layer, d_model) each.

    Item k of one and item k of the other are of one unit.
    """
    n, m = len(positive), len(negative)
    units = tuple(str(k) for k in (*range(n), *range(m)))
    both = torch.cat([positive, negative])
    return Contrast(name, both, torch.arange(n), torch.arange(n, n + m), units)


def held_out_separation(
    resid: Tensor,
    positive: Tensor,
    negative: Tensor,
    measure: Callable[[Tensor, Tensor], Tensor] = d_prime,
) -> Tensor:
    """Held-out ``measure`` (d', or ``auroc``) per layer.

    The direction comes from one half of each side, the measure from the other; both ways,
    averaged. Item k of one side and item k of the other fall into the same half, so that aligned
    pairs (``Contrast.aligned``) stay together. ``positive`` and ``negative`` are (n,) item indices,
    or (draw, n) for many labellings
    at once; the result is (layer,) or (draw, layer).
    """
    a, b = torch.atleast_2d(positive), torch.atleast_2d(negative)
    if len(a) > DRAWS_AT_ONCE:  # all pairs of all draws would not fit the memory
        parts = zip(a.split(DRAWS_AT_ONCE), b.split(DRAWS_AT_ONCE), strict=True)
        return torch.cat([held_out_separation(resid, *part, measure) for part in parts])
    total = torch.zeros(len(a), resid.shape[1])
    for fold in (0, 1):
        weights = class_weights(a[:, fold::2], b[:, fold::2], resid.shape[0])
        scores = torch.einsum("nld,kld->knl", resid, unit(differences(weights, resid)))
        draws = torch.arange(len(a))[:, None]
        sides = scores[draws, a[:, 1 - fold :: 2]], scores[draws, b[:, 1 - fold :: 2]]
        total += measure(*(side.transpose(0, 1) for side in sides)) / 2
    return total if positive.dim() == 2 else total[0]
