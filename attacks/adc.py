"""ADC as an attack: its settings, and one suffix per request.

The search itself is ``attacks/adc_search.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from attacks.gcg import TARGET_TOKENS, TEMPLATE_TOKENS, baselines
from attacks.registry import ATTACKS, PAPER, QUICK, Attack, Speed
from attacks.result import AttackResult, Search, suffix_result
from attacks.slot import SuffixConfig, slot_for
from attacks.workbench import Progress, Task, Workbench
from core.records import stream_seed
from core.settings import check_settings, setting

if TYPE_CHECKING:  # attacks are listed, and their options shown, without torch
    from attacks.adc_search import ADCResult

NAME = "adc"
BACKWARD = 3
"""A pass with gradients, in passes without."""


@dataclass(frozen=True)
class ADCConfig(SuffixConfig):
    """The paper's settings."""

    num_steps: int = setting(5000, "Optimiser steps.", flag="--steps", low=1)
    starts: int = setting(16, "Suffixes optimised side by side.", low=1, high=10**4)
    learning_rate: float = setting(10.0, "Of the descent.", low=0)
    momentum: float = setting(0.99, "Of the descent.", low=0, below=1)
    read_every: int = setting(5, "Steps between exact scores of the suffixes.", low=1)
    stop_on_match: bool = setting(
        True, "Stop at a suffix after which greedy decoding gives the target, as in the paper."
    )

    def __post_init__(self) -> None:
        check_settings(self, "adc")


def run(bench: Workbench, task: Task, config: ADCConfig) -> Iterator[AttackResult]:
    """One suffix for one request."""
    from attacks.adc_search import run_adc
    from attacks.objective import TargetLoss

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
