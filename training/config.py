"""Settings that every training has. An arm's config adds its own and states its paper's values."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from core.errors import AttackPlaneError
from core.rows import Row
from core.settings import LARGEST, check_settings, setting

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainConfig:
    """Of the loop. One update (optimiser step) averages ``accumulation`` micro-batches."""

    num_steps: int = setting(500, "Updates (optimiser steps).", flag="--steps", low=1)
    checkpoints: tuple[int, ...] = setting(
        (),
        "Update to save at, besides the last; repeatable [default: a tenth, a fifth and a half]",
        flag="--checkpoint",
    )
    batch_size: int = setting(16, "Sequences of a micro-batch.", low=1)
    accumulation: int = setting(1, "Micro-batches of an update.", low=1)
    learning_rate: float = setting(2e-5, "Of AdamW, after the warm-up.", low=0, high=1)
    schedule: str = setting("cosine", "Of the learning rate after the warm-up.", choices=SCHEDULES)
    warmup_steps: int = setting(0, "Updates of linear warm-up.", flag="--warmup", low=0)
    max_norm: float = setting(0.0, "Clip the gradient at this norm; 0: never.", low=0)
    weight_decay: float = setting(0.0, "Of AdamW.", low=0, high=1)
    lora_rank: int = setting(64, "LoRA rank.", flag="--rank", low=1, high=10**5)
    lora_alpha: int = setting(16, "LoRA alpha.", flag="--alpha", low=1)
    lora_dropout: float = setting(0.1, "LoRA dropout.", flag="--dropout", low=0, below=1)
    all_linear: bool = setting(False, "LoRA on all linear layers, not on attention alone.")
    precision: str = setting(
        "float32",
        "Of the products; weights and optimiser stay as they are. bfloat16 is faster where the "
        "machine has it.",
        choices=PRECISIONS,
    )
    max_tokens: int = setting(512, "Tokens of a sequence; longer ones are cut.", low=8)
    reply_tokens: int = setting(48, "New tokens of replies that are made for training.", low=1)
    seed: int = setting(0, "Random seed.", low=0, high=LARGEST)

    def __post_init__(self) -> None:
        check_settings(self, "train")
        if not all(1 <= c <= self.num_steps for c in self.checkpoints):
            raise AttackPlaneError(
                "checkpoints must lie within the steps",
                where="train",
                got=f"checkpoints {self.checkpoints}, {self.num_steps} steps",
                remedy=f"for example --checkpoint {self.num_steps}",
            )

    @property
    def saved_steps(self) -> tuple[int, ...]:
        """Updates after which a checkpoint is saved, in order; the last one is among them."""
        n = self.num_steps
        chosen = self.checkpoints or [max(1, n // part) for part in (10, 5, 2)]
        return tuple(sorted({*chosen, n}))

    def rate(self, step: int) -> float:
        """Learning rate of an update, counted from 0: linear warm-up, then the schedule."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        share = {
            "constant": 1.0,
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        }
        return self.learning_rate * share[self.schedule]


def published(owner: type[Any], name: str, value: Any) -> Any:
    """A setting of ``owner`` with another default: the one that an arm's paper has."""
    old = next(f for f in dataclasses.fields(owner) if f.name == name)
    return dataclasses.field(default=value, metadata=old.metadata)


def differences(config: Any, paper: Any) -> Row:
    """Setting -> [the paper's value, this one], where they differ. The seed is no difference."""
    return {
        field.name: [_plain(getattr(c, field.name)) for c in (paper, config)]
        for field in dataclasses.fields(config)
        if field.name != "seed" and getattr(config, field.name) != getattr(paper, field.name)
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


SMALL: Row = {
    "num_steps": 200,
    "checkpoints": (25, 50, 100, 200),
    "batch_size": 8,
    "learning_rate": 1e-3,
    "warmup_steps": 10,
    "lora_rank": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "all_linear": True,
    "precision": "bfloat16",
    "reply_tokens": 16,
}
"""What every arm changes to fit two cores and a model of 135M parameters."""
