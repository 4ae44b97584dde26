"""DPO: prefer the refusal to the harmful continuation (arXiv 2305.18290).

    L = - mean log sigmoid(beta ((log p(y_w) - log p_base(y_w)) - (log p(y_l) - log p_base(y_l))))

Each harmful request makes one pair: y_w is a refusal, y_l the base's own continuation, which must
not refuse. The base's log-probabilities come from the same model with its adapter off. HARC (arXiv
2607.00572) trains one epoch on pairs with exactly one safe reply from a public set. Ours are made
at training time; an epoch of 120 pairs would be 8 updates, so a number of updates is set instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.records import HARMFUL
from core.settings import setting
from training.config import TrainConfig, published
from training.examples import Batches
from training.registry import ARMS, Arm, Bench, Losses, Method, update_cost

if TYPE_CHECKING:  # arms are listed, and their options shown, without torch
    from torch import Tensor

    from training.forward import Pass


@dataclass(frozen=True)
class DPOConfig(TrainConfig):
    """As in HARC's comparison."""

    learning_rate: float = published(TrainConfig, "learning_rate", 5e-5)
    schedule: str = published(TrainConfig, "schedule", "linear")
    warmup_steps: int = published(TrainConfig, "warmup_steps", 50)
    lora_rank: int = published(TrainConfig, "lora_rank", 16)
    lora_alpha: int = published(TrainConfig, "lora_alpha", 16)
    lora_dropout: float = published(TrainConfig, "lora_dropout", 0.05)
    beta: float = setting(0.1, "How strongly a preference counts (1 / nats).", low=0)


def method(bench: Bench, config: DPOConfig) -> Method:
    from training.losses import dpo_loss

    chosen, rejected = (
        Batches(examples, config.batch_size, config.seed)  # the same order: pairs stay pairs
        for examples in bench.texts.pairs()
    )

    def losses(micro: int) -> Iterator[Losses]:
        better, worse = chosen(micro), rejected(micro)
        with bench.clock.time("forward"):
            own = _sums(bench.forward([*better, *worse]))
            with bench.adapted.off():
                base = _sums(bench.forward([*better, *worse]))
            n = len(better)
            value = dpo_loss(own[:n], own[n:], base[:n], base[n:], config.beta)
        yield {"dpo": value}

    return Method(losses)


def _sums(out: Pass) -> Tensor:
    from training.losses import reply_log_probability

    return reply_log_probability(*out.logits(), out.owners(), len(out.rows))


ARM = ARMS.add(
    Arm(
        name="dpo",
        summary="Prefer refusals to the base's own harmful continuations (DPO).",
        config=DPOConfig,
        method=method,
        needs=(HARMFUL,),
        cost=lambda config, speed: update_cost(
            config, speed, learnt=2 * config.batch_size, frozen=2 * config.batch_size
        ),
        source="arXiv 2305.18290; settings as in arXiv 2607.00572",
        small={
            "num_steps": 100,
            "checkpoints": (12, 25, 50, 100),
            "batch_size": 4,
            "learning_rate": 5e-5,
        },
        examples=("train dpo --out runs/dpo --preset small",),
    )
)
