"""The reference of a trajectory, and what checkpoints are compared with."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor

from geometry.activations import collect
from geometry.contrasts import Contrast
from pipeline.contrast_reading import rendered
from study.study import Study

READ = ("t_inst", "t_post_inst")


class Reference:
    """The reference, and what checkpoints are compared with."""

    def __init__(self, study: Study) -> None:
        self.study = study

    @cached_property
    def axes(self) -> dict[str, tuple[Contrast, str]]:
        """H and R with the position that each is read at."""
        return {"H": (self.study.harmfulness, "t_inst"), "R": (self.study.refusal, "t_post_inst")}

    @cached_property
    def read(self) -> dict[str, list[Tensor]]:
        return held_out_states(self.study)


def held_out_states(study: Study) -> dict[str, list[Tensor]]:
    """Position -> residuals (pair, layer, d_model) of held-out harmful, and of harmless prompts."""
    sides: list[list[Any]] = [list(side) for side in zip(*study.held_out_pairs(), strict=True)]
    prompts = rendered(study.renderer, sides[0] + sides[1], study.config.system_prompt)
    ids = [str(i) for i in range(len(prompts))]
    read = collect(study.loaded, prompts, ids, positions=READ, description="held-out prompts")
    return {p: list(read.at(p).split(len(sides[0]))) for p in READ}
