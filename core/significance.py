"""Tests: how unlikely is an estimate if nothing is there, and how many units would tell?

    sign_flip_p       one-sided p of a mean of paired differences. Under the null each difference is
                      as likely to have the other sign. All 2^n sign patterns up to n = 12, drawn
                      ones beyond. It needs no large sample, and n equal differences of one sign
                      give 2^-n: three units cannot decide anything.
    studentised_p     one-sided p of a mean from bootstrap draws of its t statistic. It asks for no
                      symmetry, which sign flips do: of 24 differences with a long tail below they
                      reject a true null in 11 % of studies, this test in 6 % (lab log, 2026-11-28)
    mean_p            the larger of these two from 12 units on, sign flips alone below
    draws_p           one-sided p of an estimate from its bootstrap draws
    holm              p-values of several tests, made larger so that the chance of any false
                      rejection stays at the level (Holm 1979)
    units_needed      units for a power of 80 % at the level, if the effect is as estimated

The level is 0.05, one-sided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from core.statistics import Numbers

LEVEL, POWER = 0.05, 0.8
EXACT = 12
"""Units up to which all sign patterns are counted."""
DRAWN, RESAMPLED = 9999, 1999
"""Drawn sign patterns, and bootstrap samples."""
FEWEST = 12
"""Units below which no bootstrap decides."""
LEAST = 0.1


def sign_flip_p(values: Numbers, *, threshold: float = 0.0, seed: int = 0) -> float:
    """p of "the mean of (n,) values is not above the threshold"; 1 without values."""
    shifted = np.asarray(values, dtype=np.float64) - threshold
    n = len(shifted)
    if not n:
        return 1.0
    total = shifted.sum()
    slack = 1e-9 * np.abs(shifted).sum()  # equal sums must count as equal
    if n <= EXACT:
        sums = _patterns(n) @ shifted
        return float((sums >= total - slack).mean())
    signs = np.random.default_rng(seed).integers(0, 2, size=(DRAWN, n)) * 2.0 - 1
    return float((1 + (signs @ shifted >= total - slack).sum()) / (1 + DRAWN))


def studentised_p(values: Numbers, *, threshold: float = 0.0, seed: int = 0) -> float:
    """The same from (m - mean) / se of resampled units; equal values give 1 or the smallest p.

    Of mostly equal values many resamples have no spread, and an error of any size would seem
    infinite. So a resample has at least ``LEAST`` of the sample's spread.
    """
    shifted = np.asarray(values, dtype=np.float64) - threshold
    n = len(shifted)
    spread = shifted.std(ddof=1) if n > 1 else 0.0
    if spread == 0:
        return 1 / (1 + RESAMPLED) if n > 1 and shifted[0] > 0 else 1.0
    drawn = shifted[np.random.default_rng(seed).integers(0, n, size=(RESAMPLED, n))]
    errors, spreads = drawn.mean(1) - shifted.mean(), drawn.std(axis=1, ddof=1)
    spreads = np.maximum(spreads, LEAST * spread)
    extreme = errors / spreads >= shifted.mean() / spread
    return float((1 + extreme.sum()) / (1 + RESAMPLED))


def mean_p(values: Numbers, *, threshold: float = 0.0, seed: int = 0) -> float:
    """One-sided p of a mean that claims use: see above."""
    p = sign_flip_p(values, threshold=threshold, seed=seed)
    if len(np.asarray(values)) < FEWEST:
        return p
    return max(p, studentised_p(values, threshold=threshold, seed=seed))


def _patterns(n: int) -> NDArray[np.float64]:
    """(2^n, n) all patterns of signs."""
    bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    return 1.0 - 2.0 * bits.astype(np.float64)


def draws_p(draws: Numbers, threshold: float) -> float:
    """p of "the estimate is not above the threshold" from its bootstrap draws.

    The share of draws at or below it, (1 + count) / (1 + draws). A draw that is no number counts
    against.
    """
    array = np.asarray(draws, dtype=np.float64)
    return float((1 + (~(array > threshold)).sum()) / (1 + len(array)))


def students_factor(n: int) -> float:
    """By how much a bootstrap of n units is too narrow for a one-sided test at the level.

    sqrt(n / (n - 1)) t / z, with the quantiles of Student's distribution of n - 1 degrees of
    freedom (Cornish-Fisher expansion) and of the normal one.
    """
    if n < 2:
        return math.inf
    z, v = NormalDist().inv_cdf(1 - LEVEL), n - 1
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    return math.sqrt(n / v) * t / z


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(order))
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = highest
    return [float(p) for p in adjusted]


def units_needed(effect: float, spread: float, *, level: float = LEVEL) -> int | None:
    """Units with which a one-sided test of a mean finds the effect with a power of 80 %.

    n = ((z_level + z_power) spread / effect)^2 + z_level^2 / 2; the second term is Student's
    correction of the first (Guenther 1981).

    Args:
        effect: distance of the mean from the threshold, in either direction.
        spread: standard deviation of one unit.

    Returns:
        None where the effect is zero, so that no number would do.
    """
    if not math.isfinite(effect) or not math.isfinite(spread) or effect == 0:
        return None
    z_level, z_power = (NormalDist().inv_cdf(q) for q in (1 - level, POWER))
    n = math.ceil(((z_level + z_power) * spread / effect) ** 2 + z_level**2 / 2)
    return max(n, math.ceil(math.log2(1 / level)))  # sign flips of fewer units cannot decide
