"""Contrasts of two classes of residuals, their directions, and how far those can be trusted.

A contrast is residuals of some items (prompts at one position, or replies) and which items stand on its positive and on its
negative side; its direction is the unit difference of class means, layer by layer. Items carry the unit that they are
sampled in (the behaviour), so that several contrasts can be resampled, or have their labels permuted, together: what they
share by sharing behaviours stays shared.

    resampled    bootstrap of units within strata (units that stand on the same sides everywhere)
    permuted     labels dealt anew, the same way in all contrasts (one random key a unit, sides filled in its order); a unit with
                 one item on each side has the two swapped or not, so that pairs stay pairs
    reliability  cosine of two directions from disjoint samples of n items a side each; at half of the smaller side this is the
                 split-half reliability r, and sqrt(2 r / (1 + r)) estimates the cosine of the full-sample direction with the
                 true one (Spearman-Brown); as a function of n it is the dependence on sample size
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geometry.directions import class_weights, differences, differing_layers, mean_difference, unit


@dataclass(frozen=True)
class Contrast:
    """``resid`` (item, layer, d_model); ``positive`` and ``negative`` item indices; ``units`` one name an item."""

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
        """(layer, d_model) float64."""
        return mean_difference(self.resid, self.positive, self.negative)

    @property
    def alive(self) -> Tensor:
        """(layer,) 1 where the classes differ beyond rounding, else 0 (the same template token in every prompt)."""
        return differing_layers(self.difference, self.resid)

    @property
    def direction(self) -> Tensor:
        """(layer, d_model) unit, or zeros where the classes do not differ."""
        return unit(self.difference).float() * self.alive[:, None]


def resampled(contrasts: Sequence[Contrast], draws: int, generator: torch.Generator) -> list[Tensor]:
    """Directions of every contrast under ``draws`` bootstrap samples, (draw, layer, d_model) each."""
    membership: dict[str, list[int]] = {}
    for column, c in enumerate(contrasts):
        for offset, side in enumerate((c.positive, c.negative)):
            for item in side.tolist():
                membership.setdefault(c.units[item], [0] * 2 * len(contrasts))[2 * column + offset] = 1
    names = list(membership)
    index = {name: n for n, name in enumerate(names)}
    strata = torch.tensor([membership[name] for name in names])
    counts = torch.zeros(draws, len(names))
    for stratum in strata.unique(dim=0):
        members = (strata == stratum).all(1).nonzero()[:, 0]
        drawn = members[torch.randint(len(members), (draws, len(members)), generator=generator)]
        counts.scatter_add_(1, drawn, torch.ones(drawn.shape))
    found = []
    for c in contrasts:
        weights = torch.zeros(draws, len(c.units))
        for side, sign in ((c.positive, 1.0), (c.negative, -1.0)):
            often = counts[:, [index[c.units[item]] for item in side.tolist()]]
            weights[:, side] += sign * often / often.sum(1, keepdim=True).clamp_min(1)
        found.append(unit(differences(weights, c.resid)) * c.alive[:, None])
    return found


def permuted_sides(
    contrasts: Sequence[Contrast], draws: int, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Item indices on both sides of every contrast under ``draws`` dealings of the labels, (draw, n) each."""
    names = {name: n for n, name in enumerate(dict.fromkeys(u for c in contrasts for u in c.units))}
    keys = torch.rand(draws, len(names), generator=generator)
    found = []
    for c in contrasts:
        sides = [[(c.units[i], i) for i in side.tolist()] for side in (c.positive, c.negative)]
        often = [Counter(unit for unit, _ in side) for side in sides]
        paired = [u for u in often[0] if often[0][u] == often[1][u] == 1]
        swap = keys[:, [names[u] for u in paired]] < 0.5
        mine, theirs = (torch.tensor([dict(side)[u] for u in paired], dtype=torch.long) for side in sides)
        single = [[i for u, i in side if u not in set(paired)] for side in sides]
        items = torch.tensor(single[0] + single[1], dtype=torch.long)
        order = items[keys[:, [names[c.units[i]] for i in items.tolist()]].argsort(dim=1, stable=True)]
        first = torch.cat([torch.where(swap, theirs, mine), order[:, : len(single[0])]], 1)
        found.append((first, torch.cat([torch.where(swap, mine, theirs), order[:, len(single[0]) :]], 1)))
    return found


def permuted(contrasts: Sequence[Contrast], draws: int, generator: torch.Generator) -> list[Tensor]:
    """Directions of every contrast with its labels dealt anew, (draw, layer, d_model) each."""
    sides = permuted_sides(contrasts, draws, generator)
    return [
        unit(differences(class_weights(*side, len(c.resid)), c.resid)) * c.alive[:, None]
        for c, side in zip(contrasts, sides, strict=True)
    ]


def reliability(
    contrast: Contrast, size: int, draws: int, generator: torch.Generator, *, shuffle: bool = False
) -> Tensor:
    """(draw, layer) cosines of directions from two disjoint random samples of ``size`` items a side.

    ``shuffle``: with the labels dealt anew first, the null.
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
            halves[half].append(class_weights(p[part][None], n[part][None], len(contrast.resid)))
    a, b = (unit(differences(torch.cat(half), contrast.resid)) for half in halves)
    return (a * b).sum(-1) * contrast.alive


def spearman_brown(split_half: float) -> float:
    """Cosine of the full-sample direction with the true one, estimated from the cosine of two half-sample ones."""
    return max(0.0, 2 * split_half / (1 + split_half)) ** 0.5 if split_half > -1 else 0.0


def cosine_statistics(
    first: Contrast, second: Contrast, draws: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Cosine of two contrasts' directions by layer: ``value`` (layer,), ``interval`` (layer, 2), ``null_permuted`` and
    ``null_random`` (layer,), the 95th percentiles of its absolute value.

    Resampled directions carry the sampling noise twice, which pulls their cosines towards zero, so the interval is the basic
    bootstrap (quantiles reflected about the estimate). The estimate itself is still weaker than the true cosine by the product
    of the two directions' cosines with their true ones (``spearman_brown``).
    """
    ends = torch.tensor([0.975, 0.025])
    value = (first.direction * second.direction).sum(-1)
    a, b = resampled((first, second), draws, generator)
    p, q = permuted((first, second), draws, generator)
    d = first.resid.shape[2]
    pairs = unit(torch.randn(2, 10 * draws, d, generator=generator))
    return {
        "value": value,
        "interval": (2 * value - (a * b).sum(-1).quantile(ends, dim=0)).clamp(-1, 1).T.contiguous(),
        "null_permuted": (p * q).sum(-1).abs().quantile(0.95, dim=0),
        "null_random": (pairs[0] * pairs[1]).sum(-1).abs().quantile(0.95).repeat(first.resid.shape[1]),
    }
