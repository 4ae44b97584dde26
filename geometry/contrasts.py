"""Contrasts of two classes of residuals: the one primitive that every direction stands on.

A contrast is the residuals of some items (prompts at one position, or replies) and which items
stand on its positive and on its negative side. Its direction is, layer by layer,

    n( mean(positive) - mean(negative) )        n(.) makes a unit vector; means in float64

and points towards the positive side. Items carry the unit that they are sampled in (the
behaviour), so that several contrasts can be resampled, or have their labels permuted, together:
what they share by sharing behaviours stays shared.

    resampled    bootstrap of units within strata (units that stand on the same sides everywhere)
    permuted     labels dealt anew, in the same way in all contrasts: one random key per unit, and
                 the sides filled in its order. A unit with one item on each side has the two
                 swapped or not, so that pairs stay pairs
    reliability  cosine of two directions from disjoint samples of n items a side. At half of the
                 smaller side this is the split-half reliability r, and sqrt(2 r / (1 + r))
                 estimates the cosine of the full-sample direction with the true one
                 (Spearman-Brown)
    separation   held-out d' or AUROC along a direction from the other half

One convention of intervals: a cosine of two directions has the basic bootstrap interval (quantiles
of the resampled cosines, reflected about the estimate). Resampled directions carry the sampling
noise twice, which pulls their cosines towards zero, so their plain percentiles would lie too low.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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


def d_prime(positive: Tensor, negative: Tensor) -> Tensor:
    """(n, ...) and (m, ...) -> (...): difference of class means over the pooled s.d.

    0 where all scores are equal but for rounding, as at layer 0 of a template token.
    """
    pooled = ((positive.var(0) + negative.var(0)) / 2).sqrt()
    difference = positive.mean(0) - negative.mean(0)
    rounding = 1e-6 * torch.maximum(positive.abs().amax(0), negative.abs().amax(0))
    equal = (pooled <= rounding) & (difference.abs() <= rounding)
    return torch.where(equal, 0.0, difference / pooled.clamp_min(1e-12))


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

    def separation(self, measure: Callable[[Tensor, Tensor], Tensor] = d_prime) -> Tensor:
        """(layer,) held-out d' (or another measure) along the direction."""
        return held_out_separation(self.resid, self.positive, self.negative, measure)

    def up_to(self, layers: int) -> Contrast:
        """The same contrast at the first so many layers."""
        resid = self.resid[:, :layers]
        return Contrast(self.name, resid, self.positive, self.negative, self.units)


def resampled(
    contrasts: Sequence[Contrast], draws: int, generator: torch.Generator
) -> list[Tensor]:
    """Directions of every contrast under bootstrap samples, (draw, layer, d_model) each."""
    membership: dict[str, list[int]] = {}
    for column, c in enumerate(contrasts):
        for offset, side in enumerate((c.positive, c.negative)):
            for item in side.tolist():
                row = membership.setdefault(c.units[item], [0] * 2 * len(contrasts))
                row[2 * column + offset] = 1
    names = list(membership)
    index = {name: n for n, name in enumerate(names)}
    strata = torch.tensor([membership[name] for name in names])
    counts = torch.zeros(draws, len(names))
    for stratum in strata.unique(dim=0):
        members = (strata == stratum).all(1).nonzero()[:, 0]
        drawn = members[torch.randint(len(members), (draws, len(members)), generator=generator)]
        counts.scatter_add_(1, drawn, torch.ones(drawn.shape))
    directions = []
    for c in contrasts:
        weights = torch.zeros(draws, len(c.units))
        for side, sign in ((c.positive, 1.0), (c.negative, -1.0)):
            often = counts[:, [index[c.units[item]] for item in side.tolist()]]
            weights[:, side] += sign * often / often.sum(1, keepdim=True).clamp_min(1)
        directions.append(unit(differences(weights, c.resid)) * c.alive[:, None])
    return directions


def permuted_sides(
    contrasts: Sequence[Contrast], draws: int, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Item indices on both sides of every contrast with its labels dealt anew, (draw, n) each."""
    order = dict.fromkeys(u for c in contrasts for u in c.units)
    names = {name: n for n, name in enumerate(order)}
    keys = torch.rand(draws, len(names), generator=generator)
    sides = []
    for c in contrasts:
        own = [[(c.units[i], i) for i in side.tolist()] for side in (c.positive, c.negative)]
        often = [Counter(unit for unit, _ in side) for side in own]
        paired = [u for u in often[0] if often[0][u] == often[1][u] == 1]
        swap = keys[:, [names[u] for u in paired]] < 0.5
        mine, theirs = (
            torch.tensor([dict(side)[u] for u in paired], dtype=torch.long) for side in own
        )
        single = [[i for u, i in side if u not in set(paired)] for side in own]
        items = torch.tensor(single[0] + single[1], dtype=torch.long)
        item_keys = keys[:, [names[c.units[i]] for i in items.tolist()]]
        dealt = items[item_keys.argsort(dim=1, stable=True)]
        cut = len(single[0])
        first = torch.cat([torch.where(swap, theirs, mine), dealt[:, :cut]], 1)
        second = torch.cat([torch.where(swap, mine, theirs), dealt[:, cut:]], 1)
        sides.append((first, second))
    return sides


def between(positive: Tensor, negative: Tensor, name: str = "contrast") -> Contrast:
    """The contrast of two stacks of residuals, (item, layer, d_model) each.

    Item k of one and item k of the other are of one unit.
    """
    n, m = len(positive), len(negative)
    units = tuple(str(k) for k in (*range(n), *range(m)))
    both = torch.cat([positive, negative])
    return Contrast(name, both, torch.arange(n), torch.arange(n, n + m), units)


def permuted(contrasts: Sequence[Contrast], draws: int, generator: torch.Generator) -> list[Tensor]:
    """Directions with the labels dealt anew, (draw, layer, d_model) each."""
    return [
        unit(permuted_differences(c, side))
        for c, side in zip(contrasts, permuted_sides(contrasts, draws, generator), strict=True)
    ]


def permuted_differences(contrast: Contrast, sides: tuple[Tensor, Tensor]) -> Tensor:
    """(draw, layer, d_model) differences of class means with labels as dealt."""
    weights = class_weights(*sides, len(contrast.resid))
    return differences(weights, contrast.resid) * contrast.alive[:, None]


def reliability(
    contrast: Contrast,
    size: int,
    draws: int,
    generator: torch.Generator,
    *,
    shuffle: bool = False,
) -> Tensor:
    """(draw, layer) cosines of directions from two disjoint random samples of ``size`` a side.

    ``shuffle``: with the labels dealt anew first, which is the null.
    """
    halves: list[list[Tensor]] = [[], []]
    for _ in range(draws):
        positive, negative = contrast.positive, contrast.negative
        if shuffle:
            both = torch.cat([positive, negative])
            both = both[torch.randperm(len(both), generator=generator)]
            positive, negative = both[: len(positive)], both[len(positive) :]
        p = positive[torch.randperm(len(positive), generator=generator)]
        n = negative[torch.randperm(len(negative), generator=generator)]
        for half in (0, 1):
            part = slice(half * size, (half + 1) * size)
            weights = class_weights(p[part][None], n[part][None], len(contrast.resid))
            halves[half].append(weights)
    a, b = (unit(differences(torch.cat(half), contrast.resid)) for half in halves)
    return cosine(a, b) * contrast.alive


def spearman_brown(split_half: float) -> float:
    """Cosine of the full-sample direction with the true one, from that of two half-sample ones."""
    if split_half <= -1:
        return 0.0
    return max(0.0, 2 * split_half / (1 + split_half)) ** 0.5


def held_out_separation(
    resid: Tensor,
    positive: Tensor,
    negative: Tensor,
    measure: Callable[[Tensor, Tensor], Tensor] = d_prime,
) -> Tensor:
    """Held-out ``measure`` (d', or ``auroc``) per layer.

    The direction comes from one half of each side, the measure from the other; both ways,
    averaged. ``positive`` and ``negative`` are (n,) item indices, or (draw, n) for many labellings
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


# --- what a direction is worth --------------------------------------------------------------------
@dataclass(frozen=True)
class Sampled:
    """A contrast with its draws: directions (draw, layer, d_model), and sides as dealt anew."""

    contrast: Contrast
    resampled: Tensor
    sides: tuple[Tensor, Tensor]

    @property
    def permuted_difference(self) -> Tensor:
        return permuted_differences(self.contrast, self.sides)

    @property
    def permuted(self) -> Tensor:
        return unit(self.permuted_difference)


def sample(contrasts: Sequence[Contrast], draws: int, generator: torch.Generator) -> list[Sampled]:
    """Bootstrap samples and permuted labels of several contrasts, drawn together."""
    bootstrap = resampled(contrasts, draws, generator)
    sides = permuted_sides(contrasts, draws, generator)
    return [Sampled(*parts) for parts in zip(contrasts, bootstrap, sides, strict=True)]


def percentiles(draws: Tensor) -> Tensor:
    """(draw, layer) -> (layer, 2): the 2.5th and 97.5th percentiles."""
    ends = torch.tensor([0.025, 0.975], dtype=draws.dtype)
    return draws.quantile(ends, dim=0).T.contiguous()


def basic_interval(value: Tensor, draws: Tensor) -> Tensor:
    """(layer,) cosines and (draw, layer) resampled ones -> (layer, 2) basic bootstrap interval."""
    return (2 * value[:, None] - percentiles(draws).flip(1)).clamp(-1, 1)


def upper(draws: Tensor) -> Tensor:
    """(draw, ...) -> (...): the 95th percentile of the absolute value."""
    return draws.abs().quantile(0.95, dim=0)


def sampled_cosine(first: Sampled, second: Sampled) -> dict[str, Tensor]:
    """Cosine of two directions by layer: ``value``, ``interval``, ``null_permuted``.

    ``null_permuted`` is the 95th percentile of its absolute value. The estimate is weaker than the
    true cosine by the product of the two directions' cosines with their true ones
    (``spearman_brown``).
    """
    value = cosine(first.contrast.direction, second.contrast.direction)
    return {
        "value": value,
        "interval": basic_interval(value, cosine(first.resampled, second.resampled)),
        "null_permuted": upper(cosine(first.permuted, second.permuted)),
    }


def random_cosine(d_model: int, draws: int, generator: torch.Generator) -> float:
    """95th percentile of the absolute cosine of two random directions."""
    pairs = unit(torch.randn(2, 10 * draws, d_model, generator=generator))
    return float(upper(cosine(pairs[0], pairs[1])))


def cosine_statistics(
    first: Contrast, second: Contrast, draws: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """``sampled_cosine`` of two contrasts drawn together, and ``null_random`` (layer,)."""
    statistics = sampled_cosine(*sample((first, second), draws, generator))
    layers, d_model = first.resid.shape[1:]
    null = random_cosine(d_model, draws, generator)
    return {**statistics, "null_random": torch.full((layers,), null)}
