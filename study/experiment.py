"""The whole experiment of SG and HARC from one file: train, attack, evaluate, look inside, decide.

run = "runs/safety_geometry"
reference = "embedded"                # base of all trainings, source of fixed attacks
fixed_behaviours = 8                  # that fixed attacks are made for
source_behaviours = 6                 # that each source is attacked on

[[trainings]]                         # any arm of the registry; other keys are its settings
arm = "sft"
seeds = [0, 1]
num_steps = 200
checkpoints = [10, 25, 50, 100]

[attacks.templates]                   # fixed attacks, made on the reference and replayed on all
classes = ["persona", "persuasion"]
[transfer.gcg]                        # made on every source, replayed on all
num_steps = 20
[sources]                             # arm -> steps, of the first seed
sft = [200]
[evaluate]                            # the budget of ``evaluate``
[claims]                              # arm -> steps, of all seeds: claims about one model
harc = [60]
[anchors]                             # arm -> steps, of all seeds: aligned models to be reopened
harc = [60]
[options]                             # sweeps = true, controls = 199

1. Train every arm and seed.
2. Make fixed attacks on the reference, and source attacks on chosen checkpoints.
3. Evaluate every checkpoint on plain requests, fixed and source attacks, and adaptive GCG.
4. ``trajectory`` over all checkpoints, with the claims about trainings.
5. ``claims`` on chosen checkpoints.

Every step is a command of its own that goes on where it was stopped, so this one does too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from core.errors import AttackPlaneError
from core.files import require_possible
from core.models import ModelHandle, OpenModel
from core.records import HARMFUL
from core.settings import check_settings, setting
from core.specs import FORMS, parse_spec
from evaluation.behaviours import DEMONSTRATION, load_held_out, spread
from evaluation.budget import EvaluateConfig
from evaluation.judges import DEFAULT_JUDGE
from pipeline.campaign import Plan, campaign
from pipeline.evaluate import EvaluateResult, Evaluation, evaluate
from pipeline.toml_file import AttackChoice
from pipeline.train import train_arm
from study.config import StudyConfig
from study.measure import ClaimsResult
from study.measure import claims as measure_claims
from study.trajectory import TrajectoryResult, trajectory
from training.registry import ARMS

Steps = Mapping[str, tuple[int, ...]]
"""Arm -> steps of its checkpoints."""


@dataclass(frozen=True)
class TrainingChoice:
    """One arm with its settings, once for each seed.

    Attributes:
        name: of its folders, ``NAME-SEED`` [default: the arm].
    """

    arm: str
    config: Any
    seeds: tuple[int, ...] = (0,)
    name: str = ""

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(getattr(self.config, "saved_steps", ()))


@dataclass(frozen=True)
class Options:
    """Of the last two stages."""

    sweeps: bool = setting(False, "Steer every checkpoint too.")
    controls: int = setting(199, "Of claims, of each kind.", low=2)
    prompts: int = setting(24, "Held-out prompts of each label.", low=4)
    resamples: int = setting(200, "Bootstrap samples and null draws.", low=20)

    def __post_init__(self) -> None:
        check_settings(self, "options")


@dataclass(frozen=True)
class Experiment:
    run: str
    trainings: tuple[TrainingChoice, ...]
    reference: str = "embedded"
    behaviours: str = DEMONSTRATION
    fixed_behaviours: int = setting(8, "That fixed attacks are made for.", low=1)
    source_behaviours: int = setting(6, "That each source is attacked on.", low=1)
    attacks: Mapping[str, AttackChoice] = field(default_factory=dict)
    transfer: Mapping[str, AttackChoice] = field(default_factory=dict)
    sources: Steps = field(default_factory=dict)
    claims: Steps = field(default_factory=dict)
    anchors: Steps = field(default_factory=dict)
    evaluate: EvaluateConfig = EvaluateConfig()
    options: Options = Options()

    def __post_init__(self) -> None:
        check_settings(self, "experiment")
        if not self.run.strip():
            raise AttackPlaneError("an experiment needs a run folder", where="run")
        if not self.reference.strip():
            raise AttackPlaneError(
                "an experiment needs a reference", where="reference", remedy=f"forms: {FORMS}"
            )
        require_possible(self.folder)

    @property
    def folder(self) -> Path:
        return Path(self.run)

    @property
    def base(self) -> str:
        """What is trained: the reference as its folder has it, whatever it is loaded as later."""
        spec = parse_spec(self.reference)
        return self.reference if spec.load else self.reference.partition("?")[0]

    @property
    def study(self) -> StudyConfig:
        return StudyConfig(
            contrast=self.behaviours,
            held_out=self.behaviours,
            held_out_prompts=self.options.prompts,
            resamples=self.options.resamples,
        )

    def out(self, training: TrainingChoice, seed: int) -> Path:
        return self.folder / "training" / f"{training.name or training.arm}-{seed}"

    def checkpoints(self, chosen: Steps | None = None, *, first: bool = False) -> list[str]:
        """Specs of the checkpoints, all or those of chosen names and steps, in training order.

        ``first``: of the first seed alone.
        """
        specs = []
        for training in self.trainings:
            name = training.name or training.arm
            steps = training.steps if chosen is None else chosen.get(name, ())
            for seed in training.seeds[: 1 if first else None]:
                base, mark, query = self.reference.partition("?")
                out = self.out(training, seed)
                folders = [f"step-{step}" for step in steps]
                if chosen is None and ARMS.get(training.arm).fit:
                    folders = [training.arm]
                specs += [f"{base}+{out}/{folder}{mark}{query}" for folder in folders]
        return specs


# --- the work -------------------------------------------------------------------------------------
@dataclass
class ExperimentResult:
    """What the stages found; seconds by stage of this command."""

    models: list[str]
    evaluation: EvaluateResult
    trajectory: TrajectoryResult
    claims: ClaimsResult | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def experiment_run(
    experiment: Experiment,
    *,
    open_model: OpenModel = ModelHandle,
    on_step: Callable[[str], None] = lambda step: None,
) -> ExperimentResult:
    """Do what is missing of the experiment."""
    e = experiment
    seconds: dict[str, float] = {}

    def timed(step: str, work: Callable[[], Any]) -> Any:
        on_step(step)
        start = time.monotonic()
        found = work()
        seconds[step] = seconds.get(step, 0.0) + time.monotonic() - start
        return found

    for training in e.trainings:
        for seed in training.seeds:
            timed("train", partial(_train, e, training, seed))
    models = [e.reference, *e.checkpoints()]
    held_out = [b for b in load_held_out(e.behaviours) if b.label == HARMFUL and b.target_string]
    main, fixed = e.folder / "checkpoints", e.folder / "fixed"
    if e.attacks:
        chosen = spread(held_out, e.fixed_behaviours)
        handle = open_model(e.reference)
        timed("attack", partial(_attack, fixed, chosen, e.attacks, handle, open_model))
    for spec in e.checkpoints(e.sources, first=True):
        chosen = spread(held_out, e.source_behaviours)
        handle = open_model(spec)
        timed("attack", partial(_attack, main, chosen, e.transfer, handle, open_model))
    asked = Evaluation(
        behaviours=e.behaviours,
        attacks=(fixed,) if e.attacks else (),
        judges=(DEFAULT_JUDGE,),
        config=e.evaluate,
    )
    evaluated = timed(
        "evaluate",
        lambda: evaluate(main, models, asked, base=e.reference, open_model=open_model),
    )
    inside = timed(
        "trajectory",
        lambda: trajectory(
            main,
            e.reference,
            models[1:],
            e.study,
            sweeps=e.options.sweeps,
            anchors=e.checkpoints(e.anchors),
            open_model=open_model,
        ),
    )
    result = ExperimentResult(models, evaluated, inside, seconds=seconds)
    if e.checkpoints(e.claims):
        result.claims = timed("claims", partial(_claims, e, open_model))
    result.notes = [*evaluated.notes, *inside.notes]
    return result


def _claims(e: Experiment, open_model: OpenModel) -> ClaimsResult:
    return measure_claims(
        e.folder / "claims",
        e.checkpoints(e.claims),
        [],
        e.study,
        controls=e.options.controls,
        open_model=open_model,
    )


def _train(e: Experiment, training: TrainingChoice, seed: int) -> None:
    arm = ARMS.get(training.arm)
    config = replace(training.config, seed=seed)
    train_arm(arm.name, e.base, e.out(training, seed), config, e.behaviours)


def _attack(
    folder: Path,
    behaviours: Sequence[Any],
    attacks: Mapping[str, AttackChoice],
    handle: ModelHandle,
    open_model: OpenModel,
) -> None:
    """The attacks on one model. No baselines: every prompt is replayed on every model."""
    plans = [
        Plan(attack, config, (handle,) if attack.sources != "none" else ())
        for attack, config in attacks.values()
    ]
    campaign(folder, behaviours, plans, open_model=open_model)
