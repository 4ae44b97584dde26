"""ASR by attack, source and target, with intervals, paired against the plain request.

The plain request is the same prompt whatever the source, so attacks without a source, and imported
ones, are paired with any plain request of the behaviour on that target under the same system prompt
(their own source's, where there is one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from core.records import BASELINES, PLAIN, Replay
from core.rows import Row
from core.statistics import Interval, bootstrap_mean, wilson

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix. Rates are over ``judged`` replies; None where nothing was judged.

    ``gain`` is the mean over behaviours of (this attack's success - the plain request's) on the
    same target.
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
    missing: int = 0
    """Prompts of this attack and source that have no reply on this target: failed or not yet made,
    never counted as refused."""
    sent_as_meant: int | None = None
    """Replies whose certificate says so (``transfer/certificate.py``); None for rows without
    certificates."""

    def to_row(self) -> Row:
        return asdict(self)


def matrix(
    replays: Sequence[Replay],
    expected: Mapping[tuple[str, str], int] | None = None,
    *,
    targets: Sequence[str] = (),
    seed: int = 0,
) -> list[Cell]:
    """Cells by target and source in order of first appearance, baselines first.

    Several replies to one behaviour in a cell are averaged first. ``expected`` is how many prompts
    each (attack, source) should have on each target; the others count as missing.
    """
    expected = expected or {}
    rows: dict[Key, list[Replay]] = {}
    for replay in replays:
        rows.setdefault((replay.attack, replay.source_model, replay.target_model), []).append(
            replay
        )
    targets = list(dict.fromkeys([*targets, *(r.target_model for r in replays)]))
    for attack, source in expected:
        for target in targets:
            rows.setdefault((attack, source, target), [])
    plain = _plain_rates(rows)
    cells = []
    for key, group in rows.items():
        attack, source, target = key
        rates = _rates(group)
        values = list(rates.values())
        systems = {r.behaviour_id: r.certificate.get("system_prompt_hash") for r in group}
        gains = []
        for behaviour, rate in rates.items() if attack != PLAIN else ():
            on = (target, systems[behaviour], behaviour)
            without = plain.get((source, *on), plain.get((None, *on)))
            if without is not None:
                gains.append(rate - without)
        certificates = [r.certificate for r in group if r.certificate]
        cells.append(
            Cell(
                attack=attack,
                source=source,
                target=target,
                replays=len(group),
                judged=sum(r.jailbroken is not None for r in group),
                asr=sum(values) / len(values) if values else None,
                bootstrap=bootstrap_mean(values, seed=seed) if values else None,
                wilson=wilson(sum(values), len(values)) if values else None,
                gain=sum(gains) / len(gains) if gains else None,
                gain_bootstrap=bootstrap_mean(gains, seed=seed) if gains else None,
                paired=len(gains),
                missing=max(0, expected.get((attack, source), 0) - len(group)),
                sent_as_meant=sum(c["sent_as_meant"] for c in certificates)
                if certificates
                else None,
            )
        )
    attacks = list(dict.fromkeys([*BASELINES, *(c.attack for c in cells)]))
    sources = list(dict.fromkeys(c.source for c in cells))
    return sorted(
        cells,
        key=lambda c: (targets.index(c.target), sources.index(c.source), attacks.index(c.attack)),
    )


def _plain_rates(
    rows: Mapping[Key, Sequence[Replay]],
) -> dict[tuple[str | None, str, Any, str], float]:
    """Success of the plain request by (source, target, system prompt, behaviour).

    None stands for any source.
    """
    own: dict[tuple[str | None, str, Any, str], float] = {}
    for (attack, source, target), replays in rows.items():
        if attack == PLAIN:
            for r in replays:
                if r.jailbroken is not None:
                    on = (target, r.certificate.get("system_prompt_hash"), r.behaviour_id)
                    own[source, *on] = float(r.jailbroken)
                    own.setdefault((None, *on), float(r.jailbroken))
    return own


def _rates(replays: Sequence[Replay]) -> dict[str, float]:
    """Success rate by behaviour, over the judged replies."""
    outcomes: dict[str, list[bool]] = {}
    for replay in replays:
        if replay.jailbroken is not None:
            outcomes.setdefault(replay.behaviour_id, []).append(replay.jailbroken)
    return {behaviour: sum(outcome) / len(outcome) for behaviour, outcome in outcomes.items()}
