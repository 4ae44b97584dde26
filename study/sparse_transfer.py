"""Transfer between the checkpoints of a run, and which of their numbers predict it.

Prompts that were optimised on a checkpoint and replayed on others make the matrix: as many sources
and targets as the run has. What was not sent is missing. Few prompts succeed or fail on a small
model, so D, which every prompt moves, stands beside what the judge says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from core.records import BASELINES, HARMFUL
from core.rows import Row
from core.statistics import Interval, bootstrap_mean, wilson
from core.store import ATTACKS, REPLAYS, RunFolder
from pipeline.matrices import labels_of
from pipeline.runs import replays_of
from transfer.predictors import Array, Predictor, Transfers, gap, predictions, transfers_of

RAW, GIVEN, LEANING = "raw", "given source success", "D"
PREDICTORS = (
    ("HRCI v2", "HRCI v2"),
    ("C_cos", "C_cos"),
    ("ASR fixed", "ASR fixed"),
    ("drift of R", "drift of R"),
    ("drift of H", "drift of H"),
    ("D", "D on harmful prompts"),
    ("over-refusal", "refused, pseudo_harmful"),
)
"""Name, and the measure of the target that it is."""


@dataclass(frozen=True)
class SparseTransfer:
    """Between the same checkpoints on the same behaviours: success as judged, and outcome D."""

    judged: Transfers
    d: Transfers


def transfers_in(run: RunFolder, rows: Sequence[Row]) -> SparseTransfer | None:
    """Transfer between the checkpoints of these rows; None where no prompts were made on them."""
    arms = {r["model"]: r["arm"] for r in rows}
    if not (run.path / ATTACKS).exists() or not (run.path / REPLAYS).exists():
        return None
    labels = labels_of(run)
    judged: dict[tuple[str, str, str], list[float]] = {}
    leaning: dict[tuple[str, str, str], list[float]] = {}
    for r in replays_of(run):
        known = r.source_model in arms and r.target_model in arms
        if known and labels.get(r.behaviour_id, HARMFUL) == HARMFUL and r.attack not in BASELINES:
            key = r.source_model, r.target_model, r.behaviour_id
            if r.jailbroken is not None:
                judged.setdefault(key, []).append(float(bool(r.jailbroken)))
            if r.d is not None:
                leaning.setdefault(key, []).append(r.d)
    if not judged:
        return None
    trainings = {r["model"]: f"{r['arm']} {r['method']} {r['seed']}" for r in rows}

    def array(values: dict[tuple[str, str, str], list[float]]) -> Transfers:
        means = {key: sum(own) / len(own) for key, own in values.items()}
        return transfers_of(means, list(arms), arms, trainings)

    return SparseTransfer(array(judged), array(leaning))


def matrix_rows(transfers: SparseTransfer) -> list[Row]:
    """One row per source and target that has prompts, with intervals over behaviours.

    TASR raw and given source success (Wilson's interval), and the mean D of the target before it
    answers (bootstrap).
    """
    judged, names = transfers.judged, transfers.judged.checkpoints
    measures = (
        ("tasr", judged.success, rate_interval),
        ("tasr_given_source", judged.given_source().success, rate_interval),
        ("d", transfers.d.success, bootstrap_mean),
    )
    rows = []
    for s, t in np.ndindex(len(names), len(names)):
        row: Row = {"source": names[s], "target": names[t]}
        for name, values, interval in measures:
            own = _known(values, s, t)
            row[name] = float(own.mean()) if len(own) else None
            row[f"{name}_interval"] = interval(own) if len(own) else None
        row["behaviours"] = len(_known(judged.success, s, t))
        if row["behaviours"]:
            rows.append(row)
    return rows


def _known(values: Array, source: int, target: int) -> Array:
    """(behaviour,) of one cell; behaviours that no prompt was sent for are left out."""
    if not values.shape[2]:
        return np.empty(0)
    own: Array = values[source, target]
    return own[~np.isnan(own)]


def rate_interval(values: Array) -> Interval:
    return wilson(float(values.sum()), len(values))


def prediction_rows(transfers: SparseTransfer, rows: Sequence[Row], seed: int) -> list[Row]:
    """How well numbers of the checkpoints predict transfer: TASR raw, given source success, D."""
    known = {(r["model"], r["measure"]): r["value"] for r in rows}
    judged = transfers.judged

    def of(measure: str) -> Array:
        return np.array([known.get((c, measure), np.nan) for c in judged.checkpoints])

    predictors = [Predictor(name, of(measure)) for name, measure in PREDICTORS]
    predictors.append(Predictor("HRCI gap", of("HRCI v2"), gap))
    found = []
    for name, of_kind in ((RAW, judged), (GIVEN, judged.given_source()), (LEANING, transfers.d)):
        own = predictions(of_kind, predictors, seed=seed)
        found += [row | {"of": name} for row in own]
    return found
