"""Interventions at work: hooks that edit the residual of every row of a batch in its own way."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import AttackPlaneError
from core.hooks import before_block
from core.models import LoadedModel
from geometry.interventions import Intervention


class Edits:
    """The interventions of a batch's rows, stacked.

    Attributes:
        mask: (row, fed token), which tokens the next pass edits; None edits all of them.
        moved: (row,), the summed length of what was added to tokens.
        count: (row,), how many tokens that were.
    """

    def __init__(
        self, rows: Sequence[Intervention | None], d_model: int, device: torch.device | str
    ) -> None:
        self.mask: Tensor | None = None
        self.moved, self.count = torch.zeros(len(rows)), torch.zeros(len(rows))
        self._device = device
        own = {id(row): i for i, row in reversed(list(enumerate(rows))) if row}
        self.leader = torch.arange(len(rows), device=device)
        """(row,) whose (read . a) each row takes: its own, or that of the nearest earlier row that
        it follows."""
        for i, row in enumerate(rows):
            if row and row.follows:
                before = [j for j in range(i) if rows[j] is row.follows]
                self.leader[i] = before[-1] if before else own[id(row.follows)]
        self.layers = sorted({layer for row in rows if row for layer in row.layers})
        rank = max([0, *(len(row.read) for row in rows if row and row.read is not None)])
        self._stacked: dict[tuple[int, ...], list[Tensor]] = {}
        self._at: dict[tuple[int, bool], tuple[int, ...]] = {}
        for layer, outputs in product(self.layers, (False, True)):
            here = tuple(
                i
                for i, row in enumerate(rows)
                if row and layer in row.layers and (row.outputs or not outputs)
            )
            if here not in self._stacked:
                self._stacked[here] = self._stack(rows, here, rank, d_model)
            self._at[layer, outputs] = here

    def _stack(
        self, rows: Sequence[Intervention | None], here: Sequence[int], rank: int, d: int
    ) -> list[Tensor]:
        """The rows' read, write and shift, and which rows are edited.

        A row without an edit holds zeros, which leave it as it was, to the bit.
        """
        read, write = torch.zeros(len(rows), rank, d), torch.zeros(len(rows), rank, d)
        shift, edited = torch.zeros(len(rows), 1, d), torch.zeros(len(rows), 1)
        for i in here:
            row = rows[i]
            assert row is not None
            edited[i] = 1
            if row.read is not None and row.write is not None:
                read[i, : len(row.read)], write[i, : len(row.read)] = row.read, row.write
            if row.shift is not None:
                shift[i, 0] = row.shift
        return [t.to(self._device) for t in (read, write, shift, edited)]

    def repeated(self, times: int) -> Edits:
        """The same edits for a batch that holds these rows so many times, one after another."""
        fresh = copy.copy(self)
        fresh.mask, n = None, len(self.leader)
        fresh.moved, fresh.count = torch.zeros(times * n), torch.zeros(times * n)
        fresh._stacked = {k: [torch.cat([t] * times) for t in v] for k, v in self._stacked.items()}
        fresh.leader = torch.cat([self.leader + n * i for i in range(times)])
        return fresh

    def select(self, keep: Tensor) -> None:
        """Go on with some rows only."""
        self._stacked = {k: [t[keep] for t in v] for k, v in self._stacked.items()}
        self.mask = None if self.mask is None else self.mask[keep]
        self.moved, self.count = self.moved[keep.cpu()], self.count[keep.cpu()]
        new = torch.zeros_like(self.leader)
        new[keep] = torch.arange(len(keep), device=new.device)
        self.leader = new[self.leader[keep]]

    @property
    def outputs(self) -> list[int]:
        """Layers at which some row edits what the block's parts write."""
        return [layer for layer in self.layers if self._at[layer, True]]

    def __call__(self, layer: int, hidden: Tensor, *, outputs: bool = False) -> Tensor:
        """(row, fed, d_model) -> the same, edited.

        ``outputs``: it is what attention or MLP of that block write, and not the residual.
        """
        read, write, shift, edited = self._stacked[self._at[layer, outputs]]
        a, leader = hidden.float(), self.leader
        if len(read) == 1 != len(a):  # one intervention for whatever the model is given
            read, write = (t.expand(len(a), -1, -1) for t in (read, write))
            leader = torch.arange(len(a), device=leader.device)
        components = torch.bmm(a, read.transpose(1, 2))[leader]
        change = shift - torch.bmm(components, write)
        mask = torch.ones_like(a[..., 0]) if self.mask is None else self.mask
        change = change * mask[..., None]
        if outputs:  # no token of the residual: not counted
            return (a + change).to(hidden.dtype)
        moved = change.detach().norm(dim=-1).sum(1).cpu()
        count = (mask * edited).sum(1).cpu()
        shared = len(self.moved) == 1 != len(moved)
        self.moved += moved.sum() if shared else moved
        self.count += count.sum() if shared else count
        return (a + change).to(hidden.dtype)


WRITERS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),  # Gemma: normed before they join
    ("self_attn", "mlp"),
    ("attn", "mlp"),
    ("attention", "mlp"),
)
"""Names of the modules of a block whose outputs join the residual, the first pair that it has."""


def writers(block: nn.Module, where: str) -> list[nn.Module]:
    """Attention and MLP of a block, or the norms behind them: what writes to the residual.

    Raises:
        AttackPlaneError: a block of unknown make.
    """
    for names in WRITERS:
        parts = [getattr(block, name, None) for name in names]
        if all(isinstance(part, nn.Module) for part in parts):
            return [part for part in parts if part is not None]
    raise AttackPlaneError(
        "cannot tell which modules of a block write to the residual",
        where=where,
        got=", ".join(name for name, _ in block.named_children()),
        remedy="ablate the residual alone",
    )


@contextmanager
def edited(loaded: LoadedModel, edits: Edits) -> Iterator[None]:
    """While open, forward passes of the model are edited. The hooks always go when it closes."""
    handles = []

    def after(
        _: nn.Module, __: Any, output: Any, layer: int = loaded.n_layers, outputs: bool = False
    ) -> Any:
        if isinstance(output, tuple):
            return edits(layer, output[0], outputs=outputs), *output[1:]
        return edits(layer, output, outputs=outputs)

    try:
        for layer in edits.layers:
            if not 0 <= layer <= loaded.n_layers:
                raise AttackPlaneError(
                    "no such layer", where=loaded.spec, got=layer, remedy=f"0 to {loaded.n_layers}"
                )
            if layer < loaded.n_layers:
                handles.append(before_block(loaded.blocks[layer], partial(edits, layer)))
            else:
                handles.append(loaded.blocks[-1].register_forward_hook(after))
        for layer in edits.outputs:
            if layer < loaded.n_layers:
                for part in writers(loaded.blocks[layer], loaded.spec):
                    change = partial(after, layer=layer, outputs=True)
                    handles.append(part.register_forward_hook(change))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def intervened(loaded: LoadedModel, intervention: Intervention) -> Iterator[None]:
    """While open, every token that the model reads is edited, whatever ``where`` says."""
    with edited(loaded, Edits([intervention], loaded.d_model, loaded.device)):
        yield
