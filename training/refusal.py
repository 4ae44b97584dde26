"""Refusal tuning: harmful requests get refusals, ordinary ones the base model's own replies.

    loss = mean over reply tokens of the batch of -log p(token | prompt, reply so far)

The ordinary replies are the base's own, so that the tuning moves nothing but refusal. No paper: it
is how this project makes aligned checkpoints of a small model. Settings of the optimiser follow RG
(arXiv 2604.27019, its SFT arm).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from core.records import HARMFUL, HARMLESS, PSEUDO_HARMFUL
from training.config import TrainConfig
from training.examples import Batches, Example
from training.registry import ARMS, Arm, Bench, Losses, Method


@dataclass(frozen=True)
class RefusalConfig(TrainConfig):
    """Nothing of its own."""


def reply_method(bench: Bench, examples: list[Example]) -> Method:
    """Cross-entropy of the examples' replies: what refusal tuning and SFT share."""
    from training.losses import reply_loss

    batches = Batches(examples, bench.config.batch_size, bench.config.seed)

    def losses(micro: int) -> Iterator[Losses]:
        with bench.clock.time("forward"):
            value = reply_loss(*bench.forward(batches(micro)).logits())
        yield {"ce": value}

    return Method(losses)


def method(bench: Bench, config: RefusalConfig) -> Method:
    return reply_method(bench, bench.texts.refusals() + bench.texts.ordinary())


ARM = ARMS.add(
    Arm(
        name="refusal",
        summary="Refuse harmful requests, answer the others (LoRA fine-tuning).",
        config=RefusalConfig,
        method=method,
        needs=(HARMFUL, HARMLESS, PSEUDO_HARMFUL),
        source="this project; optimiser as in arXiv 2604.27019",
        small={"num_steps": 240, "checkpoints": (30, 90, 150, 240), "lora_dropout": 0.05},
        examples=("train refusal --out runs/refusal --preset small",),
    )
)
