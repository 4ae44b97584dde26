"""Supervised fine-tuning on ordinary replies only: the SFT arm of SG and RG.

    loss = mean over reply tokens of the batch of -log p(token | prompt, reply so far)

No refusals are in it. SG (arXiv 2606.16349) and RG (arXiv 2604.27019) train a base model on
UltraChat-200k: ``--replies ultrachat``, or a file. Without either the replies are the base's own.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.records import HARMLESS, PSEUDO_HARMFUL
from training.config import TrainConfig, published
from training.refusal import reply_method
from training.registry import ARMS, Arm, Bench, Method


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """RG's: 500 updates of 16, LoRA r64 alpha 16 on attention, 2e-5 as a cosine."""

    checkpoints: tuple[int, ...] = published(TrainConfig, "checkpoints", (50, 100, 250, 500))


def method(bench: Bench, config: SFTConfig) -> Method:
    return reply_method(bench, bench.texts.ordinary())


ARM = ARMS.add(
    Arm(
        name="sft",
        summary="Fine-tune on ordinary replies only, without refusals (SG's and RG's SFT arm).",
        config=SFTConfig,
        method=method,
        needs=(HARMLESS, PSEUDO_HARMFUL),
        source="arXiv 2606.16349 and 2604.27019",
        examples=(
            "train sft --out runs/sft --preset small",
            "train sft --model ORG/NAME --replies ultrachat --preset paper --out runs/sft",
        ),
    )
)
