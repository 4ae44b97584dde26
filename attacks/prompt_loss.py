"""Target loss of whole prompts of any length, through the objective that GCG uses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from attacks.objective import TargetLoss
from attacks.slot import Slot
from attacks.words import MARKER
from core.errors import AttackPlaneError
from core.generate import complete
from core.prompt import Conversation, Renderer
from core.records import Behaviour


class PromptLoss:
    """Target loss of prompt templates filled with one behaviour's request.

    The template's beginning is cached, the head applied at the target's positions, and what a
    prompt shares with ``near`` computed once.
    """

    def __init__(
        self, renderer: Renderer, behaviour: Behaviour, system: str | None, first: Sequence[str]
    ) -> None:
        assert behaviour.target_string is not None
        self.renderer, self.behaviour, self.system = renderer, behaviour, system
        rendered = [
            renderer.render(self.conversation(t), behaviour.target_string, allow_trim=True)
            for t in first
        ]
        longest = max(rendered, key=lambda prompt: len(prompt.ids))
        self.target_text, self._target = longest.target_text, longest.target_ids
        self._before = longest.ids[: longest.content.start]
        slot = Slot(self._before, longest.ids[len(self._before) :], (), self._target)
        self.objective = TargetLoss(renderer.loaded, slot)

    def conversation(self, template: str) -> Conversation:
        return Conversation(template.replace(MARKER, self.behaviour.request), system=self.system)

    def tails(self, templates: Sequence[str]) -> list[torch.Tensor | None]:
        """Ids after the shared beginning, up to the reply.

        None where the text merges with the template into other tokens.
        """
        texts = [self.renderer.text(self.conversation(t)) + self.target_text for t in templates]
        head, last = len(self._before), len(self._target)
        return [
            torch.tensor(ids[head:-last])
            if tuple(ids[:head]) == self._before
            and tuple(ids[-last:]) == self._target
            and len(ids) > head + last
            else None
            for ids in self.renderer.tokenise(texts)
        ]

    def losses(self, templates: Sequence[str], near: str | None = None) -> list[float]:
        """Loss of each template, infinite where it cannot be sent.

        What templates share with ``near`` is computed once.
        """
        tails = self.tails(templates)
        whole = [tail for tail in tails if tail is not None]
        if not whole:
            return [math.inf] * len(tails)
        if near is not None and (tail := self.tails([near])[0]) is not None:
            self.objective.share(tail)
        own = iter(self.objective.losses(whole).tolist())
        losses = [math.inf if tail is None else next(own) for tail in tails]
        if any(math.isnan(loss) for loss in losses):
            raise AttackPlaneError(
                "the target loss is not finite",
                where=self.renderer.loaded.spec,
                remedy="use ?dtype=float32; if it is that, the weights are at fault",
            )
        return losses

    def weights_changed(self) -> None:
        """Compute anew what is kept of the model; call it after every training step."""
        self.objective.weights_changed()

    def reply(self, template: str, tokens: int) -> str:
        return complete(
            self.renderer, [self.renderer.text(self.conversation(template))], max_new_tokens=tokens
        )[0]
