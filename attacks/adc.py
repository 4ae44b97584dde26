"""ADC as an attack: one suffix per request. The search itself is ``attacks/adc_search.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from attacks.adc_search import ADCConfig, ADCResult, run_adc
from attacks.gcg import TARGET_TOKENS, TEMPLATE_TOKENS, baselines
from attacks.objective import TargetLoss
from attacks.registry import ATTACKS, PAPER, QUICK, Attack, Speed
from attacks.result import AttackResult, Search, suffix_result
from attacks.slot import slot_for
from attacks.workbench import Progress, Task, Workbench
from core.records import stream_seed

NAME = "adc"
BACKWARD = 3
"""A pass with gradients, in passes without."""


def run(bench: Workbench, task: Task, config: ADCConfig) -> Iterator[AttackResult]:
    """One suffix for one request."""
    slot = slot_for(bench.renderer, task.behaviour, config)

    def on_step(step: int, best: ADCResult) -> None:
        task.on_step(Progress(step, config.num_steps, best.losses[-1], best.loss))

    found = run_adc(
        TargetLoss(bench.source, slot),
        slot,
        config,
        bench.allowed(ascii_only=config.ascii_only),
        seed=stream_seed(bench.seed, task.behaviour.behaviour_id, NAME),
        on_step=on_step,
    )
    search = Search(found.losses, found.best_reading)
    result = suffix_result(
        slot, task.behaviour, NAME, found.ids, system=config.system_prompt, search=search
    )
    scoring = {"operations": found.operations}
    yield replace(result, provenance=result.provenance | {"scoring": scoring})


def cost(config: ADCConfig, count: int, speed: Speed) -> float:
    fed = config.suffix_length + TEMPLATE_TOKENS / 4 + TARGET_TOKENS
    passes = BACKWARD + 1 / config.read_every
    return count * config.num_steps * config.starts * passes * fed * speed.token


ATTACK = ATTACKS.add(
    Attack(
        name=NAME,
        summary="Optimise suffixes as distributions over tokens that grow sparse (ADC).",
        config=ADCConfig,
        run=run,
        cost=cost,
        presets={PAPER: {}, QUICK: {"num_steps": 60, "starts": 4}},
        sources="one",
        needs_target=True,
        baselines=baselines,
        steps=lambda config: config.num_steps,
        unit="step",
        examples=("adc", "adc --model ORG/NAME --limit 8 --preset paper"),
    )
)
