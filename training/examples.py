"""Sequences to learn from: prompt and reply as the chat template writes them, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.errors import AttackPlaneError
from core.prompt import Conversation, Renderer


@dataclass(frozen=True)
class Example:
    """One sequence: ``ids`` with the reply at ``reply_start`` and after.

    ``t_inst`` is the last token of the user content; the last one before the reply is t_post_inst.
    """

    ids: tuple[int, ...]
    reply_start: int
    t_inst: int = 0

    @property
    def t_post_inst(self) -> int:
        return self.reply_start - 1

    @property
    def reply(self) -> range:
        """The tokens of the reply."""
        return range(self.reply_start, len(self.ids))

    def cut(self, tokens: int) -> Example:
        """Its first ``tokens`` tokens."""
        return Example(self.ids[:tokens], self.reply_start, self.t_inst)


def make_example(renderer: Renderer, request: str, reply: str, *, ended: bool = True) -> Example:
    """Prompt and reply as the chat template writes them.

    With ``ended`` the end-of-turn token is learnt too.
    """
    prompt = renderer.render(Conversation.build(request), reply)
    end = renderer.end_of_turn() if ended else ()
    return Example((*prompt.ids, *prompt.target_ids, *end), len(prompt.ids), prompt.t_inst)


class Order:
    """Endless shuffled batches of ``n`` items, a new order an epoch; the same for the same seed.

    Any batch can be asked for, so a resumed training needs no state of it.
    """

    def __init__(self, n: int, size: int, seed: int) -> None:
        self.n, self.size = n, size
        import torch

        self._generator = torch.Generator().manual_seed(seed)
        self._drawn: list[int] = []

    def batch(self, number: int) -> list[int]:
        """Indices of batch ``number``, counted from 0."""
        import torch

        stop = (number + 1) * self.size
        while len(self._drawn) < stop:
            self._drawn += torch.randperm(self.n, generator=self._generator).tolist()
        return self._drawn[stop - self.size : stop]


class Batches:
    """Batches of examples.

    Raises:
        AttackPlaneError: there are none.
    """

    def __init__(self, examples: Sequence[Example], size: int, seed: int) -> None:
        if not examples:
            raise AttackPlaneError(
                "nothing to train on",
                where="train",
                got="no request with a reply is left",
                remedy="give other requests, or replies of a file (--replies)",
            )
        self.examples, self._order = examples, Order(len(examples), size, seed)

    def __call__(self, number: int) -> list[Example]:
        return [self.examples[i] for i in self._order.batch(number)]
