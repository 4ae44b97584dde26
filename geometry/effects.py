"""Effects of interventions: what they change beyond what their controls change.

A row is the outcome of one behaviour under one intervention. Its fields are model, label,
behaviour_id, mode, operation, strength, kind, draw and the numbers named in ``OUTCOMES``. ``kind``
is ``intervention`` or the name of a control (``random``, ``matched``, ``wrong_layer``,
``wrong_position``). Two numbers are computed for each mode and strength:

    change   mean over behaviours of (outcome under the intervention - outcome left alone)
    effect   mean over behaviours of (outcome under the intervention - mean outcome over the
             controls) [SG 2606.16349]

The effect is computed twice. Once over all controls of the papers: ``random``, ``wrong_layer`` and
``wrong_position``. Once over the ``matched`` controls, which move every token as far as the
intervention does. Only outcomes of one behaviour are compared, and intervals resample behaviours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from core.statistics import bootstrap_mean

OUTCOMES = ("complied", "refused", "neither", "refusal", "d", "log_odds", "kl")
"""Shares of replies; mean log-probability of refusals and outcome D (nats per token); log-odds of a
refusal token and KL of the next token (nats)."""
PLAIN_CONTROLS = ("random", "wrong_layer", "wrong_position")

Row = Mapping[str, Any]


def by_behaviour(rows: Sequence[Row], outcome: str) -> dict[str, float]:
    """Mean outcome of each behaviour over its rows."""
    outcomes: dict[str, list[float]] = {}
    for r in rows:
        if r[outcome] is not None:  # no reply was asked for
            outcomes.setdefault(r["behaviour_id"], []).append(float(r[outcome]))
    return {name: float(np.mean(values)) for name, values in outcomes.items()}


def paired(first: Sequence[Row], second: Sequence[Row], outcome: str) -> list[float]:
    """Differences of the behaviours that both have, in the order of ``first``."""
    return list(differences(first, second, outcome).values())


def differences(first: Sequence[Row], second: Sequence[Row], outcome: str) -> dict[str, float]:
    """As ``paired``, by behaviour."""
    a, b = by_behaviour(first, outcome), by_behaviour(second, outcome)
    return {name: a[name] - b[name] for name in a if name in b}


def pick(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Rows whose fields have these values; a tuple means one of them."""
    return [
        r
        for r in rows
        if all(r[k] in v if isinstance(v, tuple) else r[k] == v for k, v in wanted.items())
    ]


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One row per model, label, mode, operation, strength and outcome."""
    keys = ("model", "label", "mode", "operation", "strength")
    effects = []
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for r in rows:
        groups.setdefault(tuple(r[k] for k in keys), []).append(r)
    for key, members in groups.items():
        own = pick(members, kind="intervention")
        if not own or key[2] == "none":
            continue
        alone = pick(rows, model=key[0], label=key[1], mode="none")
        controls = {
            "controls": pick(members, kind=PLAIN_CONTROLS),
            "matched": pick(members, kind="matched"),
        }
        for outcome in OUTCOMES:
            if not by_behaviour(own, outcome):
                continue
            change = paired(own, alone, outcome)
            row: dict[str, Any] = dict(zip(keys, key, strict=True)) | {
                "outcome": outcome,
                "n": len(by_behaviour(own, outcome)),
                "alone": _mean(alone, outcome),
                "value": _mean(own, outcome),
                "change": float(np.mean(change)) if change else None,
                "change_interval": bootstrap_mean(change),
                "delta_norm": _mean(own, "delta_norm"),
            }
            for name, others in controls.items():
                beyond = paired(own, others, outcome)
                row |= {
                    name: _mean(others, outcome),
                    f"{name}_delta_norm": _mean(others, "delta_norm"),
                    f"effect_{name}": float(np.mean(beyond)) if beyond else None,
                    f"effect_{name}_interval": bootstrap_mean(beyond),
                }
            effects.append(row)
    return effects


def _mean(rows: Sequence[Row], outcome: str) -> float | None:
    values = list(by_behaviour(rows, outcome).values())
    return float(np.mean(values)) if values else None
