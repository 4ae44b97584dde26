"""One forward pass over a batch of examples, with gradients: logits of replies, and residuals.

Sequences of a batch begin alike (BOS, system prompt). What they share is run once, and what is left
of them lies one after another without padding (``core/packed.py``); gradients flow through both.
Where packing does not serve a model, rows are padded on the right, with the same result. The head
is applied only where a reply is predicted: over the whole vocabulary it is a fifth of a step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from core.head import Head, head_of
from core.models import LoadedModel, evaluating
from core.packed import Group, PackedDecoder
from core.prefix import keeps_keys_and_values_only, shared_length
from geometry.activations import AGREEMENT, RESPONSE_TOKENS, read_residuals
from training.examples import Example

log = logging.getLogger(__name__)
MEANS_BATCH = 16
"""Examples that means are read from at once."""


class Pass:
    """What one forward pass gave.

    Attributes:
        weight: (fed token,) how many rows a token belongs to; 0 for padding. A mean with these
            weights is the mean over the tokens of all rows.
    """

    def __init__(
        self,
        rows: Sequence[Example],
        starts: Sequence[int],
        shared: int,
        states: Tensor,
        residuals: dict[int, Tensor],
        head: Any,
    ) -> None:
        self.rows, self._starts, self._shared = rows, starts, shared
        self._states, self._residuals, self._head = states, residuals, head
        self.weight = torch.zeros(len(states), device=states.device)
        self.weight[:shared] = len(rows)
        for row, start in zip(rows, starts, strict=True):
            self.weight[start : start + len(row.ids) - shared] = 1

    def place(self, row: int, token: int) -> int:
        """Where a token of a row lies among the fed tokens."""
        return token if token < self._shared else self._starts[row] + token - self._shared

    def logits(self, rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the rows' replies, token after token and row after row, and their labels.

        Returns:
            (reply tokens of all rows, vocabulary) float32, and (reply tokens,)
        """
        chosen = range(len(self.rows)) if rows is None else rows
        tokens = [(i, t) for i in chosen for t in self.rows[i].reply]
        labels = torch.tensor([self.rows[i].ids[t] for i, t in tokens])
        states = self._states[[self.place(i, t - 1) for i, t in tokens]]
        return self._head(states), labels.to(states.device)

    def owners(self, rows: Sequence[int] | None = None) -> Tensor:
        """(reply tokens,): which of the rows each token of ``logits`` is of, counted from 0."""
        chosen = range(len(self.rows)) if rows is None else rows
        lengths = [len(self.rows[i].reply) for i in chosen]
        owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        return owners.to(self._states.device)

    def residual(self, layer: int, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """(row, d_model) residuals of one token of each row."""
        places = [self.place(i, t) for i, t in zip(rows, tokens, strict=True)]
        return self._residuals[layer][places]

    def response(self, layer: int, rows: Sequence[int]) -> Tensor:
        """(row, d_model) means over the first 32 tokens of the rows' replies."""
        spans = [self.rows[i].reply[:RESPONSE_TOKENS] for i in rows]
        return self.means(layer, rows, spans)

    def means(self, layer: int, rows: Sequence[int], spans: Sequence[range]) -> Tensor:
        """(row, d_model) means of residuals over some tokens of each row."""
        places = [[self.place(i, t) for t in span] for i, span in zip(rows, spans, strict=True)]
        return torch.stack([self._residuals[layer][at].mean(0) for at in places])

    def all_residuals(self, layers: Sequence[int]) -> Tensor:
        """(layer, fed token, d_model); see ``weight``."""
        return torch.stack([self._residuals[layer] for layer in layers])


class Forward:
    """Runs batches of examples through a model."""

    def __init__(self, loaded: LoadedModel, *, precision: str = "float32") -> None:
        self.loaded, self.precision = loaded, precision
        self._packed: PackedDecoder | None = None
        self._head: Head | None = None
        self._decided = False

    def decide(self, probe: Sequence[Example]) -> None:
        """Decide whether batches are packed, by comparing both ways on a few examples.

        Without it the first batch decides.
        """
        self._decided = True
        if fault := self._fault_of_packing(probe):
            self._packed = None
            log.warning("%s: batches are padded, not packed (%s)", self.loaded.spec, fault)

    @torch.no_grad()
    def _fault_of_packing(self, probe: Sequence[Example]) -> str | None:
        if not keeps_keys_and_values_only(self.loaded):
            return "it keeps more than keys and values"
        with evaluating(self.loaded):
            self._head = head_of(self.loaded, torch.tensor(probe[0].ids))
            if not self._head.usable:
                self._head = None
                return "its logits are not an elementwise function of a linear head's"
            whole = self._padded(probe, (), False).logits()[0]
            self._packed = PackedDecoder(self.loaded)
            try:
                again = self._in_one_row(probe, (), False).logits()[0]
            except torch.OutOfMemoryError:
                raise
            except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
                return f"{type(error).__name__}: {error}".splitlines()[0]
        bound = AGREEMENT if self.loaded.dtype == torch.float32 else 100 * AGREEMENT
        worst = float((again - whole).abs().max() / whole.abs().max())
        return None if worst <= bound else f"logits differ by {worst:.1g} of the largest"

    def __call__(self, rows: Sequence[Example], layers: Sequence[int] = ()) -> Pass:
        """One pass.

        Args:
            rows: the examples.
            layers: residual layers to keep, 0 to n_layers.
        """
        if not self._decided:
            self.decide(rows[:2])
        run = self._padded if self._packed is None else self._in_one_row
        return run(rows, layers, self.precision == "bfloat16")

    @torch.no_grad()
    def means(
        self, rows: Sequence[Example], layers: Sequence[int], spans: Sequence[Sequence[range]]
    ) -> list[Tensor]:
        """Mean residuals of many examples, without gradients.

        Args:
            spans: one range of tokens for each example, for each mean that is wanted.

        Returns:
            (row, layer, d_model) float32 on the CPU, for each of ``spans``.
        """
        parts: list[list[Tensor]] = [[] for _ in spans]
        for start in range(0, len(rows), MEANS_BATCH):
            some = slice(start, start + MEANS_BATCH)
            out = self(rows[some], layers)
            for part, each in zip(parts, spans, strict=True):
                means = [out.means(layer, range(len(out.rows)), each[some]) for layer in layers]
                part.append(torch.stack(means, 1).float().cpu())
        return [torch.cat(part) for part in parts]

    def _in_one_row(self, rows: Sequence[Example], layers: Sequence[int], reduced: bool) -> Pass:
        assert self._packed is not None and self._head is not None
        shared = shared_length([row.ids for row in rows], min(row.t_post_inst for row in rows))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        flat, starts = list(rows[0].ids[:shared]), [0] * len(rows)
        for i in order:
            starts[i] = len(flat)
            flat += rows[i].ids[shared:]
        groups = [Group(0, shared, 1)] if shared else []
        lengths = (len(rows[i].ids) - shared for i in order)
        groups += [Group(shared, length, len(list(same))) for length, same in groupby(lengths)]
        embed = self.loaded.model.get_input_embeddings()
        ids = torch.tensor(flat, device=self.loaded.device)
        kept: dict[int, Tensor] = {}
        with self._reading(kept, layers), self._autocast(reduced):
            states = self._packed.hidden(embed(ids), groups, leading=bool(shared))
        head = self._head

        def logits(at: Tensor) -> Tensor:
            with self._autocast(reduced):
                return head.logits(at)

        return Pass(rows, starts, shared, states, kept, logits)

    def _padded(self, rows: Sequence[Example], layers: Sequence[int], reduced: bool) -> Pass:
        longest = max(len(row.ids) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for n, row in enumerate(rows):
            ids[n, : len(row.ids)], mask[n, : len(row.ids)] = torch.tensor(row.ids), 1
        ids, mask = ids.to(self.loaded.device), mask.to(self.loaded.device)
        kept: dict[int, Tensor] = {}
        with self._reading(kept, layers), self._autocast(reduced):
            # the model's own head, whatever it does; positions are chosen afterwards
            logits = self.loaded.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        starts = [n * longest for n in range(len(rows))]
        return Pass(rows, starts, 0, logits.flatten(0, 1), kept, lambda at: at.float())

    def _reading(self, kept: dict[int, Tensor], layers: Sequence[int]) -> Any:
        wanted = set(layers)

        def keep(layer: int, hidden: Tensor) -> None:
            if layer in wanted:
                kept[layer] = hidden.flatten(0, -2)

        return read_residuals(self.loaded, keep) if wanted else nullcontext()

    def _autocast(self, reduced: bool) -> Any:
        device = self.loaded.device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=reduced)
