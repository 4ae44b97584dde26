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

from core.errors import AttackPlaneError
from core.prompt import Conversation, Prompt
from core.records import HARMLESS, AttackArtifact, Behaviour
from evaluation.behaviours import load_behaviours
from geometry.activations import POSITIONS, collect
from study.study import Study


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


def content_with(artifact: AttackArtifact, request: str) -> str | None:
    """The attacked prompt with another request in its place; None where it has not the request."""
    old = artifact.request
    return artifact.prompt.replace(old, request) if old and old in artifact.prompt else None


def counterparts(study: Study) -> dict[str, Behaviour]:
    """Harmful held-out behaviour id -> the harmless request that is matched with it."""
    source, splits = study.config.held_out, study.config.held_out_splits
    rows = load_behaviours(source, splits=splits)
    harmless = {b.pair_id: b for b in rows if b.label == HARMLESS and b.pair_id}
    return {b.behaviour_id: harmless[b.pair_id] for b in rows if b.pair_id in harmless}


def wrapped(study: Study, artifacts: Sequence[AttackArtifact]) -> Wrapped:
    """Read the attacked prompts and their counterparts.

    Raises:
        AttackPlaneError: none has a counterpart.
    """
    other = counterparts(study)
    kept: list[tuple[AttackArtifact, Behaviour, Prompt, Prompt]] = []
    for a in artifacts:
        b = other.get(a.behaviour_id)
        content = content_with(a, b.request) if b else None
        if b and content:
            kept.append(
                (
                    a,
                    b,
                    _rendered(study, a, a.prompt, a.request),
                    _rendered(study, a, content, b.request),
                )
            )
    if not kept:
        raise AttackPlaneError(
            "no attack has a harmless counterpart",
            where=study.spec,
            got=f"{len(artifacts)} attacks",
            remedy="attack a set of matched pairs, with classes that keep the request as it is",
        )
    columns = list(zip(*kept, strict=True))
    return Wrapped(
        tuple(columns[0]), tuple(columns[1]), _read(study, columns[2]), _read(study, columns[3])
    )


def _rendered(study: Study, a: AttackArtifact, content: str, request: str | None) -> Prompt:
    conversation = Conversation.of_prompt(
        content, request=request, suffix=a.suffix, system=a.system_prompt
    )
    return study.renderer.render(conversation, allow_trim=True)


def _read(study: Study, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    ids = [str(n) for n in range(len(prompts))]
    read = collect(study.loaded, prompts, ids, description="wrapped requests")
    return {position: read.at(position) for position in POSITIONS}


def by_behaviour(behaviours: Iterable[str], values: Tensor) -> list[float]:
    """Mean of the (n,) values of each behaviour, in the order of their first prompts."""
    names = list(behaviours)
    return [
        float(values[torch.tensor([n == name for n in names])].mean())
        for name in dict.fromkeys(names)
    ]
