"""RepBend: bend the states of unsafe text away and together, hold the safe ones (arXiv 2504.01550).

    L = a moved(safe) - b moved(unsafe) + g gathered(unsafe) + e KL(safe)

    moved     mean ||h' - h||_2 over tokens and layers from 20 of 32 on; the norms are not squared
    gathered  mean over i != j of 1 - cos(h_i, h_j) at the unsafe prompts' last token: they become
              alike
    KL        4 KL(base || tuned) at temperature 2, mean over tokens of ordinary replies (the
              official code sums over tokens and divides by sequences, so its KL weighs more)

Safe sequences are ordinary requests with ordinary replies, unsafe ones harmful requests with their
continuations. h is the base's, from the same model with its adapter off. The second term has no
lower bound: a high learning rate breaks the model.
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

    from training.forward import Pass

DEPTH = 20 / 32
"""Share of the depth from which on layers count."""
TEMPERATURE = 2.0


@dataclass(frozen=True)
class RepBendConfig(StatesConfig):
    """The official code's."""

    num_steps: int = published(StatesConfig, "num_steps", 450)
    learning_rate: float = published(StatesConfig, "learning_rate", 1e-5)
    lora_rank: int = published(StatesConfig, "lora_rank", 16)
    lora_dropout: float = published(StatesConfig, "lora_dropout", 0.05)
    all_linear: bool = published(StatesConfig, "all_linear", True)
    safe_weight: float = setting(0.5, "a, of how far safe states move.", low=0)
    unsafe_weight: float = setting(0.5, "b, of how far unsafe states move, which is raised.", low=0)
    gather_weight: float = setting(0.1, "g, of how unlike unsafe states are.", low=0)
    kl_weight: float = setting(0.3, "e, of the KL term.", low=0)


def method(bench: Bench, config: RepBendConfig) -> Method:
    import torch

    from training.losses import gathered, kl_loss, moved

    loaded = bench.adapted.loaded
    unsafe = Batches(bench.texts.continuations(), config.batch_size, config.seed)
    ordinary = bench.texts.ordinary(opened=config.opened)
    safe = Batches(ordinary, config.batch_size, config.seed)
    layers = list(range(max(1, round(DEPTH * loaded.n_layers)), loaded.n_layers + 1))
    unit = units(bench, ordinary, layers, relative=config.relative)

    def distance(out: Pass, base: Pass) -> Tensor:
        tuned, before = (o.all_residuals(layers) / unit for o in (out, base))
        return moved(tuned, before, out.weight)

    def losses(micro: int) -> Iterator[Losses]:
        rows = safe(micro)
        with bench.clock.time("forward"):
            out = bench.forward(rows, layers)
            logits, labels = out.logits()
            with bench.adapted.off():
                base = bench.forward(rows, layers)
                before = base.logits()[0]
            held = distance(out, base)
            kl = kl_loss(before, logits, labels, TEMPERATURE)
        yield {"safe": config.safe_weight * held, "kl": config.kl_weight * kl}
        rows = unsafe(micro)
        with bench.clock.time("forward"):
            out = bench.forward(rows, layers)
            with bench.adapted.off():
                base = bench.forward(rows, layers)
            bent = distance(out, base)
            last, which = [row.t_post_inst for row in rows], range(len(rows))
            ends = torch.stack([out.residual(layer, which, last) for layer in layers])
        yield {
            "unsafe": -config.unsafe_weight * bent,
            "gather": config.gather_weight * gathered(ends),
        }

    return Method(losses)


ARM = ARMS.add(
    Arm(
        name="repbend",
        summary="Bend the inner states of unsafe text away and together (RepBend).",
        config=RepBendConfig,
        method=method,
        needs=(HARMFUL, HARMLESS, PSEUDO_HARMFUL),
        cost=lambda config, speed: update_cost(
            config, speed, learnt=2 * config.batch_size, frozen=2 * config.batch_size
        ),
        source="arXiv 2504.01550 and its official code",
        small={"batch_size": 4, "learning_rate": 1e-4, "relative": True, "opened": True},
        examples=("train repbend --out runs/repbend --preset small",),
    )
)
