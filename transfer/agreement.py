"""How well outcome D, read before any reply, says which prompts succeed.

Per target, over its judged replies to harmful requests: the rank correlation of D with success (D
is high where the model leans towards refusing, so a useful D correlates negatively), and the AUROC
of success by -D. Intervals resample behaviours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    replays: Sequence[Replay], labels: Mapping[str, str], *, seed: int = 0
) -> list[Agreement]:
    """One row per target that has judged replies with D."""
    rows = []
    for target in dict.fromkeys(r.target_model for r in replays):
        here = [
            r
            for r in replays
            if r.target_model == target
            and r.d is not None
            and r.jailbroken is not None
            and labels.get(r.behaviour_id, HARMFUL) == HARMFUL
        ]
        if here:
            cells = [(float(r.d or 0.0), bool(r.jailbroken), r.behaviour_id) for r in here]
            rows.append(agreement_of(target, cells, seed=seed))
    return rows


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
