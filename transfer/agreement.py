"""How well outcome D, read before any reply, says which prompts succeed.

Per target, over its judged replies to harmful requests: the rank correlation of D with success (D
is high where the model leans towards refusing, so a useful D correlates negatively), and the AUROC
of success by -D. Intervals resample behaviours.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from core.records import HARMFUL, Replay
from core.statistics import Interval, auroc_by_ranks, cluster_rows, percentile_interval, spearman

RESAMPLES = 1000


@dataclass(frozen=True)
class Agreement:
    """D against success on one target. ``auroc`` is None without both successes and failures."""

    target: str
    n: int
    behaviours: int
    successes: int
    correlation: float
    correlation_interval: Interval
    auroc: float | None
    auroc_interval: Interval | None


def agreements(
    replays: Iterable[Replay], labels: Mapping[str, str], *, seed: int = 0
) -> list[Agreement]:
    """One row per target that has judged replies with D."""
    cells: dict[str, list[tuple[float, bool, str]]] = {}
    for r in replays:
        own = cells.setdefault(r.target_model, [])
        harmful = labels.get(r.behaviour_id, HARMFUL) == HARMFUL
        if harmful and r.d is not None and r.jailbroken is not None:
            own.append((r.d, r.jailbroken, sys.intern(r.behaviour_id)))
    return [agreement_of(target, own, seed=seed) for target, own in cells.items() if own]


def agreement_of(
    target: str, cells: Sequence[tuple[float, bool, str]], *, seed: int = 0
) -> Agreement:
    """The agreement over (D, success, behaviour) triples."""
    d = np.array([cell[0] for cell in cells])
    won = np.array([cell[1] for cell in cells])
    _, clusters = np.unique([cell[2] for cell in cells], return_inverse=True)
    rng = np.random.default_rng(seed)
    samples = list(cluster_rows(clusters, resamples=RESAMPLES, rng=rng))
    correlations = [spearman(d[rows], won[rows].astype(float)) for rows in samples]
    both = won.any() and not won.all()
    areas = [auroc_by_ranks(-d[rows], won[rows]) for rows in samples] if both else []
    return Agreement(
        target=target,
        n=len(cells),
        behaviours=len(set(clusters.tolist())),
        successes=int(won.sum()),
        correlation=spearman(d, won.astype(float)),
        correlation_interval=percentile_interval(correlations),
        auroc=auroc_by_ranks(-d, won) if both else None,
        auroc_interval=percentile_interval(areas) if both else None,
    )
