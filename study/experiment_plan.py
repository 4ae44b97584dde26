"""What an experiment will do, and how long each stage takes on this machine from nothing.

Counts come from the configs. Seconds are counts times rates that are measured on the reference: of
scoring, gradients and decoding (``pipeline/sweep/plan.py``), and of edited rows with outcome D
(``study/plan.py``). Other models are taken to be as fast. Attacks and replies that stop early take
less.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from attacks.gcg import ATTACK as GCG
from attacks.registry import Speed
from attacks.workbench import Workbench
from core.models import ModelHandle, OpenModel
from core.records import LABELS
from core.store import RunFolder
from pipeline.capability import INSTRUCTION_TOKENS, KL_TOKENS
from pipeline.evaluate import adaptive_config
from pipeline.sweep.config import SAMPLE
from pipeline.sweep.plan import PROMPT_TOKENS, calibrate
from study.experiment import Experiment
from study.measure import CLASSES, chosen_tests
from study.plan import Piece, plan, rates, trajectory_plan
from study.study import Study
from training.registry import ARMS

REPLY_TOKENS = 64
"""Of a reply of ``evaluate``, where it is not set."""


@dataclass(frozen=True)
class Stage:
    """One line: which step, on what, how often, how many seconds each."""

    step: str
    what: str
    count: int
    each: float

    @property
    def seconds(self) -> float:
        return self.count * self.each


@dataclass(frozen=True)
class Costs:
    """Seconds of one model, measured on the reference."""

    speed: Speed
    trajectory: float
    claims: float


def measured(e: Experiment, open_model: OpenModel = ModelHandle) -> Costs:
    """Rates of the reference here; nothing is kept."""
    with TemporaryDirectory() as folder, RunFolder(Path(folder)) as run:
        model = open_model(e.reference)
        speed = calibrate(model.loaded)
        study = Study(run, model, e.study)
        known = rates(study)
        inside = trajectory_plan(study, known, sweeps=e.options.sweeps)
        tests = chosen_tests([])
        decided = plan(study, tests, e.options.controls, len(CLASSES), known)
        model.release()

    def seconds(pieces: list[Piece]) -> float:
        return sum(piece.seconds for piece in pieces)

    return Costs(speed, seconds(inside), seconds(decided))


def stages(e: Experiment, costs: Costs) -> list[Stage]:
    """The experiment's stages in the order of the work."""
    speed = costs.speed
    rows = [
        Stage(
            "train",
            f"{t.name or t.arm}, seeds {', '.join(map(str, t.seeds))}",
            len(t.seeds),
            ARMS.get(t.arm).cost(t.config, speed),
        )
        for t in e.trainings
    ]
    models = 1 + len(e.checkpoints())
    sources = len(e.checkpoints(e.sources, first=True))

    def attack(attacks: str, count: int) -> float:
        return sum(a.cost(c, count, speed) for a, c in getattr(e, attacks).values())

    fixed, made = e.fixed_behaviours, e.source_behaviours
    names = {name: ", ".join(getattr(e, name)) or "none" for name in ("attacks", "transfer")}
    rows += [
        Stage("attack", f"{names['attacks']} on {e.reference}", 1, attack("attacks", fixed)),
        Stage("attack", f"{names['transfer']} on a source", sources, attack("transfer", made)),
        Stage("evaluate", "a checkpoint or the reference", models, evaluation(e, speed, sources)),
        Stage("trajectory", "a checkpoint or the reference", models, costs.trajectory),
        Stage("claims", "a checkpoint", len(e.checkpoints(e.claims)), costs.claims),
    ]
    return rows


def evaluation(e: Experiment, speed: Speed, sources: int) -> float:
    """Seconds of ``evaluate`` on one model."""
    config = e.evaluate
    tokens = config.max_new_tokens or REPLY_TOKENS
    bench = Workbench(behaviours=[SAMPLE])
    keys = [key for a, c in e.attacks.values() for key in a.keys_of(c, SAMPLE, bench)]
    prompts = len({name for name, _ in keys}) * min(config.per_class, e.fixed_behaviours)
    prompts += sources * e.source_behaviours * len(e.transfer)
    replies = [
        (config.plain * len(LABELS) + prompts + 3 * config.adaptive, tokens),
        (config.instructions, INSTRUCTION_TOKENS),
        (config.kl_prompts, KL_TOKENS),
    ]
    answered = sum(
        -(-n // speed.batch) * new * speed.decoding_step + n * PROMPT_TOKENS * speed.token
        for n, new in replies
    )
    return answered + GCG.cost(adaptive_config(config), config.adaptive, speed)
