"""What claims about trainings look at: the measures of ``trajectory``, by training and step.

One training run is one unit: what is shown on its checkpoints holds for this run, and says nothing
of the next seed. So every claim is measured on each training apart, and the reader counts.

A check compares two numbers with their 95 % intervals. Their standard errors are taken from these,

    p = 1 - Phi( (difference - threshold) / sqrt(se_1^2 + se_2^2) )        se = (high - low) / 3.92

as if the two were independent. They mostly come from the same prompts, which makes the true error
of a difference smaller: such a test decides less than it could, and is not wrong more often.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from core.errors import NothingToMeasure
from core.rows import Row
from core.significance import FEWEST, units_needed
from study.verdicts import ABOVE, BELOW, WITHIN, Check

WIDTH = 2 * 1.96
"""Standard errors in a 95 % interval."""
TEST = "normal test, two intervals as if independent"


@dataclass(frozen=True)
class Training:
    """One training: its measures by name and step, and the reference's.

    Attributes:
        name: arm and seed, and the folder where two would have one name.
        variant: what its arm does otherwise than in the paper, as ``setting=value``.
        measures: name -> step -> row of ``trajectory``.
    """

    name: str
    arm: str
    seed: int | None
    method: str | None
    variant: frozenset[str]
    measures: Mapping[str, Mapping[int, Row]]
    reference: Mapping[str, Row]

    @property
    def steps(self) -> list[int]:
        return sorted({step for rows in self.measures.values() for step in rows})

    def at(self, measure: str, step: int) -> Row:
        """One measure of one checkpoint.

        Raises:
            NothingToMeasure: it was not measured there.
        """
        row = self.measures.get(measure, {}).get(step)
        if row is None:
            raise NothingToMeasure(
                f"no {measure!r}",
                where=f"{self.name}, step {step}",
                remedy="evaluate the checkpoints into the trajectory's run" * (step > 0) or None,
            )
        return row

    def ends(self, measure: str) -> tuple[Row, Row]:
        """A measure of the first and of the last checkpoint.

        Raises:
            NothingToMeasure: fewer than two checkpoints.
        """
        if len(self.steps) < 2:
            raise NothingToMeasure("a training with one checkpoint", where=self.name)
        return self.at(measure, self.steps[0]), self.at(measure, self.steps[-1])

    def like(self, trainings: Trainings, change: str) -> Training:
        """The training of this arm that differs from this one in one setting; this seed's if any.

        Raises:
            NothingToMeasure: there is none.
        """
        found = [t for t in trainings.of_arms([self.arm]) if t.variant == self.variant | {change}]
        if not found:
            raise NothingToMeasure(
                f"no {self.arm} with {change}",
                where=self.name,
                remedy=f"train one with --{change.replace('=', ' ')}",
            )
        return next((t for t in found if t.seed == self.seed), found[0])

    def of_reference(self, measure: str) -> Row:
        """
        Raises:
            NothingToMeasure: it was not measured there.
        """
        if measure not in self.reference:
            raise NothingToMeasure(f"no {measure!r} of the reference", where=self.name)
        return self.reference[measure]


@dataclass(frozen=True)
class Trainings:
    """All trainings of a run, and how well numbers of checkpoints predict transfer there."""

    all: tuple[Training, ...]
    predictions: Sequence[Row] = ()

    def of_arms(self, arms: Iterable[str]) -> list[Training]:
        """Those of these arms; all without any."""
        wanted = set(arms)
        return [t for t in self.all if not wanted or t.arm in wanted]


def trainings_of(rows: Sequence[Row], predictions: Sequence[Row] = ()) -> Trainings:
    """The trainings in rows of ``trajectory``."""
    reference = {r["measure"]: r for r in rows if not r["arm"]}
    groups: dict[tuple[str, str | None, int | None], list[Row]] = {}
    for r in rows:
        if r["arm"]:
            groups.setdefault((r["arm"], r["method"], r["seed"]), []).append(r)
    usual = [f"{arm}, seed {seed}" for arm, _, seed in groups]
    trainings = []
    for (arm, method, seed), own in groups.items():
        name = f"{arm}, seed {seed}"
        if usual.count(name) > 1:
            name += f" ({method})"
        measures: dict[str, dict[int, Row]] = {}
        for r in own:
            measures.setdefault(r["measure"], {})[r["step"]] = r
        variant = frozenset((own[0].get("variant") or "").split())
        trainings.append(Training(name, arm, seed, method, variant, measures, reference))
    return Trainings(tuple(trainings), predictions)


# --- checks ---------------------------------------------------------------------------------------
def error_of(row: Row) -> float:
    """Standard error of a measure; 0 where it has no interval."""
    return 0.0 if row["low"] is None else (row["high"] - row["low"]) / WIDTH


def difference(
    name: str, first: Row, second: Row, *, claimed: str, threshold: float = 0.0, scale: float = 1.0
) -> Check:
    """``first`` less ``scale`` times ``second``, against the threshold."""
    value = first["value"] - scale * second["value"]
    error = math.hypot(error_of(first), scale * error_of(second))
    n = min((r["n"] for r in (first, second) if r["n"]), default=1)
    return _check(name, value, error, n, claimed, threshold, first["unit"])


def level(name: str, row: Row, *, claimed: str, threshold: float) -> Check:
    """A measure against a threshold that is known."""
    return _check(name, row["value"], error_of(row), row["n"] or 1, claimed, threshold, row["unit"])


def _check(
    name: str, value: float, error: float, n: int, claimed: str, threshold: float, unit: str
) -> Check:
    def at_most(bound: float) -> float:
        """p of "the true value is at most the bound"."""
        return 1 - NormalDist(bound, error).cdf(value)

    def at_least(bound: float) -> float:
        return NormalDist(bound, error).cdf(value)

    if n < FEWEST or not error:  # of few units, or without an interval, nothing is decided
        pair = 1.0, 1.0
    elif claimed == WITHIN:
        beyond = min(at_most(threshold), at_least(-threshold))
        pair = max(at_least(threshold), at_most(-threshold)), min(1.0, 2 * beyond)
    else:
        pair = at_most(threshold), at_least(threshold)
        pair = pair if claimed == ABOVE else pair[::-1]
    gap = threshold - abs(value) if claimed == WITHIN else value - threshold
    needed = units_needed(gap, error * math.sqrt(n))
    check = Check(
        name,
        value,
        value - WIDTH / 2 * error,
        value + WIDTH / 2 * error,
        threshold,
        claimed,
        unit,
        n,
        *pair,
        TEST,
    )
    return replace(check, needed=needed if needed and needed > n else None)


__all__ = [
    "ABOVE",
    "BELOW",
    "WITHIN",
    "Training",
    "Trainings",
    "difference",
    "level",
    "trainings_of",
]
