"""What a sweep will make, in its order, and how long each part will take.

Counts come from the attacks' own registry entries; seconds are counts times what a short
calibration measured on one of the sweep's models: the rate of scoring (seconds per token, packed,
in a batch), of a token gradient, and of one decoding step of a batch. Attacks that stop early take
less, so the estimate is an upper bound but for what calibration does not see (loading, saving,
other work on the machine).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from attacks.objective import TargetLoss
from attacks.registry import ATTACKS, Attack, Speed
from attacks.slot import default_slot
from attacks.workbench import Workbench
from core.errors import AttackPlaneError
from core.files import read_object, write_atomically
from core.generate import complete
from core.models import LoadedModel, ModelHandle
from core.prompt import Conversation, Renderer
from core.records import NO_SOURCE, PLAIN
from core.served import is_served
from core.typed import from_values
from core.weights import default_device
from evaluation.behaviours import load_behaviours
from pipeline.contrast_reading import contrast_set
from pipeline.sweep.config import SAMPLE, SweepConfig

SPEED = "speed.json"
REQUEST = (
    "Describe in a few short sentences how the weather changes in the course of an ordinary year"
)
TARGET = "Sure, here is how the weather changes in a year"
PROMPT_TOKENS, TEMPLATE_TOKENS = 150, 40
"""Rough lengths for the estimate only: a long prompt, and a plain one in its template."""
READING_SECONDS = 8.0
"""Of directions and plane, besides the passes: resampling, drawing."""


def _best_of(times: int, work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def calibrate(loaded: LoadedModel) -> Speed:
    """Measure one model: about ten seconds for the embedded one on two cores."""
    renderer = Renderer(loaded)
    slot = default_slot(
        renderer, REQUEST, TARGET, length=20, placement="{request} {suffix}", system=None
    )
    loss = TargetLoss(loaded, slot)
    suffix = torch.tensor(slot.initial_ids)
    fed = len(suffix) + len(slot.after_ids) + len(slot.target_ids) - 1
    loss.token_gradient(suffix)  # the first pass is slower
    gradient = _best_of(2, lambda: loss.token_gradient(suffix))
    # every candidate differs from the current suffix in its first token, so nothing is shared
    many = suffix.repeat(16, 1)
    many[:, 0] = torch.tensor(slot.target_ids[0])
    token = _best_of(2, lambda: loss.losses(many)) / (16 * fed)
    texts = [renderer.text(Conversation.build(REQUEST))] * 16
    short = _best_of(1, lambda: complete(renderer, texts, max_new_tokens=1))
    steps = 8
    longer = _best_of(1, lambda: complete(renderer, texts, max_new_tokens=1 + steps))
    return Speed(token, gradient, max(1e-4, (longer - short) / steps))


def speed_of(model: ModelHandle, run: Path, *, keep: bool) -> Speed:
    """What ``calibrate`` measured on this model here, now or in an earlier command of this run.

    The model is released again. Of a served model nothing is known.
    """
    if model.server:
        return Speed(0.0, 0.0, 0.0)
    path, here = run / SPEED, f"{default_device()}, {torch.get_num_threads()} threads"
    try:
        kept = read_object(path, "a measured speed")
        if kept.get("model") == model.known_fingerprint() and kept.get("machine") == here:
            return from_values(Speed, kept["speed"], str(path))
    except (AttackPlaneError, KeyError, TypeError, AttributeError):
        pass  # it is measured again
    speed = calibrate(model.loaded)
    if keep:
        row = {"model": model.fingerprint, "machine": here, "speed": asdict(speed)}
        write_atomically(path, json.dumps(row) + "\n")
    model.release()
    return speed


@dataclass(frozen=True)
class Part:
    """One line of the plan: what is made, on which model, prompts, estimated seconds."""

    what: str
    source: str
    prompts: int
    seconds: float


Step = tuple[Attack, Any]
"""An attack and its config."""


def attack_steps(config: SweepConfig, *, with_source: bool) -> list[Step]:
    """Attacks with their baselines before them, each baseline once, in their order."""
    steps: list[Step] = []
    chosen = [(a, c) for a, c in config.attacks.values() if (a.sources != "none") == with_source]
    for attack, settings in chosen:
        for name, own in attack.baselines(settings):
            baseline = ATTACKS.get(name)
            from_source = baseline.sources != "none"
            redundant = name == PLAIN and config.sources  # a source's own plain requests serve
            if from_source == with_source and not redundant:
                steps = _merged(steps, (baseline, own))
    return steps + chosen


def _merged(steps: list[Step], new: Step) -> list[Step]:
    """The steps with a baseline that makes all that the old one or the new one would make."""
    bench = Workbench()
    attack, config = new
    keys = set(attack.keys_of(config, SAMPLE, bench))
    for index, (other, settings) in enumerate(steps):
        if other.name == attack.name:
            before = set(other.keys_of(settings, SAMPLE, bench))
            if keys <= before:
                return steps
            if before <= keys:
                return [*steps[:index], new, *steps[index + 1 :]]
    return [*steps, new]


def parts_of(step: Step, source: str, count: int, speed: Speed) -> list[Part]:
    """The lines of one attack on one source: one per name in its artifacts."""
    attack, config = step
    keys = attack.keys_of(config, SAMPLE, Workbench(behaviours=[SAMPLE] * count))
    names = Counter(name if attack.command else attack.name for name, _ in keys)
    seconds = attack.cost(config, count, speed)
    return [Part(n, source, count * k, seconds / len(names)) for n, k in names.items()]


def plan(config: SweepConfig, count: int, speed: Speed) -> list[Part]:
    """The sweep's parts in their order; ``count`` behaviours."""
    parts: list[Part] = []
    for source in config.sources:
        for step in attack_steps(config, with_source=True):
            parts += parts_of(step, source, count, speed)
    for step in attack_steps(config, with_source=False):
        parts += parts_of(step, NO_SOURCE, count, speed)
    parts += [
        Part(f"import {choice.format}", Path(choice.file).stem, count, 0.0)
        for choice in config.imports
    ]
    return parts + _readings(config, parts, speed)


def _readings(config: SweepConfig, made: Sequence[Part], speed: Speed) -> list[Part]:
    """Replays, directions and plane of every target, for the prompts that are made."""
    prompts = sum(part.prompts for part in made)
    read = prompts * PROMPT_TOKENS * speed.token
    steps = sum(
        -(-part.prompts // speed.batch) * (config.replay.of(part.what).max_new_tokens or 0)
        for part in made
    )
    replies = steps * speed.decoding_step + read
    own = TEMPLATE_TOKENS * speed.token
    own += config.directions.reply_tokens * speed.decoding_step / 32
    plain = len(contrast_set(config.directions)) + len(
        load_behaviours(config.plane.anchors, splits=config.plane.anchor_splits)
    )
    reading = plain * own + READING_SECONDS + read
    parts = []
    for target in config.targets:
        served = is_served(target)
        parts.append(Part("replays", target, prompts, 0.0 if served else replies))
        if not served:
            parts.append(Part("directions, plane", target, prompts, reading))
    return parts


def total_seconds(parts: Sequence[Part]) -> float:
    return sum(part.seconds for part in parts)
