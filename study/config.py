"""What a model is studied on, and how."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from core.rows import Row
from core.settings import LARGEST, check_settings, setting
from evaluation.behaviours import (
    CONTRAST_SPLITS,
    DEMONSTRATION,
    HELD_OUT_SPLITS,
    recorded_name,
)
from evaluation.judges import QUICK_JUDGE
from geometry.directions import ESTIMATORS
from pipeline.contrast_reading import TEMPLATES, DirectionsConfig


@dataclass(frozen=True)
class StudyConfig:
    """What a model is studied on, and how.

    ``estimator`` of the refusal contrast: auto is zhao where the model refuses and accepts enough,
    else harc. ``held_out_prompts``: how many of each label effects are measured on, spread over
    categories. ``carrier_prompts`` of each label, and every ``carrier_every``-th layer, are tried
    for carriers. ``refusals``: how many refusals, and openings that comply, outcome D has there.
    ``judge`` says refused or complied. ``outputs``: ablate what attention and MLP write too.
    ``template``: raw leaves out what the model's chat template puts before the first turn by
    itself, in everything but attacked prompts.
    """

    contrast: str = DEMONSTRATION
    splits: tuple[str, ...] = CONTRAST_SPLITS
    held_out: str = DEMONSTRATION
    held_out_splits: tuple[str, ...] = HELD_OUT_SPLITS
    held_out_prompts: int = setting(24, "Held-out prompts of each label.", low=1)
    estimator: str = setting("auto", "Of the refusal contrast.", choices=("auto", *ESTIMATORS))
    reply_tokens: int = setting(32, "New tokens of the model's own replies.", low=1)
    resamples: int = setting(200, "Bootstrap samples and null draws.", low=20)
    carrier_prompts: int = setting(8, "Prompts of each label that carriers are tried on.", low=1)
    carrier_every: int = setting(3, "Every so many-th layer is tried.", low=1)
    refusals: int = setting(2, "Refusals, and openings that comply, in outcome D.", low=1)
    seed: int = setting(0, "Random seed.", low=0, high=LARGEST)
    system_prompt: str | None = None
    judge: str = QUICK_JUDGE
    outputs: bool = False
    template: str = setting(TEMPLATES[0], "Chat template or raw.", choices=TEMPLATES)

    def __post_init__(self) -> None:
        check_settings(self, "study")

    def to_settings(self) -> Row:
        """For a run's manifest."""
        names = {k: recorded_name(getattr(self, k)) for k in ("contrast", "held_out")}
        settings = asdict(self) | names
        if self.template == TEMPLATES[0]:
            del settings["template"]
        return settings

    @property
    def directions(self) -> DirectionsConfig:
        return DirectionsConfig(
            contrast=self.contrast,
            splits=self.splits,
            reply_tokens=self.reply_tokens,
            resamples=self.resamples,
            seed=self.seed,
            system_prompt=self.system_prompt,
            judge=self.judge,
            template=self.template,
        )
