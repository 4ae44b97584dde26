"""A claim is measured by checks; each is an estimate with a p-value in either direction.

    p          of the test whose null is that the claimed side is false
    p against  of the test whose null is that the claimed side is true
    yes        p <= 0.05, one-sided
    no         p against <= 0.05
    unclear    neither

Both directions obey the same rules: sampling (sign flips and a t bootstrap over units, or the
bootstrap of a cosine), and, where there are controls, the rank among those of each kind. The
largest of these is the p of the check. With fewer than 12 units a cosine decides nothing. An effect
that is surely smaller than a stated margin refutes too: without one a true null is never refuted.

A claim ``holds`` if all its deciding checks say yes: its p is the largest of theirs. It is
``refuted`` if any says no: its p against is the smallest of theirs, times their number. (A claim
that one of several checks would establish takes these the other way round.) ``with_holm`` corrects
both for the number of claims of a model. Checks that do not decide are told beside the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace

import numpy as np

from core.errors import AttackPlaneError
from core.files import MEND
from core.rows import Row
from core.significance import FEWEST, LEVEL, draws_p, holm, mean_p, units_needed
from core.statistics import Numbers, bootstrap_mean, permutation_p
from core.typed import from_values
from geometry.cross_half import CrossHalf

NEAR_ORTHOGONAL = math.cos(math.radians(80))
"""Cosines of less than this are near orthogonal, of more alike."""
ABOVE, BELOW, WITHIN, NOT_ABOVE = "above", "below", "within", "not above"


@dataclass(frozen=True)
class Check:
    """One number against its threshold.

    Attributes:
        low, high: 95 % interval.
        claimed: ``above`` or ``below`` the threshold; ``within``: closer to 0 than it; ``not
            above``: below it. For the last two the threshold is the largest effect that counts as
            none.
        p, p_against: see above.
        test: how they were found.
        n: units.
        nulls: what meaningless directions or labels give.
        needed: units that would decide it at a power of 80 %, if the effect is as estimated; None
            where it has as many, so that controls or Holm's correction stand in the way, or where
            no number would do.
        decides: whether the verdict depends on it.
    """

    name: str
    value: float
    low: float
    high: float
    threshold: float
    claimed: str
    unit: str
    n: int
    p: float
    p_against: float
    test: str
    nulls: dict[str, float] = field(default_factory=dict)
    needed: int | None = None
    decides: bool = True

    @property
    def outcome(self) -> str:
        if self.p <= LEVEL:
            return "yes"
        return "no" if self.p_against <= LEVEL else "unclear"

    def told(self) -> Check:
        """The same, without a say in the verdict."""
        return replace(self, decides=False)


@dataclass(frozen=True)
class Claim:
    """One claim on one model.

    Attributes:
        note: what the reader must know, or why the claim could not be measured.
        held_back: what the model lacks of what the claim is about. With any such reason the claim
            is undecided, whatever its checks say.
        any_of: whether one of the deciding checks is enough.
        holm: p and p against, corrected for the number of claims of this model (``family``).
    """

    number: int
    title: str
    model: str
    checks: tuple[Check, ...]
    note: str = ""
    held_back: tuple[str, ...] = ()
    settings: Row = field(default_factory=dict)
    any_of: bool = False
    holm: tuple[float, float] | None = None
    family: int = 0

    @property
    def applicable(self) -> bool:
        """Whether the model has what the claim is about."""
        return not self.held_back

    @property
    def p(self) -> float:
        """Of the test whose null is that the claim does not hold."""
        return _combined([c.p for c in self._deciding], any_of=self.any_of)

    @property
    def p_against(self) -> float:
        """Of the test whose null is that no part of the claim is false."""
        return _combined([c.p_against for c in self._deciding], any_of=not self.any_of)

    @property
    def _deciding(self) -> list[Check]:
        return [c for c in self.checks if c.decides]

    @property
    def verdict(self) -> str:
        """``holds``, ``refuted`` or ``undecided``."""
        p, against = self.holm or (self.p, self.p_against)
        if not self.applicable:
            return "undecided"
        if p <= LEVEL:
            return "holds"
        return "refuted" if against <= LEVEL else "undecided"

    def to_row(self) -> Row:
        row = asdict(self) | {
            "verdict": self.verdict,
            "applicable": self.applicable,
            "p": self.p,
            "p_against": self.p_against,
        }
        row["checks"] = [_finite(asdict(c)) | {"outcome": c.outcome} for c in self.checks]
        return row


def claim_of(row: Row, where: str) -> Claim:
    """The claim of a row, before Holm's correction.

    Raises:
        AttackPlaneError: the row is none; ``where`` names its line.
    """
    checks = row.get("checks")
    if not isinstance(checks, list) or not all(isinstance(c, dict) for c in checks):
        raise AttackPlaneError("checks: not a list of objects", where=where, remedy=MEND)
    names = {f.name for f in fields(Claim)} - {"checks", "holm", "family"}
    own = {name: value for name, value in row.items() if name in names}
    return from_values(Claim, own | {"checks": tuple(_check_of(c, where) for c in checks)}, where)


def _check_of(row: Row, where: str) -> Check:
    """NaN was written as null, and is no number of a file."""
    own = {f.name: row[f.name] for f in fields(Check) if f.name in row}
    unknown = [name for name, value in own.items() if value is None and name != "needed"]
    known = from_values(Check, own | dict.fromkeys(unknown, 0.0), where)
    nothing: Row = dict.fromkeys(unknown, math.nan)
    return replace(known, **nothing)


def _combined(p_values: Sequence[float], *, any_of: bool) -> float:
    """p of several tests: any one of them (Bonferroni), or all of them together; 1 without any."""
    if not p_values:
        return 1.0
    return min(1.0, len(p_values) * min(p_values)) if any_of else max(p_values)


def with_holm(claims: Sequence[Claim]) -> list[Claim]:
    """The claims, each with p-values corrected for the number of claims on its model.

    Claims that are held back were not tested, and do not count.
    """
    corrected = list(claims)
    for model in dict.fromkeys(c.model for c in claims):
        own = [i for i, c in enumerate(claims) if c.model == model and c.applicable]
        pairs = zip(
            holm([claims[i].p for i in own]), holm([claims[i].p_against for i in own]), strict=True
        )
        for i, pair in zip(own, pairs, strict=True):
            corrected[i] = replace(claims[i], holm=pair, family=len(own))
    return corrected


def _finite(row: Row) -> Row:
    """What could not be measured is null: JSON has no NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


# --- checks ---------------------------------------------------------------------------------------
def mean_check(
    name: str,
    values: Numbers,
    *,
    unit: str,
    threshold: float = 0.0,
    claimed: str = ABOVE,
    controls: Mapping[str, Numbers] | None = None,
    ranked: float | None = None,
    margin: float = 0.0,
    seed: int = 0,
) -> Check:
    """The mean of one value per unit (``mean_p``); where there are controls also by its rank.

    Args:
        claimed: ``within`` is an equivalence test: above minus the threshold and below it.
        controls: kind -> the same mean of each control of it. The rank is taken within each kind,
            and the largest p counts: weak controls of one kind must not dilute another. What is
            claimed to be small (``within``, ``not above``) needs not beat them; to refute it, it
            must.
        ranked: what is ranked among them, where they were run on fewer units; None: the mean.
        margin: an effect of less than this beyond the threshold counts as none. It must surely be
            larger to be shown, and if it is surely smaller it is refuted, whatever its rank: the
            threshold is what controls do. 0: only an effect the other way refutes.
    """
    array = np.asarray([v for v in values if math.isfinite(v)], dtype=np.float64)
    n = len(array)
    if not n:
        nan = math.nan
        return Check(name, nan, nan, nan, threshold, claimed, unit, 0, 1.0, 1.0, "nothing measured")
    mean, spread = float(array.mean()), float(array.std(ddof=1)) if n > 1 else math.nan
    low, high = bootstrap_mean(array, seed=seed) or (math.nan, math.nan)

    def p_of(sign: int, beyond: float) -> float:
        return mean_p(sign * array, threshold=sign * beyond, seed=seed)

    if claimed == WITHIN:
        inside = max(p_of(-1, threshold), p_of(1, -threshold))
        pair = inside, min(1.0, 2 * min(p_of(1, threshold), p_of(-1, -threshold)))
    else:
        side = 1 if claimed == ABOVE else -1
        bound = threshold + side * margin
        pair = p_of(side, bound), p_of(-side, bound)
    test = f"sign flips{' and t bootstrap' if n >= FEWEST else ''} over {n}"
    test += f", more or less than {margin:.2f}" if margin else ""
    nulls: dict[str, float] = {}
    for kind, means in (controls or {}).items():
        ranks = _ranks(mean if ranked is None else ranked, means, claimed)
        pair = max(pair[0], ranks[0]), pair[1] if margin else max(pair[1], ranks[1])
        test += f"; rank among {len(means)} {kind}"
        nulls |= _ends(kind, means)
    check = Check(name, mean, low, high, threshold, claimed, unit, n, *pair, test, nulls)
    gap = threshold - abs(mean) if claimed == WITHIN else abs(mean - threshold) - margin
    return _with_needed(check, gap, spread)


def cosine_check(name: str, found: CrossHalf, *, claimed: str) -> Check:
    """A cosine without noise: ``within`` the bound of near orthogonal ones, or ``above`` it."""
    bound, draws = NEAR_ORTHOGONAL, found.draws
    above, below = draws_p(draws, bound), draws_p(-draws, bound)
    if claimed == WITHIN:
        pair = max(draws_p(-draws, -bound), draws_p(draws, -bound)), min(1.0, 2 * min(above, below))
    else:
        pair = max(above, found.p_labels), draws_p(-draws, -bound)
    if found.units < FEWEST:
        pair = 1.0, 1.0
    test = f"bootstrap over {found.units} units of cosines across halves"
    if claimed != WITHIN:
        test += "; permuted labels"
    check = Check(
        name,
        found.value,
        *found.interval,
        bound,
        claimed,
        "cosine",
        found.units,
        *pair,
        test,
        {"labels_p": found.p_labels},
    )
    known = draws[np.isfinite(draws)]
    spread = float(known.std() * math.sqrt(found.units)) if len(known) > 1 else math.nan
    gap = bound - abs(found.value) if claimed == WITHIN else found.value - bound
    return _with_needed(check, gap, spread)


def p_check(
    name: str,
    value: float,
    interval: Iterable[float],
    p: float,
    p_against: float,
    test: str,
    *,
    unit: str,
    n: int,
    threshold: float,
    claimed: str = ABOVE,
    nulls: dict[str, float] | None = None,
) -> Check:
    """A statistic that brings its own p-values."""
    low, high = interval
    return Check(
        name, value, low, high, threshold, claimed, unit, n, p, p_against, test, nulls or {}
    )


def _ranks(value: float, controls: Numbers, claimed: str) -> tuple[float, float]:
    """p of the claimed side and of the other by the rank among controls."""
    array = np.asarray(controls, dtype=np.float64)
    if claimed == WITHIN:
        return 0.0, permutation_p(abs(value), np.abs(array))
    if claimed == NOT_ABOVE:
        return 0.0, permutation_p(value, array)
    up, down = permutation_p(value, array), permutation_p(-value, -array)
    return (up, down) if claimed == ABOVE else (down, up)


def _ends(kind: str, controls: Numbers) -> dict[str, float]:
    array = np.asarray(controls, dtype=np.float64)
    if not len(array) or np.isnan(array).any():
        return {}
    low, high = np.quantile(array, (0.05, 0.95))
    return {f"{kind}_5": float(low), f"{kind}_95": float(high)}


def _with_needed(check: Check, gap: float, spread: float) -> Check:
    """With the units that would decide it, unless more units do not help."""
    needed = units_needed(gap, spread)
    return replace(check, needed=needed if needed and needed > check.n else None)
