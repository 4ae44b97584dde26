"""CAST: conditional activation steering, fitted from contrasts without training (arXiv 2409.05907).

1. Condition vectors: at every candidate layer the first principal component of the differences of
   matched harmful and harmless prompts, each the mean over its tokens ("pairwise PCA" of the
   official code). They point towards harmful.
2. The layer, the threshold and the side of it are found by a grid search for the F1 of harmful on
   validation prompts.
3. Behaviour vectors: likewise from refusals and continuations of the same harmful requests, the
   means over their tokens. They point towards refusing.
4. The result is a folder (``core/cast.py``) that specs take like an adapter.

One thing differs from the code: it adds unit vectors times a fixed number, which means little on
another model. Here the vectors of all layers together move a state by ``strength`` times the mean
distance of refusals and continuations.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from core.records import HARMFUL, HARMLESS
from core.settings import LARGEST, check_settings, setting
from training.registry import ARMS, SEQUENCE, Arm, TrainResult
from training.requests import Requests

READ = 1_000
"""Sequences that a fit reads, about: for estimates."""


@dataclass(frozen=True)
class CASTConfig:
    """Of the estimate; the layers are the paper's, scaled with depth."""

    strength: float = setting(
        1.0, "Of all layers together, in distances of refusals and continuations.", low=0
    )
    max_tokens: int = setting(512, "Tokens of a sequence; longer ones are cut.", low=8)
    reply_tokens: int = setting(48, "New tokens of replies that are made for the estimate.", low=1)
    seed: int = setting(0, "Recorded; nothing is drawn.", low=0, high=LARGEST)

    def __post_init__(self) -> None:
        check_settings(self, "train cast")


def fit(arm: Arm, spec: str, requests: Requests, config: CASTConfig, out: Path) -> TrainResult:
    from training import cast_fit

    return cast_fit.fit(arm, spec, requests, config, out)


ARM = ARMS.add(
    Arm(
        name="cast",
        summary="Fit a hook that refuses where a prompt's states look harmful (CAST, no training).",
        config=CASTConfig,
        fit=fit,
        validates=True,
        needs=(HARMFUL, HARMLESS),
        cost=lambda config, speed: READ * SEQUENCE * speed.token,
        source="arXiv 2409.05907 and its official code",
        small={"reply_tokens": 16},
        examples=("train cast --out runs/cast --preset small",),
    )
)
