"""How much an evaluation asks of every model."""

from __future__ import annotations

from dataclasses import dataclass

from core.settings import LARGEST, check_settings, setting


@dataclass(frozen=True)
class EvaluateConfig:
    """Counts are per model; a label is harmful, harmless or pseudo-harmful."""

    plain: int = setting(40, "Held-out requests of each label, sent as they are.", low=2)
    per_class: int = setting(8, "Prompts of each attack class of the given runs.", low=1)
    adaptive: int = setting(6, "Behaviours that GCG attacks anew on every model; 0: none.", low=0)
    adaptive_steps: int = setting(20, "GCG steps of those attacks.", low=1)
    adaptive_width: int = setting(32, "GCG candidates per step of those attacks.", low=1)
    max_new_tokens: int | None = setting(
        None, "New tokens of a reply [default: 64, more for classes that ask for copying].", low=1
    )
    instructions: int = setting(120, "Verifiable instructions; 0: none.", low=0)
    kl_prompts: int = setting(24, "Harmless requests for the KL to the base; 0: none.", low=0)
    seed: int = setting(0, "Random seed.", low=0, high=LARGEST)

    def __post_init__(self) -> None:
        check_settings(self, "evaluate")
