"""Every statistic that the suite reports: one copy of each, on plain numbers.

Bootstrap intervals are percentile intervals of a mean, over behaviours. Cosines of directions have
a convention of their own (``geometry/contrasts.py``), since resampling biases them.

    bootstrap_mean        interval of a mean
    cluster_rows          rows of a bootstrap sample of clusters, for any other statistic
    cluster_weights       the same as how often each row is in the sample
    wilson                score interval of a proportion
    auroc                 probability that a positive scores above a negative (Mann-Whitney U / nm)
    Ranked                the same of many resamples of scores that are sorted once
    spearman              rank correlation
    permutation_p         p-value of a statistic among its permuted values
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
Array = TypeVar("Array")
Numbers = Sequence[float] | NDArray[np.float64]

RESAMPLES = 2000
FEW = 5
"""A number that rests on fewer points is shown as "too few": it decides nothing."""
ENDS = (0.025, 0.975)


def _ends(draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """(draw, ...) -> (2, ...): the ends of the central 95 % of the draws."""
    return np.quantile(draws, ENDS, axis=0)


def _resampled_means(values: Any, rng: np.random.Generator, resamples: int) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    return array[rng.integers(len(array), size=(resamples, len(array)))].mean(1)


def bootstrap_mean(
    values: Numbers, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval | None:
    """Percentile bootstrap interval of the mean of (n,) values; None without values."""
    if not len(values):
        return None
    low, high = _ends(_resampled_means(values, np.random.default_rng(seed), resamples))
    return float(low), float(high)


def at_least_one(tried: int, won: int, k: int) -> float:
    """Unbiased chance that one of ``k`` tries wins, from ``won`` of ``tried`` (k <= tried).

    1 - C(tried - won, k) / C(tried, k): the share of all choices of k tries that hold a win (Chen
    et al., arXiv 2107.03374, pass@k).
    """
    return 1.0 - math.comb(tried - won, k) / math.comb(tried, k)


def bootstrap_columns(
    values: NDArray[np.float64], *, resamples: int = RESAMPLES, seed: int = 0
) -> list[list[float]] | None:
    """As ``bootstrap_mean`` for (n, k) values: k intervals [low, high] from the same resamples."""
    if not len(values):
        return None
    return _ends(_resampled_means(values, np.random.default_rng(seed), resamples)).T.tolist()


def cluster_rows(
    clusters: NDArray[Any], *, resamples: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Row indices of each bootstrap sample in which whole clusters are drawn.

    ``clusters`` (n,) holds the number of each row's cluster, 0 to k - 1.
    """
    k = int(clusters.max()) + 1
    members = [np.nonzero(clusters == c)[0] for c in range(k)]
    for drawn in rng.integers(k, size=(resamples, k)):
        yield np.concatenate([members[c] for c in drawn])


def cluster_weights(
    clusters: NDArray[Any], *, resamples: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """``cluster_rows`` as (n,) numbers: how often each row is in the sample."""
    k = int(clusters.max()) + 1
    for drawn in rng.integers(k, size=(resamples, k)):
        yield np.bincount(drawn, minlength=k)[clusters]


def percentile_interval(draws: Numbers) -> Interval:
    """The central 95 % of the draws that are numbers; NaN where none is."""
    array = np.asarray(draws, dtype=np.float64)
    array = array[~np.isnan(array)]
    low, high = _ends(array) if len(array) else (math.nan, math.nan)
    return float(low), float(high)


def wilson(successes: float, n: int, *, z: float = 1.959964) -> Interval:
    """Wilson's score interval of a proportion (1927). ``successes`` may be a sum of rates."""
    if n == 0:
        return math.nan, math.nan
    rate, z2 = successes / n, z * z
    middle = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def auroc(positive: Array, negative: Array) -> Array:
    """(n, ...) and (m, ...) scores -> (...): P(positive > negative), ties counting half.

    Takes numpy arrays or torch tensors, and gives what it was given.
    """
    difference: Any = positive[:, None] - negative[None]  # type: ignore[index]
    return ((difference > 0) * 1.0 + (difference == 0) * 0.5).mean((0, 1))


class Ranked:
    """Scores that are sorted once, for the AUROC of many outcomes and resamples.

    Scores that are not finite are left out.
    """

    def __init__(self, scores: NDArray[Any], rows: NDArray[Any] | None = None) -> None:
        """``scores`` (n,), of which ``rows`` count [default: all]."""
        rows = np.arange(len(scores)) if rows is None else rows
        rows = rows[np.isfinite(scores[rows])]
        self.rows = rows[scores[rows].argsort(kind="stable")]
        ordered = scores[self.rows]
        self.ties = np.flatnonzero(np.r_[True, ordered[1:] > ordered[:-1]][: len(ordered)])

    def auroc(
        self, success: NDArray[Any], weights: NDArray[Any] | None = None
    ) -> tuple[float, int]:
        """AUROC of ``success`` (n,), and how many pairs it is over (NaN, 0 without).

        ``weights`` (n,): how often each row is in the sample [default: once].
        """
        here = np.ones(len(self.rows)) if weights is None else weights[self.rows].astype(float)
        won = here * success[self.rows]
        lost = here - won
        pairs = won.sum() * lost.sum()
        if not pairs:
            return float("nan"), 0
        won, lost = (np.add.reduceat(side, self.ties) for side in (won, lost))
        return float(won @ (lost.cumsum() - lost / 2) / pairs), int(pairs)


def auroc_by_ranks(scores: Numbers, positive: NDArray[np.bool_]) -> float:
    """``auroc`` of the finite ones of (n,) scores; NaN without both positives and negatives."""
    return Ranked(np.asarray(scores, dtype=np.float64)).auroc(positive)[0]


def ranks(values: Numbers) -> NDArray[np.float64]:
    """(n,) ranks from 1, ties averaged."""
    array = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[inverse]


def spearman(first: Numbers, second: Numbers) -> float:
    """Rank correlation of two (n,) series; 0 where one of them is constant or has one value."""
    a, b = ranks(first), ranks(second)
    if len(a) < 2 or not a.std() or not b.std():
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def permutation_p(value: float, null: Numbers) -> float:
    """One-sided p-value: (1 + values of the null at least as large) / (1 + values of the null).

    What is no number counts as at least as large.
    """
    array = np.asarray(null, dtype=np.float64)
    return float((1 + (~(array < value)).sum()) / (1 + len(array)))
