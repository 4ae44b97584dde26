"""Transfer between the checkpoints of a run, and which of their numbers predict it.

Prompts that were optimised on a checkpoint and replayed on others make the matrix: as many sources
and targets as the run has. What was not sent is missing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core.records import BASELINES, HARMFUL
from core.rows import Row
from core.store import ATTACKS, REPLAYS, RunFolder
from pipeline.runs import replays_of
from pipeline.transfer import labels_of
from transfer.predictors import Predictor, Transfers, gap, predictions, transfers_of

GIVEN = "given source success"
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


def transfers_in(run: RunFolder, rows: Sequence[Row]) -> Transfers | None:
    """Success between the checkpoints of these rows; None where no prompts were made on them."""
    arms = {r["model"]: r["arm"] for r in rows}
    if not (run.path / ATTACKS).exists() or not (run.path / REPLAYS).exists():
        return None
    labels = labels_of(run)
    cells: dict[tuple[str, str, str], list[float]] = {}
    for r in replays_of(run):
        known = r.source_model in arms and r.target_model in arms and r.jailbroken is not None
        harmful = labels.get(r.behaviour_id, HARMFUL) == HARMFUL
        if known and harmful and r.attack not in BASELINES:
            key = r.source_model, r.target_model, r.behaviour_id
            cells.setdefault(key, []).append(float(bool(r.jailbroken)))
    if not cells:
        return None
    success = {key: sum(values) / len(values) for key, values in cells.items()}
    trainings = {r["model"]: f"{r['arm']} {r['method']} {r['seed']}" for r in rows}
    return transfers_of(success, list(arms), arms, trainings)


def matrix_rows(transfers: Transfers) -> list[Row]:
    """One row per source and target that has prompts: TASR raw, and given source success."""
    raw, given = transfers.tasr(), transfers.given_source().tasr()
    names = transfers.checkpoints
    return [
        {
            "source": names[s],
            "target": names[t],
            "tasr": float(raw[s, t]),
            "tasr_given_source": None if np.isnan(given[s, t]) else float(given[s, t]),
            "behaviours": int((~np.isnan(transfers.success[s, t])).sum()),
        }
        for s in range(len(names))
        for t in range(len(names))
        if not np.isnan(raw[s, t])
    ]


def prediction_rows(transfers: Transfers, rows: Sequence[Row], seed: int) -> list[Row]:
    """How well numbers of the checkpoints predict TASR, raw and given source success."""
    values = {(r["model"], r["measure"]): r["value"] for r in rows}

    def of(measure: str) -> np.ndarray:
        return np.array([values.get((c, measure), np.nan) for c in transfers.checkpoints])

    predictors = [Predictor(name, of(measure)) for name, measure in PREDICTORS]
    predictors.append(Predictor("HRCI gap", of("HRCI v2"), gap))
    raw = [r | {"of": "raw"} for r in predictions(transfers, predictors, seed=seed)]
    given = predictions(transfers.given_source(), predictors, seed=seed)
    return raw + [r | {"of": GIVEN} for r in given]
