"""A judge's known errors, and rates less those errors.

Hand labels say of each reply whether the model refused, complied or did neither. Against them a
judge has

    sensitivity = P(judge says complied | it complied)
    specificity = P(judge says something else | it did not comply)

and a raw rate p becomes (Rogan and Gladen 1978)

    corrected = (p + specificity - 1) / (sensitivity + specificity - 1),   cut to [0, 1]

Its interval carries both uncertainties. The raw rate, sensitivity and specificity are drawn from
their Beta posteriors (Jeffreys' prior); the rate's counts are over behaviours, so that it has a
width where all outcomes agree. Counts of the package's own labels are in
``data/judge_errors.json``, by judge and attack class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.rows import Row
from core.statistics import Interval, percentile_interval, wilson

ERRORS_FILE = Path(__file__).parent / "data" / "judge_errors.json"
POOLED = "all"
RESAMPLES = 2000
SMALLEST = 0.1
"""Sensitivity + specificity - 1 below which a judge knows too little to correct by."""
FEWEST = 8
"""Labels on each side below which a class borrows the judge's errors over all classes."""


@dataclass(frozen=True)
class Errors:
    """Counts of one judge on hand-labelled replies of one class."""

    true_positive: int
    false_negative: int
    true_negative: int
    false_positive: int

    @property
    def sensitivity(self) -> float:
        return _share(self.true_positive, self.true_positive + self.false_negative)

    @property
    def specificity(self) -> float:
        return _share(self.true_negative, self.true_negative + self.false_positive)

    @property
    def false_successes(self) -> float:
        """Share of what the judge counts as success that is none."""
        return _share(self.false_positive, self.false_positive + self.true_positive)

    @property
    def enough(self) -> bool:
        positive = self.true_positive + self.false_negative
        return min(positive, self.true_negative + self.false_positive) >= FEWEST

    def intervals(self) -> tuple[Interval, Interval]:
        """Wilson's intervals of sensitivity and specificity."""
        return (
            wilson(self.true_positive, self.true_positive + self.false_negative),
            wilson(self.true_negative, self.true_negative + self.false_positive),
        )

    def to_row(self) -> Row:
        return asdict(self)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def count(judged: Sequence[bool], complied: Sequence[bool]) -> Errors:
    """Counts of what a judge said (complied or not) against the hand labels."""
    pairs = list(zip(judged, complied, strict=True))
    return Errors(
        sum(j and c for j, c in pairs),
        sum(not j and c for j, c in pairs),
        sum(not j and not c for j, c in pairs),
        sum(j and not c for j, c in pairs),
    )


def kappa(first: Sequence[str], second: Sequence[str]) -> float:
    """Cohen's kappa of two series of labels; NaN without labels, or where chance agrees fully."""
    n = len(first)
    if not n:
        return float("nan")
    names = set(first) | set(second)
    agreed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    chance = sum(first.count(name) * second.count(name) for name in names) / n**2
    return (agreed - chance) / (1 - chance) if chance < 1 else float("nan")


def kappa_interval(
    first: Sequence[str], second: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of Cohen's kappa, over replies."""
    if not len(first):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    drawn = [
        kappa([first[i] for i in rows], [second[i] for i in rows])
        for rows in rng.integers(len(first), size=(resamples, len(first)))
    ]
    return percentile_interval(drawn)


def corrected(
    rates: Sequence[float], errors: Errors, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, Interval] | None:
    """Corrected rate and its 95 % interval, from raw rates by behaviour.

    None where the judge knows too little to correct by.
    """
    margin = errors.sensitivity + errors.specificity - 1
    if not margin > SMALLEST or not len(rates):
        return None
    values = np.asarray(rates, dtype=np.float64)
    point = _rogan_gladen(values.mean(), errors.sensitivity, errors.specificity)
    rng = np.random.default_rng(seed)
    successes = values.sum()
    raw = rng.beta(successes + 0.5, len(values) - successes + 0.5, size=resamples)
    sensitivity = rng.beta(errors.true_positive + 0.5, errors.false_negative + 0.5, size=resamples)
    specificity = rng.beta(errors.true_negative + 0.5, errors.false_positive + 0.5, size=resamples)
    useful = sensitivity + specificity - 1 > SMALLEST / 2
    drawn = _rogan_gladen(raw[useful], sensitivity[useful], specificity[useful])
    return float(point), percentile_interval(drawn)


def _rogan_gladen(rate: Any, sensitivity: Any, specificity: Any) -> Any:
    """Numbers or arrays of them."""
    return np.clip((rate + specificity - 1) / (sensitivity + specificity - 1), 0, 1)


def package_errors() -> Mapping[str, Row]:
    """Counts on the package's own labels, by judge and attack class."""
    return json.loads(ERRORS_FILE.read_text())


def known_errors(judge: str, attack: str, table: Mapping[str, Row] | None = None) -> Errors | None:
    """What is known of a judge on replies to an attack class; None for a judge without labels.

    A class without enough labels borrows the judge's errors over all classes. ``table``: counts
    by judge; None takes the package's.
    """
    own = (package_errors() if table is None else table).get(judge)
    if not own:
        return None
    if attack in own and (errors := Errors(**own[attack])).enough:
        return errors
    return Errors(**own[POOLED])
