"""What predicts transfer between checkpoints? Rank correlations of TASR with numbers of them.

    TASR(s -> t)  share of behaviours on which the prompts that were optimised on source s succeed
                  on target t; or the same of the behaviours on which they succeed on s
    rho           Spearman's correlation of TASR with a predictor, over pairs s -> t with s and t
                  different: all of them, and those whose target is of one arm

A predictor is a number of each checkpoint, and a pair has its target's (``of_target``) or the
difference of both (``gap``) [SG 2606.16349].

    interval      bootstrap over checkpoints *and* behaviours: checkpoints are drawn again, and
                  pairs of one checkpoint with itself are left out
    p             permutation of the predictor's known numbers over the checkpoints of the group, of
                  |rho|. Checkpoints of one training are not exchangeable: whatever grows along it
                  correlates with whatever else does. So a claim takes this p only from five
                  trainings on (``n_trainings``)
    first - next  difference of two predictors' |rho|, from the same samples
    needed        independent checkpoints that would show such a rho at 80 % power (Fisher's z)

Pairs that share a checkpoint are not independent, so few checkpoints rank nothing, however many
pairs they make.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from core.rows import Row
from core.significance import LEVEL, POWER
from core.statistics import percentile_interval, permutation_p, spearman

Array = NDArray[np.float64]
Pairs = Callable[[Array], Array]
"""(checkpoint,) numbers -> (source, target) numbers."""
ALL = "all"
FEWEST = 4
"""Targets of which a rank correlation says anything at all."""


@dataclass(frozen=True)
class Transfers:
    """Success of frozen prompts between checkpoints.

    Attributes:
        checkpoints: names of all checkpoints, in one order.
        arms: their arms; None for a model that was not trained.
        success: (source, target, behaviour); NaN where nothing was made or sent.
        trainings: which training each is of; None: each of its own.
    """

    checkpoints: tuple[str, ...]
    arms: tuple[str | None, ...]
    success: Array
    trainings: tuple[str, ...] | None = None

    def tasr(self, weights: Array | None = None) -> Array:
        """(source, target) mean over behaviours, NaN without any; ``weights``: how often each."""
        w = np.ones(self.success.shape[2]) if weights is None else weights
        known = ~np.isnan(self.success)
        total = (np.where(known, self.success, 0.0) * w).sum(2)
        count = (known * w).sum(2)
        return np.where(count > 0, total / np.maximum(count, 1e-12), np.nan)

    def given_source(self) -> Transfers:
        """The same on behaviours where the source's prompt succeeds on the source."""
        n = len(self.checkpoints)
        own = self.success[np.arange(n), np.arange(n)]
        kept = np.where((own > 0)[:, None], self.success, np.nan)
        return Transfers(self.checkpoints, self.arms, kept, self.trainings)


def of_target(values: Array) -> Array:
    """(checkpoint,) -> (source, target): the target's."""
    return np.broadcast_to(values[None], (len(values), len(values)))


def gap(values: Array) -> Array:
    """(checkpoint,) -> (source, target): the absolute difference."""
    return np.abs(values[:, None] - values[None])


@dataclass(frozen=True)
class Predictor:
    """``values`` (checkpoint,), NaN where unknown; ``pairs``: ``of_target`` or ``gap``."""

    name: str
    values: Array
    pairs: Pairs = of_target


def predictions(
    transfers: Transfers,
    predictors: Sequence[Predictor],
    *,
    resamples: int = 500,
    permutations: int = 499,
    seed: int = 0,
) -> list[Row]:
    """One row per group (all targets, then each arm) and predictor, best |rho| first.

    Groups of fewer than ``FEWEST`` targets with known numbers are left out.
    """
    rows = []
    arms = dict.fromkeys(a for a in transfers.arms if a)
    for group in (ALL, *arms):
        chosen = np.array([group in (ALL, a) for a in transfers.arms])
        rows += _group(transfers, predictors, group, chosen, resamples, permutations, seed)
    return rows


def _group(
    transfers: Transfers,
    predictors: Sequence[Predictor],
    group: str,
    chosen: NDArray[np.bool_],
    resamples: int,
    permutations: int,
    seed: int,
) -> list[Row]:
    n, k = len(transfers.checkpoints), transfers.success.shape[2]
    rng = np.random.default_rng(seed)
    everyone = np.arange(n)
    tasr = transfers.tasr()
    known = [p for p in predictors if _targets(tasr, p, chosen) >= FEWEST]
    own = {p.name: _rho(tasr, p, everyone, chosen) for p in known}
    drawn: dict[str, list[float]] = {p.name: [] for p in known}
    for _ in range(resamples):
        again = transfers.tasr(np.bincount(rng.integers(k, size=k), minlength=k).astype(float))
        nodes = rng.integers(n, size=n)
        for p in known:
            drawn[p.name].append(_rho(again, p, nodes, chosen))
    rows: list[Row] = []
    for p in sorted(known, key=lambda p: -abs(own[p.name])):
        nulls = [
            abs(_rho(tasr, _dealt(p, chosen, rng), everyone, chosen)) for _ in range(permutations)
        ]
        rho = own[p.name]
        rows.append(
            {
                "targets": group,
                "predictor": p.name,
                "rho": rho,
                "interval": percentile_interval(drawn[p.name]),
                "p": permutation_p(abs(rho), nulls),
                "n_targets": _targets(tasr, p, chosen),
                "n_trainings": _trainings(transfers, tasr, p, chosen),
                "n_pairs": int(_used(tasr, p, everyone, chosen).sum()),
                "needed": needed(rho),
                "beyond": {},
            }
        )
    for first, second in combinations(rows, 2):
        a, b = (np.abs(drawn[r["predictor"]]) for r in (first, second))
        first["beyond"][second["predictor"]] = {
            "value": abs(first["rho"]) - abs(second["rho"]),
            "interval": percentile_interval(a - b),
        }
    return rows


def _used(tasr: Array, p: Predictor, nodes: NDArray[np.int64], chosen: NDArray[np.bool_]) -> Array:
    """(source, target) of the drawn checkpoints: pairs that count."""
    x = p.pairs(p.values)[np.ix_(nodes, nodes)]
    y = tasr[np.ix_(nodes, nodes)]
    apart = nodes[:, None] != nodes[None]
    return apart & chosen[nodes][None] & ~np.isnan(x) & ~np.isnan(y)


def _rho(tasr: Array, p: Predictor, nodes: NDArray[np.int64], chosen: NDArray[np.bool_]) -> float:
    used = _used(tasr, p, nodes, chosen)
    x, y = p.pairs(p.values)[np.ix_(nodes, nodes)][used], tasr[np.ix_(nodes, nodes)][used]
    return spearman(x, y)


def _dealt(p: Predictor, chosen: NDArray[np.bool_], rng: np.random.Generator) -> Predictor:
    """The predictor with its known numbers dealt anew among the group's checkpoints."""
    values = p.values.copy()
    known = chosen & ~np.isnan(values)
    values[known] = rng.permutation(values[known])
    return Predictor(p.name, values, p.pairs)


def _trainings(transfers: Transfers, tasr: Array, p: Predictor, chosen: NDArray[np.bool_]) -> int:
    used = np.asarray(_used(tasr, p, np.arange(len(chosen)), chosen)).any(0)
    names = transfers.trainings or transfers.checkpoints
    return len({names[n] for n in np.flatnonzero(used)})


def _targets(tasr: Array, p: Predictor, chosen: NDArray[np.bool_]) -> int:
    used = _used(tasr, p, np.arange(len(chosen)), chosen)
    return int(used.any(0).sum())


def needed(rho: float) -> int | None:
    """Independent checkpoints for a one-sided test of ``rho`` at 80 % power; None for rho = 0."""
    if not 0 < abs(rho) < 1:
        return None
    z_level, z_power = (NormalDist().inv_cdf(q) for q in (1 - LEVEL, POWER))
    return math.ceil(((z_level + z_power) / math.atanh(abs(rho))) ** 2 + 3)


def transfers_of(
    success: Mapping[tuple[str, str, str], float],
    checkpoints: Sequence[str],
    arms: Mapping[str, str | None],
    trainings: Mapping[str, str] | None = None,
) -> Transfers:
    """``success`` by (source, target, behaviour) as an array; what is not there is missing."""
    behaviours = sorted({key[2] for key in success})
    array = np.full((len(checkpoints), len(checkpoints), len(behaviours)), np.nan)
    place = {name: i for i, name in enumerate(checkpoints)}
    for (source, target, behaviour), value in success.items():
        if source in place and target in place:
            array[place[source], place[target], behaviours.index(behaviour)] = value
    names = None if trainings is None else tuple(trainings[c] for c in checkpoints)
    return Transfers(tuple(checkpoints), tuple(arms.get(c) for c in checkpoints), array, names)
