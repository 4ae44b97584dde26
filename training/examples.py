"""Sequences to learn from: prompt and reply as the chat template writes them, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.prompt import Conversation, Renderer


@dataclass(frozen=True)
class Example:
    """One sequence: ``ids`` with the reply at ``reply_start`` and after."""

    ids: tuple[int, ...]
    reply_start: int


def make_example(renderer: Renderer, request: str, reply: str, *, ended: bool = True) -> Example:
    """Prompt and reply as the chat template writes them.

    With ``ended`` the end-of-turn token is learnt too.
    """
    prompt = renderer.render(Conversation.build(request), reply)
    end = renderer.end_of_turn() if ended else ()
    return Example((*prompt.ids, *prompt.target_ids, *end), len(prompt.ids))


def collate(examples: Sequence[Example], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids (batch, tokens), attention mask, labels with -100 outside the replies.

    Rows are padded on the right.
    """
    longest = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), longest), pad)
    labels = torch.full((len(examples), longest), -100)
    mask = torch.zeros(len(examples), longest, dtype=torch.long)
    for row, e in enumerate(examples):
        values = torch.tensor(e.ids)
        ids[row, : len(values)] = values
        labels[row, e.reply_start : len(values)] = values[e.reply_start :]
        mask[row, : len(values)] = 1
    return ids, mask, labels


def batches(n: int, size: int, seed: int) -> Iterator[list[int]]:
    """Endless shuffled batches, a new order an epoch; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(n, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]
