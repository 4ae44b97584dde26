"""Does the place of a prompt on the plane say whether it succeeds? How far apart do classes lie?

Within an attack class, AUROC of success by each of three scores; more than 0.5 means that
suppression goes with success:

    H        -x              less harmfulness at t_inst
    R        -y              less refusal at t_post_inst
    H moved  plain x - x     suppressed against the same behaviour's plain request, so that an easy
             request is no suppression
    R moved  plain y - y     (only prompts whose plain request was sent)
    both     a linear discriminant on (x, y), fitted on the other behaviours of the class (so it can
             learn the other sign too)

``better of`` the two is at least one half even where nothing is there: only its null says anything.
So the decision is a regression (``regress``): outcome D on how far H and R moved, with an effect
for every class and every behaviour.

``pooled`` averages over classes, weighted by the number of (success, failure) pairs: prompts of
different classes are never compared. Intervals resample behaviours; the null permutes success
within each class, everything anew: whole behaviours where all have equally many prompts. Plain
requests are no class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from core.readings import PlanePoint
from core.records import HARMFUL, PLAIN
from core.rows import Row
from core.significance import sign_flip_p
from core.statistics import Interval, Ranked, cluster_weights, percentile_interval

BOTH = "both"
SCORES = ("H", "R", "H moved", "R moved", BOTH)
MOVED = ("H moved", "R moved")
EITHER = "better of H moved, R moved"
POOLED = "pooled"


def success_auroc(scores: np.ndarray, success: np.ndarray) -> tuple[float, int]:
    """AUROC of ``success`` (n,) by ``scores`` (n,), and over how many pairs (NaN, 0 without)."""
    return Ranked(scores).auroc(success)


def held_out_scores(where: np.ndarray, success: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(n, 2) points -> (n,) discriminant scores.

    Each comes from points of other groups only. It is 0 where those have one outcome.
    """
    _, group = np.unique(groups, return_inverse=True)
    where = where - where.mean(0)  # moments of what lies around zero lose no digits
    count = group.max(initial=-1) + 1
    means, spread, enough = [], np.zeros((count, 2, 2)), np.ones(count, dtype=bool)
    for chosen in (success, ~success):
        x, own = where[chosen], group[chosen]
        terms = np.concatenate([np.ones((len(x), 1)), x, x[:, [0, 0, 1]] * x[:, [0, 1, 1]]], 1)
        sums = np.stack([np.bincount(own, t, minlength=count) for t in terms.T], -1)
        n, *rest = (sums.sum(0) - sums).T  # of all other groups
        enough &= n > 0.5
        n = np.maximum(n, 1)
        mean = np.stack(rest[:2], -1) / n[:, None]
        second = np.stack([rest[2], rest[3], rest[3], rest[4]], -1).reshape(count, 2, 2)
        means.append(mean)
        spread += second - n[:, None, None] * mean[:, :, None] * mean[:, None]
    ridge = 1e-6 * np.trace(spread, axis1=1, axis2=2) + 1e-12
    spread += ridge[:, None, None] * np.eye(2)
    weights = np.linalg.solve(spread, (means[0] - means[1])[..., None])[..., 0]
    middle = (means[0] + means[1]) / 2
    return np.where(enough[group], ((where - middle[group]) * weights[group]).sum(1), 0.0)


@dataclass(frozen=True)
class _Judged:
    """Judged attack prompts of one target and frame, as arrays."""

    where: np.ndarray
    """(n, 4): x, y, x and y less those of the plain request."""
    success: np.ndarray
    groups: np.ndarray
    """(n,) number of each prompt's behaviour."""
    classes: np.ndarray

    @classmethod
    def of(cls, points: Sequence[PlanePoint]) -> _Judged:
        nan = float("nan")
        where = [
            (
                p.x,
                p.y,
                p.x - (nan if p.plain_x is None else p.plain_x),
                p.y - (nan if p.plain_y is None else p.plain_y),
            )
            for p in points
        ]
        _, groups = np.unique([p.behaviour_id for p in points], return_inverse=True)
        success = np.array([bool(p.jailbroken) for p in points])
        return cls(np.array(where), success, groups, np.array([p.class_name for p in points]))

    @cached_property
    def members(self) -> dict[str, np.ndarray]:
        """Rows of each class."""
        return {str(c): np.nonzero(self.classes == c)[0] for c in np.unique(self.classes)}

    @cached_property
    def _ranked(self) -> dict[str, dict[str, Ranked]]:
        """Every score but ``both``, which depends on the outcomes, in every class."""
        return {
            score: {c: Ranked(-column, rows) for c, rows in self.members.items()}
            for score, column in zip(SCORES[:-1], self.where.T, strict=True)
        }

    def both(self, success: np.ndarray) -> dict[str, Ranked]:
        """The discriminant's scores under these outcomes, by class."""
        scores = np.zeros(len(success))
        for rows in self.members.values():
            where = self.where[rows, :2]
            scores[rows] = held_out_scores(where, success[rows], self.groups[rows])
        return {c: Ranked(scores, rows) for c, rows in self.members.items()}

    def aurocs(
        self, success: np.ndarray, both: dict[str, Ranked], weights: np.ndarray | None = None
    ) -> dict[str, dict[str, tuple[float, int]]]:
        """{score: {class or pooled: (AUROC, pairs)}}."""
        found: dict[str, dict[str, tuple[float, int]]] = {}
        for score, ranked in (self._ranked | {BOTH: both}).items():
            per = {c: r.auroc(success, weights) for c, r in ranked.items()}
            pairs = sum(n for _, n in per.values())
            total = sum(a * n for a, n in per.values() if n)
            found[score] = per | {POOLED: (total / pairs if pairs else float("nan"), pairs)}
        # which of the two is the better is chosen anew in every resample and draw of the null
        pooled = (found[s][POOLED] for s in MOVED)
        return found | {EITHER: {POOLED: max(pooled, key=lambda pair: pair[0])}}

    def used(self, score: str, name: str) -> np.ndarray:
        """(n,) which prompts an AUROC rests on.

        They have this score, and stand in a class with both outcomes.
        """
        column = {"H moved": 2, "R moved": 3, EITHER: 2}.get(score, 0)
        known = np.isfinite(self.where[:, column])
        used = np.zeros(len(known), dtype=bool)
        for c in np.unique(self.classes) if name == POOLED else [name]:
            here = known & (self.classes == c)
            if self.success[here].any() and not self.success[here].all():
                used |= here
        return used

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """Outcomes permuted within each class: whole behaviours where all have equally many."""
        shuffled = self.success.copy()
        for c in np.unique(self.classes):
            here = np.nonzero(self.classes == c)[0]
            here = here[self.groups[here].argsort(kind="stable")]
            sizes = np.unique(self.groups[here], return_counts=True)[1]
            block = int(sizes[0]) if (sizes == sizes[0]).all() else 1
            outcomes = self.success[here].reshape(-1, block)
            shuffled[here] = rng.permutation(outcomes).ravel()
        return shuffled


def success_prediction(
    points: Sequence[PlanePoint], *, draws: int = 200, resamples: int = 1000, seed: int = 0
) -> list[Row]:
    """Rows (class or pooled) x score of the judged attack points of one target and frame."""
    judged = [
        p
        for p in points
        if p.kind == "attack"
        and p.attack != PLAIN
        and p.label == HARMFUL
        and p.jailbroken is not None
    ]
    if not judged:
        return []
    rng = np.random.default_rng(seed)
    data = _Judged.of(judged)
    both = data.both(data.success)
    measured = data.aurocs(data.success, both)
    resampled = [
        data.aurocs(data.success, both, weights)
        for weights in cluster_weights(data.groups, resamples=resamples, rng=rng)
    ]
    nulls = []
    for _ in range(draws):
        shuffled = data.shuffled(rng)
        nulls.append(data.aurocs(shuffled, data.both(shuffled)))
    rows = []
    for score in (*SCORES, EITHER):
        for name, (value, pairs) in measured[score].items():
            if pairs:
                here = data.success[data.used(score, name)]
                rows.append(
                    {
                        "target": judged[0].target,
                        "frame": judged[0].frame,
                        "class": name,
                        "score": score,
                        "auroc": value,
                        "interval": percentile_interval([r[score][name][0] for r in resampled]),
                        "null_95": float(np.nanquantile([n[score][name][0] for n in nulls], 0.95)),
                        "n": len(here),
                        "successes": int(here.sum()),
                        "failures": int((~here).sum()),
                    }
                )
    return rows


@dataclass(frozen=True)
class Slope:
    """One regressor's part in a regression.

    Attributes:
        slope: units of the outcome per standard deviation of what is left of the regressor.
        interval: 95 %, behaviours resampled.
        score: correlation of what is left of the regressor and of the outcome.
        p, p_below: one-sided p of a slope above, and below, zero.
    """

    slope: float
    interval: Interval
    score: float
    p: float
    p_below: float


def regress(
    moved: np.ndarray,
    outcome: Sequence[float],
    behaviours: Sequence[str],
    classes: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Slope]:
    """(n, 2) how far H and R moved, (n,) outcome D -> slope of each within class and behaviour.

    Both regressors and the outcome are freed of class and behaviour effects and of the other
    regressor (Frisch-Waugh). A behaviour's part of the score is its sum of regressor times outcome;
    the p-values flip the signs of these parts. A regressor that does not vary within classes and
    behaviours is left out.
    """
    y = np.asarray(outcome, dtype=np.float64)
    names, groups = np.unique(np.array(behaviours), return_inverse=True)
    kinds, numbers = np.unique(np.array(classes), return_inverse=True)
    dummies = np.concatenate([np.eye(len(names))[groups], np.eye(len(kinds))[numbers]], 1)
    rows = {}
    for column, name in enumerate("HR"):
        others = np.column_stack([dummies, moved[:, 1 - column]])
        x, left = (_residual(others, values) for values in (moved[:, column], y))
        spread = x.std()
        if spread < 1e-9 * max(1.0, np.abs(moved[:, column]).max()):
            continue
        score, power = (_sums(groups, x * other) for other in (left, x))
        drawn = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
        slopes = spread * score[drawn].sum(1) / np.maximum(power[drawn].sum(1), 1e-12)
        rows[name] = Slope(
            float(spread * score.sum() / power.sum()),
            percentile_interval(slopes),
            float(score.sum() / max(1e-12, math.sqrt(power.sum() * (left @ left)))),
            sign_flip_p(score, seed=seed),
            sign_flip_p(-score, seed=seed),
        )
    return rows


def _sums(groups: np.ndarray, values: np.ndarray) -> NDArray[np.float64]:
    """(n,) values -> their sums by group."""
    return np.bincount(groups, values).astype(np.float64)


def _residual(others: np.ndarray, values: np.ndarray) -> np.ndarray:
    return values - others @ np.linalg.lstsq(others, values, rcond=None)[0]


def centroid_distances(
    points: Sequence[PlanePoint], *, draws: int = 200, resamples: int = 1000, seed: int = 0
) -> list[Row]:
    """Distance of every two classes' centroids on the plane, in units of the residual.

    It is measured over the behaviours that both have.

    The interval resamples behaviours; a resampled distance is biased upwards, so it is held against
    ``null_95``, from swapping the two classes' points within behaviours at random.
    """
    rng = np.random.default_rng(seed)
    means: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for p in points:
        if p.kind == "attack":
            means.setdefault(p.class_name, {}).setdefault(p.behaviour_id, []).append((p.x, p.y))
    rows = []
    for first, second in combinations(means, 2):
        shared = [b for b in means[first] if b in means[second]]
        if len(shared) < 2:
            continue
        moved = np.array(
            [np.mean(means[first][b], 0) - np.mean(means[second][b], 0) for b in shared]
        )
        drawn = moved[rng.integers(len(moved), size=(resamples, len(moved)))].mean(1)
        signs = rng.choice([-1.0, 1.0], size=(draws, len(moved), 1))
        low, high = percentile_interval(np.linalg.norm(drawn, axis=1))
        rows.append(
            {
                "target": points[0].target,
                "frame": points[0].frame,
                "classes": [first, second],
                "behaviours": len(shared),
                "distance": float(np.linalg.norm(moved.mean(0))),
                "interval": [low, high],
                "null_95": float(
                    np.quantile(np.linalg.norm((signs * moved).mean(1), axis=1), 0.95)
                ),
            }
        )
    return rows
