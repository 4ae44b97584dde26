"""The whole experiment, top to bottom, on the embedded model.

1. Train a refusing LoRA with four checkpoints. 2. Attack the last one, which refuses selectively,
   with GCG, its baselines beside it. 3. Replay everything on the base and on every checkpoint, and
   plain requests of every label, so that the table shows whom each checkpoint refuses. 4. Estimate
   directions on each. 5. Project, export and draw.

The checkpoints are trained on the training split, directions are estimated on the validation split,
and everything else is measured on the test split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attacks.gcg import ATTACK, GCGConfig
from core.models import ModelHandle, OpenModel
from core.readings import Directions
from core.records import LABELS
from core.store import ATTACKS, REPLAYS
from evaluation.behaviours import HELD_OUT_SPLITS, load_behaviours, spread
from evaluation.judges import DEFAULT_JUDGES
from geometry.directions import ESTIMATORS
from pipeline.campaign import CampaignResult, Plan, baseline_plans, campaign
from pipeline.contrast_reading import DirectionsConfig
from pipeline.directions import directions
from pipeline.matrices import MATRIX
from pipeline.plane import PlaneConfig, plane
from pipeline.train import train_arm
from pipeline.transfer import transfer
from training.refusal import ARM as REFUSAL
from training.refusal import RefusalConfig
from training.registry import SMALL_PRESET, TrainResult
from transfer.matrix import Cell
from transfer.replay import ReplayConfig

MODEL = "embedded"


@dataclass(frozen=True)
class DemoConfig:
    """The demo's settings: the whole pipeline in about 15 minutes on two CPU cores."""

    behaviours: int = 6
    gcg: GCGConfig = GCGConfig(num_steps=20, search_width=32, topk=64)
    plain: int = 12
    """Plain requests of each label."""
    training: RefusalConfig = REFUSAL.make_config({}, preset=SMALL_PRESET)
    replay: ReplayConfig = ReplayConfig(max_new_tokens=32)
    directions: DirectionsConfig = DirectionsConfig(splits=("validation",))


@dataclass
class DemoResult:
    """What each stage gave, and the files of the run."""

    training: TrainResult
    attacks: CampaignResult
    matrix: list[Cell]
    directions: list[Directions]
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def demo(
    path: Path,
    config: DemoConfig = DemoConfig(),
    *,
    open_model: OpenModel = ModelHandle,
    on_stage: Callable[[str], None] = lambda title: None,
    on_result: Callable[[Any], None] = lambda result: None,
) -> DemoResult:
    """Run everything; ``on_stage`` is told what begins, ``on_result`` what a stage gave."""
    on_stage("1/5 train: LoRA refusal fine-tuning of the embedded model")
    trained = train_arm(REFUSAL.name, MODEL, path / "checkpoints", config.training)
    on_result(trained)
    targets = [MODEL, *(f"{MODEL}+{c}" for c in trained.checkpoints)]
    source = targets[-1]

    on_stage(f"2/5 attack: GCG on {source}")
    test = load_behaviours(splits=HELD_OUT_SPLITS)
    labelled = {label: [b for b in test if b.label == label] for label in LABELS}
    chosen = spread(labelled["harmful"], config.behaviours)
    plan = Plan(ATTACK, config.gcg, (open_model(source),))
    attacked = campaign(path, chosen, [*baseline_plans(plan), plan], open_model=open_model)
    on_result(attacked)
    del plan  # and its model with what the search has made of it

    on_stage("3/5 transfer: frozen prompts on the base and every checkpoint")
    replayed = transfer(
        path,
        targets,
        DEFAULT_JUDGES,
        config.replay,
        behaviours=[b for rows in labelled.values() for b in spread(rows, config.plain)],
        open_model=open_model,
    )
    on_result(replayed)
    on_stage("4/5 directions of every target")
    estimated = directions(path, targets, ESTIMATORS, config.directions, open_model=open_model)
    on_result(estimated)
    on_stage("5/5 plane: project, export, draw")
    drawn = plane(path, targets, PlaneConfig(), open_model=open_model)
    on_result(drawn)
    written = [path / ATTACKS, path / REPLAYS, path / MATRIX, path / "directions", *drawn.files]
    notes = [*attacked.notes, *replayed.notes, *estimated.notes, *drawn.notes]
    return DemoResult(trained, attacked, replayed.cells, estimated.directions, written, notes)
