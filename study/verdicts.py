"""A claim is measured by checks; each is an estimate with an interval, held against a threshold.

    yes      the whole 95 % interval lies on the claimed side of the threshold
    no       the whole interval lies on the other side of where the claim is refuted
    unclear  anything else: also an estimate within its null, and one that did not move at all

The threshold is the 95th percentile of a null, or 0 for a difference from controls, or a stated
bound. A claim is refuted where
its effect is absent or reversed: at the null's centre, not at its 95th percentile, below which one
merely cannot tell. A claim ``holds`` if all its checks say yes, ``fails`` if any says no, and is
``undecided`` otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from core.rows import Row
from core.statistics import bootstrap_difference, bootstrap_mean


@dataclass(frozen=True)
class Check:
    """One number against its threshold.

    ``claimed`` is ``above`` or ``below`` it. ``nulls`` are what meaningless directions or labels
    give.
    """

    name: str
    value: float
    low: float
    high: float
    threshold: float
    claimed: str
    unit: str
    n: int
    nulls: dict[str, float] = field(default_factory=dict)
    refuted_at: float | None = None
    """None: at the threshold."""

    @property
    def outcome(self) -> str:
        if not all(map(math.isfinite, (self.value, self.low, self.high, self.threshold))):
            return "unclear"
        low, high, bar = self.low, self.high, self.threshold
        floor = bar if self.refuted_at is None else self.refuted_at
        if low == high == floor:
            return "unclear"
        if self.claimed == "below":
            low, high, bar, floor = -high, -low, -bar, -floor
        return "yes" if low > bar else "no" if high <= floor else "unclear"


@dataclass(frozen=True)
class Claim:
    """One claim on one model.

    ``note`` says what the reader must know, or why the claim could not be measured.
    """

    number: int
    title: str
    model: str
    checks: tuple[Check, ...]
    note: str = ""
    held_back: tuple[str, ...] = ()
    """What the model lacks of what the claim is about. With any such reason the claim is undecided,
    whatever its checks say."""
    settings: Row = field(default_factory=dict)

    @property
    def applicable(self) -> bool:
        """Whether the model has what the claim is about."""
        return not self.held_back

    @property
    def verdict(self) -> str:
        outcomes = {c.outcome for c in self.checks}
        if not self.applicable:
            return "undecided"
        if "no" in outcomes:
            return "fails"
        return "holds" if outcomes == {"yes"} else "undecided"

    def to_row(self) -> Row:
        row = asdict(self) | {"verdict": self.verdict, "applicable": self.applicable}
        row["checks"] = [_finite(asdict(c)) | {"outcome": c.outcome} for c in self.checks]
        return row


def _finite(row: Row) -> Row:
    """What could not be measured is null: JSON has no NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def difference_check(
    name: str,
    values: Sequence[float],
    reference: Sequence[float],
    *,
    unit: str,
    threshold: float,
    claimed: str = "above",
    nulls: dict[str, float] | None = None,
    refuted_at: float | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Check:
    """Mean of ``values`` less mean of ``reference``, unpaired: both are resampled."""
    a, b = np.asarray(values, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if not len(a) or not len(b):
        return Check(
            name, math.nan, math.nan, math.nan, threshold, claimed, unit, len(a), nulls or {}
        )
    low, high = bootstrap_difference(a, b, resamples=resamples, seed=seed) or (math.nan, math.nan)
    value = float(a.mean() - b.mean())
    return Check(
        name,
        value,
        float(low),
        float(high),
        threshold,
        claimed,
        unit,
        len(a),
        nulls or {},
        refuted_at,
    )


def mean_check(
    name: str,
    values: Sequence[float],
    *,
    unit: str,
    threshold: float = 0.0,
    claimed: str = "above",
    nulls: dict[str, float] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Check:
    """The mean of per-behaviour values with its bootstrap interval.

    Without values it is unclear.
    """
    array = np.asarray([v for v in values if math.isfinite(v)], dtype=np.float64)
    if not len(array):
        return Check(name, math.nan, math.nan, math.nan, threshold, claimed, unit, 0, nulls or {})
    low, high = bootstrap_mean(array, resamples=resamples, seed=seed) or (math.nan, math.nan)
    return Check(
        name,
        float(array.mean()),
        float(low),
        float(high),
        threshold,
        claimed,
        unit,
        len(array),
        nulls or {},
    )
