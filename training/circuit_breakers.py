"""Circuit breakers: turn the states of harmful text away, keep all others (arXiv 2406.04313).

    L = a (t / 2T) moved + a (1 - t / 2T) rerouted        t of T updates done

    moved     mean ||h' - h||_2 over all layers and tokens of ordinary sequences
    rerouted  mean relu(cos(h', h)) over chosen layers and tokens of harmful requests with their
              continuations

h is the base's residual stream, from the same model with its adapter off. The adapter reaches up to
the last chosen layer. At the start h' = h, where both gradients vanish: the first updates follow
rounding noise, which Adam scales up, here as in the official code. With a warm-up the first term
catches the states before they have left (docs/lab-log.md, 2026-11-28). Published: layers 10 and 20
of 32, a = 10, T = 150 (so that the divisor is 300).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.records import HARMFUL, HARMLESS, PSEUDO_HARMFUL
from core.settings import setting
from training.config import published
from training.examples import Batches
from training.registry import ARMS, Arm, Bench, Losses, Method, update_cost
from training.states import StatesConfig, units

if TYPE_CHECKING:  # arms are listed, and their options shown, without torch
    from torch import Tensor

DEPTHS = (10 / 32, 20 / 32)
"""Of the chosen layers, as shares of the depth."""


@dataclass(frozen=True)
class CBConfig(StatesConfig):
    """The official code's."""

    num_steps: int = published(StatesConfig, "num_steps", 150)
    learning_rate: float = published(StatesConfig, "learning_rate", 1e-4)
    schedule: str = published(StatesConfig, "schedule", "constant")
    lora_rank: int = published(StatesConfig, "lora_rank", 16)
    lora_dropout: float = published(StatesConfig, "lora_dropout", 0.05)
    all_linear: bool = published(StatesConfig, "all_linear", True)
    strength: float = setting(10.0, "a, of both terms (5 for Mistral).", low=0)


def chosen_layers(n_layers: int) -> list[int]:
    """Residual layers whose harmful states are turned away."""
    return sorted({max(1, round(depth * n_layers)) for depth in DEPTHS})


def coefficients(strength: float, step: int, num_steps: int) -> tuple[float, float]:
    """(retain, reroute) weights of an update, counted from 0."""
    share = step / (2 * num_steps)
    return strength * share, strength * (1 - share)


def method(bench: Bench, config: CBConfig) -> Method:
    from training.losses import moved, rerouted

    loaded = bench.adapted.loaded
    harmful = Batches(bench.texts.continuations(), config.batch_size, config.seed)
    ordinary = bench.texts.ordinary(opened=config.opened)
    retained = Batches(ordinary, config.batch_size, config.seed)
    layers, every = chosen_layers(loaded.n_layers), list(range(loaded.n_layers + 1))
    unit = units(bench, ordinary, every, relative=config.relative)

    def states(rows: Batches, micro: int, which: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        examples = rows(micro)
        out = bench.forward(examples, which)
        with bench.adapted.off():
            base = bench.forward(examples, which).all_residuals(which)
        return out.all_residuals(which), base, out.weight

    def losses(micro: int) -> Iterator[Losses]:
        retain, reroute = coefficients(
            config.strength, micro // config.accumulation, config.num_steps
        )
        with bench.clock.time("forward"):
            tuned, base, weight = states(retained, micro, every)
            kept = retain * moved(tuned / unit, base / unit, weight)
        yield {"retain": kept}
        with bench.clock.time("forward"):
            turned = reroute * rerouted(*states(harmful, micro, layers))
        yield {"reroute": turned}

    return Method(losses)


ARM = ARMS.add(
    Arm(
        name="cb",
        summary="Turn the inner states of harmful text away from the base's (circuit breakers).",
        config=CBConfig,
        method=method,
        needs=(HARMFUL, HARMLESS, PSEUDO_HARMFUL),
        cost=lambda config, speed: update_cost(
            config, speed, learnt=2 * config.batch_size, frozen=2 * config.batch_size
        ),
        source="arXiv 2406.04313 and its official code",
        blocks=lambda config, n_layers: range(max(chosen_layers(n_layers))),
        small={
            "batch_size": 4,
            "learning_rate": 2e-3,
            "warmup_steps": 0,
            "relative": True,
            "opened": True,
        },
        examples=("train cb --out runs/cb --preset small",),
    )
)
