"""Harmless requests in the wrappers of attacks: what of an effect is the wrapper's own?

A wrapper's constant ending decides t_inst, and its length and language move every position. So each
attacked prompt is compared with the same prompt in which the harmful request is replaced by the
harmless one that is matched with it. Both are read at t_goal, the last token of the request, and at
t_inst and t_post_inst. Attacks that do not hold the request as it is (encodings, rewritten
requests) have no such counterpart, and are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import NothingToMeasure
from core.records import AttackArtifact, Behaviour
from core.store import RunFolder
from evaluation.behaviours import counterparts
from geometry.activations import POSITIONS
from pipeline.plane import PlaneReading


@dataclass(frozen=True)
class Wrapped:
    """Attacked prompts and their harmless counterparts, in one order.

    Attributes:
        artifacts: the attacked prompts.
        harmless: the requests that stand in for theirs.
        attacked, counterpart: residuals (prompt, layer, d_model) by position.
    """

    artifacts: tuple[AttackArtifact, ...]
    harmless: tuple[Behaviour, ...]
    attacked: Mapping[str, Tensor]
    counterpart: Mapping[str, Tensor]

    @property
    def behaviours(self) -> list[str]:
        return [a.behaviour_id for a in self.artifacts]

    def moved(self, position: str, layer: int) -> Tensor:
        """(prompt, d_model) attacked less counterpart, float64."""
        first, second = (of[position][:, layer] for of in (self.attacked, self.counterpart))
        return first.double() - second.double()


def wrapped(reading: PlaneReading, artifacts: Sequence[AttackArtifact], run: RunFolder) -> Wrapped:
    """The attacked prompts that have a counterpart, from what the plane has read.

    Raises:
        NothingToMeasure: none has one.
    """
    by_id = {a.artifact_id: a for a in artifacts}
    matched = counterparts(list(run.behaviours().values()))
    rows = [n for n in reading.wrappers if reading.infos[n].prompt_id in by_id]
    if not rows:
        raise NothingToMeasure(
            "no attack has a harmless counterpart",
            where=run.path,
            got=f"{len(artifacts)} attacks",
            remedy="attack a set of matched pairs, with classes that keep the request as it is",
        )
    others = [reading.wrappers[n][0] for n in rows]
    read = reading.activations
    chosen = tuple(by_id[reading.infos[n].prompt_id] for n in rows)
    return Wrapped(
        chosen,
        tuple(matched[a.behaviour_id] for a in chosen),
        {position: read.at(position)[rows] for position in POSITIONS},
        {position: read.at(position)[others] for position in POSITIONS},
    )


def by_behaviour(behaviours: Iterable[str], values: Tensor) -> list[float]:
    """Mean of the (n,) values of each behaviour, in the order of their first prompts."""
    names = list(behaviours)
    return [
        float(values[torch.tensor([n == name for n in names])].mean())
        for name in dict.fromkeys(names)
    ]
