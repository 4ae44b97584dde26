"""What claims about trainings look at: the measures of ``trajectory``, by training and step.

One training run is one unit: what is shown on its checkpoints holds for this run, and says nothing
of the next seed. So every claim is measured on each training apart, and on all seeds of a way of
training together, where seeds are the units (``over_seeds``).

A check compares two numbers with their 95 % intervals. Their standard errors are taken from these,

    p = 1 - Phi( (difference - threshold) / sqrt(se_1^2 + se_2^2) )        se = (high - low) / 3.92

as if the two were independent. Two checkpoints of one training mostly come from the same prompts,
which makes the true error of a difference smaller: such a test decides less than it could. A
difference between two trainings (claims 16, 18, 19) has the error of the seed on top, which one
pair of trainings cannot show: a verdict there is about these two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from core.errors import NothingToMeasure
from core.rows import Row
from core.significance import FEWEST, units_needed
from study.verdicts import ABOVE, BELOW, WITHIN, Check, Claim, mean_check

WIDTH = 2 * 1.96
"""Standard errors in a 95 % interval."""
TEST = "normal test, two intervals as if independent"


@dataclass(frozen=True)
class Training:
    """One training: its measures by name and step, and the reference's.

    Attributes:
        name: arm and seed, and the folder where two would have one name.
        variant: what its arm does otherwise than in the paper, as ``setting=value``.
        common: stands for the settings that every arm has, but the seed.
        measures: name -> step -> row of ``trajectory``.
    """

    name: str
    arm: str
    seed: int | None
    method: str | None
    variant: frozenset[str]
    common: str | None
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
        """The training of this arm, seed and steps that differs from this one in one setting.

        Raises:
            NothingToMeasure: there is none.
        """
        key = change.partition("=")[0]
        if any(item.startswith(f"{key}=") for item in self.variant):
            raise NothingToMeasure("a control itself", where=self.name, got=sorted(self.variant))
        for other in trainings.of_arms([self.arm]):
            same = (other.seed, other.common) == (self.seed, self.common)
            if same and other.variant == self.variant | {change} and other.steps == self.steps:
                return other
        raise NothingToMeasure(
            f"no {self.arm} of this seed, these steps and other settings with {change}",
            where=self.name,
            remedy=f"train one with --{change.replace('=', ' ')}",
        )

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
    first = rows[0]["model"] if rows else None
    reference = {r["measure"]: r for r in rows if r["model"] == first}
    groups: dict[tuple[str, str | None, int | None], list[Row]] = {}
    for r in rows:
        if r["arm"] and r["model"] != first:
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
        common = own[0].get("common")
        made = Training(name, arm, seed, method, variant, common, measures, reference)
        trainings.append(made)
    return Trainings(tuple(trainings), predictions)


def over_seeds(trainings: Sequence[Training], claims: Sequence[Claim]) -> list[Claim]:
    """The claim on all seeds of each way of training that has several: seeds are the units.

    Each check's numbers, one per seed, are tested by sign flips: five seeds that agree are the
    fewest that can decide.
    """
    groups: dict[tuple[str, frozenset[str], str | None], list[Claim]] = {}
    for training, claim in zip(trainings, claims, strict=True):
        if claim.applicable:
            key = training.arm, training.variant, training.common
            groups.setdefault(key, []).append(claim)
    found = []
    for (arm, *_), own in groups.items():
        first = own[0]
        if len(own) < 2 or len({tuple(c.claimed for c in claim.checks) for claim in own}) > 1:
            continue
        checks = []
        for k, check in enumerate(first.checks):
            beyond = [claim.checks[k].value - claim.checks[k].threshold for claim in own]
            whole = check.claimed == WITHIN
            made = mean_check(
                check.name,
                [claim.checks[k].value for claim in own] if whole else beyond,
                unit=check.unit,
                threshold=check.threshold if whole else 0.0,
                claimed=check.claimed,
            )
            checks.append(replace(made, decides=check.decides))
        name = f"{arm}, {len(own)} seeds"
        found.append(replace(first, model=name, checks=tuple(checks)))
    return found


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


def along(training: Training, name: str, *, claimed: str, flat: float = 0.0) -> Check:
    """A measure of the last checkpoint less that of the first, against 0.

    Args:
        flat: share of the first one's value that counts as no change.
    """
    first, last = training.ends(name)
    return difference(
        f"{name}, last - first", last, first, claimed=claimed, threshold=flat * first["value"]
    )


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
    "over_seeds",
    "trainings_of",
]
