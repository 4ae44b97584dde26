"""ASR by attack x source x target, with intervals, paired against the plain request of the same behaviours."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from core.records import BASELINES, PLAIN, Replay
from evaluation.asr import Interval, bootstrap_mean, wilson


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix. Rates are over ``judged`` replies; None where nothing was judged.

    ``gain`` is the mean over behaviours of (this attack's success - the plain request's) on the same target.
    """

    attack: str
    source: str
    target: str
    replays: int
    judged: int
    asr: float | None
    bootstrap: Interval | None
    wilson: Interval | None
    gain: float | None
    gain_bootstrap: Interval | None
    paired: int

    def to_row(self) -> dict[str, Any]:
        return asdict(self)


def matrix(replays: Sequence[Replay], *, seed: int = 0) -> list[Cell]:
    """Cells by target and source in order of first appearance, baselines first; several replies of one behaviour in a
    cell are averaged first."""
    groups: dict[tuple[str, str, str], dict[str, list[bool]]] = {}
    counts: dict[tuple[str, str, str], int] = defaultdict(int)
    for replay in replays:
        key = (replay.attack, replay.source_model, replay.target_model)
        counts[key] += 1
        outcomes = groups.setdefault(key, {})
        if replay.jailbroken is not None:
            outcomes.setdefault(replay.behaviour_id, []).append(replay.jailbroken)
    rates = {
        key: {b: sum(found) / len(found) for b, found in outcomes.items()} for key, outcomes in groups.items()
    }
    cells = []
    for (attack, source, target), rate in rates.items():
        values = list(rate.values())
        plain = rates.get((PLAIN, source, target), {})
        gains = [rate[b] - plain[b] for b in rate if b in plain] if attack != PLAIN else []
        judged = sum(map(len, groups[attack, source, target].values()))
        cells.append(
            Cell(
                attack=attack,
                source=source,
                target=target,
                replays=counts[attack, source, target],
                judged=judged,
                asr=sum(values) / len(values) if values else None,
                bootstrap=bootstrap_mean(values, seed=seed) if values else None,
                wilson=wilson(round(sum(values)), len(values)) if values else None,
                gain=sum(gains) / len(gains) if gains else None,
                gain_bootstrap=bootstrap_mean(gains, seed=seed) if gains else None,
                paired=len(gains),
            )
        )
    attacks = list(dict.fromkeys([*BASELINES, *(c.attack for c in cells)]))
    sources = list(dict.fromkeys(c.source for c in cells))
    targets = list(dict.fromkeys(c.target for c in cells))
    return sorted(
        cells,
        key=lambda c: (targets.index(c.target), sources.index(c.source), attacks.index(c.attack)),
    )
