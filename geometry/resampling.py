"""Contrasts drawn anew, split in halves, or with their labels permuted; always by unit.

Several contrasts are drawn together: what they share by sharing units stays shared.

    resampled    bootstrap of units within strata (units that stand on the same sides everywhere)
    permuted     labels dealt anew, in the same way in all contrasts: one random key per unit, and
                 the sides filled in its order. A unit with one item on each side has the two
                 swapped or not, so that pairs stay pairs
    reliability  cosine of two directions from disjoint halves of the units. At half of the smaller
                 side this is the split-half reliability r, and sqrt(2 r / (1 + r)) estimates the
                 cosine of the full-sample direction with the true one (Spearman-Brown)

One convention of intervals: a cosine of two directions has the basic bootstrap interval (quantiles
of the resampled cosines, reflected about the estimate). Resampled directions carry the sampling
noise twice, which pulls their cosines towards zero, so their plain percentiles would lie too low.
Directions from the same prompts share that noise as well: ``cross_half.py`` has cosines without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geometry.contrasts import (
    Contrast,
    class_weights,
    cosine,
    differences,
    paired_units,
    unit,
)


def unit_counts(
    contrasts: Sequence[Contrast], draws: int, generator: torch.Generator
) -> tuple[Tensor, dict[str, int]]:
    """(draw, unit) how often each bootstrap sample has each unit, and the number of each unit.

    Drawn within strata: units that stand on the same sides everywhere.
    """
    membership: dict[str, list[int]] = {}
    for column, c in enumerate(contrasts):
        for offset, side in enumerate((c.positive, c.negative)):
            for item in side.tolist():
                row = membership.setdefault(c.units[item], [0] * 2 * len(contrasts))
                row[2 * column + offset] = 1
    names = list(membership)
    strata = torch.tensor([membership[name] for name in names])
    counts = torch.zeros(draws, len(names))
    for stratum in strata.unique(dim=0):
        members = (strata == stratum).all(1).nonzero()[:, 0]
        drawn = members[torch.randint(len(members), (draws, len(members)), generator=generator)]
        counts.scatter_add_(1, drawn, torch.ones(drawn.shape))
    return counts, {name: n for n, name in enumerate(names)}


def resampled(
    contrasts: Sequence[Contrast], draws: int, generator: torch.Generator
) -> list[Tensor]:
    """Directions of every contrast under bootstrap samples, (draw, layer, d_model) each."""
    return [unit(d) for d in resampled_differences(contrasts, draws, generator)]


def resampled_differences(
    contrasts: Sequence[Contrast], draws: int, generator: torch.Generator
) -> list[Tensor]:
    """(draw, layer, d_model) differences of class means under bootstrap samples."""
    counts, index = unit_counts(contrasts, draws, generator)
    found = []
    for c in contrasts:
        weights = torch.zeros(draws, len(c.units))
        for side, sign in ((c.positive, 1.0), (c.negative, -1.0)):
            often = counts[:, [index[c.units[item]] for item in side.tolist()]]
            weights[:, side] += sign * often / often.sum(1, keepdim=True).clamp_min(1)
        found.append(differences(weights, c.resid) * c.alive[:, None])
    return found


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
        paired = paired_units(*own)
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
    """(draw, layer) cosines of directions from two disjoint random halves of the units.

    Each half has at most ``size`` items a side, and matched items stand in the same half.
    ``shuffle``: with the labels dealt anew first, which is the null.
    """
    sides = (
        permuted_sides([contrast], draws, generator)[0]
        if shuffle
        else tuple(side.expand(draws, -1) for side in contrast.aligned)
    )
    halves: list[list[Tensor]] = [[], []]
    for positive, negative in zip(*sides, strict=True):
        for half, (p, n) in enumerate(_halves(contrast, positive, negative, size, generator)):
            halves[half].append(class_weights(p[None], n[None], len(contrast.resid)))
    a, b = (unit(differences(torch.cat(half), contrast.resid)) for half in halves)
    return cosine(a, b) * contrast.alive


def _halves(
    contrast: Contrast, positive: Tensor, negative: Tensor, size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Two halves of the units at random, as (positive, negative) items of each.

    The units on both sides are dealt out alternately, then those on one side only, so that every
    half has as many of each kind as the other, or one more.
    """
    names = [[contrast.units[i] for i in side.tolist()] for side in (positive, negative)]
    both = set(names[0]) & set(names[1])
    half_of: dict[str, int] = {}
    for kind in (both, set(names[0]) - both, set(names[1]) - both):
        names_of_kind = sorted(kind)
        order = torch.randperm(len(names_of_kind), generator=generator).tolist()
        first = int(torch.randint(2, (1,), generator=generator))
        half_of |= {names_of_kind[m]: (first + k) % 2 for k, m in enumerate(order)}
    ranks = {u: k for k, u in enumerate(half_of)}  # random within each kind
    for half in (0, 1):
        sides = []
        for side, own in zip((positive, negative), names, strict=True):
            members = sorted((ranks[u], k) for k, u in enumerate(own) if half_of[u] == half)
            sides.append(side[[k for _, k in members[:size]]])
        yield sides[0], sides[1]


def spearman_brown(split_half: float) -> float:
    """Cosine of the full-sample direction with the true one, from that of two half-sample ones."""
    if split_half <= -1:
        return 0.0
    return max(0.0, 2 * split_half / (1 + split_half)) ** 0.5


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
