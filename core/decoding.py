"""Replies of many prompts, decoded side by side: packed prefill, buffers of keys and values.

1. What all prompts begin with goes through the model once. What follows of each prompt lies in one
   flat batch, without padding (``core/packed.py``).
2. Each row has a place in buffers of keys and values that are allocated once. A step feeds one
   token of every row as one flat batch, so that every matrix product is one. Attention is one call
   a layer, over the buffers as they lie, each key-value head with all query heads that use it. In
   float32 on a CPU what all rows share is multiplied once for all of them.
3. When a quarter of the rows have ended they leave, the buffers are packed again, and new prompts
   come in.
4. On some CPUs two halves of many rows run side by side (``core/threads.py``).

The rows beside it change a row's tokens by rounding only. Each samples from a stream of its own.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from core.head import Head
from core.hooks import has_hooks
from core.models import LoadedModel
from core.packed import Group, PackedDecoder, attend_after, grouped_sdpa, is_unusual
from core.products import uses_onednn
from core.threads import merged

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""By how much logits may differ from a plain pass, as a share of the largest."""
ROOM = 0.25
"""Rows that have ended leave when they are this share of all."""
ENOUGH = 48
"""Rows from which on halves are faster where oneDNN multiplies; with MKL they were slower."""


@dataclass
class PromptRow:
    """One prompt on its way.

    Attributes:
        number: of the prompt among all.
        rest: its tokens behind the shared start.
        reply: token ids so far.
    """

    number: int
    rest: list[int]
    reply: list[int] = field(default_factory=list)
    ended: bool = False
    generator: torch.Generator | None = None


class Lane:
    """Rows that are decoded together, with their buffers.

    Attributes:
        keys, values: by module, (row, key-value heads, capacity, head dim) each.
        lengths: (row,) tokens in the buffers.
        first: the row that a prefill begins with; None in a step.
        capacity: tokens that a buffer must hold.
        seen: (row, tokens) which tokens a step sees.
        masks: the same for attention, by sliding window and device.
    """

    def __init__(self) -> None:
        self.rows: list[PromptRow] = []
        self.keys: dict[nn.Module, Tensor] = {}
        self.values: dict[nn.Module, Tensor] = {}
        self.lengths = torch.zeros(0, dtype=torch.long)
        self.first: int | None = None
        self.capacity = 0
        self.seen = torch.zeros(0, 0, dtype=torch.bool)
        self.masks: dict[tuple[int | None, torch.device], Tensor] = {}


class RowDecoder(PackedDecoder):
    """Decodes prompts of one model that begin alike.

    Args:
        start: tokens that all prompts begin with.
        stops: ids that end a reply.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        head: Head,
        start: Sequence[int],
        *,
        stops: Sequence[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        seeds: Sequence[int] = (),
        batch: int = 96,
    ) -> None:
        super().__init__(loaded)
        self.head, self.start, self.stops = head, list(start), frozenset(stops)
        self.most, self.temperature, self.seeds = max_new_tokens, temperature, seeds
        self.batch = batch
        self._embed = loaded.model.get_input_embeddings()
        self.logits: list[Tensor] | None = None
        """Of every choice, (row, vocabulary) each, where a list is given."""

    @torch.no_grad()
    def replies(self, rests: Mapping[int, Sequence[int]]) -> Iterator[tuple[int, list[int]]]:
        """(number, reply ids) of each prompt as it ends; the stop token is left out.

        Halves go on in their threads while the caller holds a reply.

        Args:
            rests: what follows the shared start, by the prompts' numbers.
        """
        if self.start:
            ids = torch.tensor(self.start, device=self.loaded.device)
            self.hidden(self._embed(ids), [Group(0, len(ids), 1)], keep=len(ids))
        rows = [PromptRow(n, list(rest)) for n, rest in rests.items()]
        if self.temperature:
            for row in rows:
                row.generator = torch.Generator().manual_seed(self.seeds[row.number])
        rows.sort(key=lambda row: len(row.rest))
        lanes = 2 if self._go_side_by_side(len(rows)) else 1
        parts = [rows[n::lanes] for n in range(lanes)]
        streams = [self._steps(part, -(-self.batch // lanes)) for part in parts]
        with self._installed(), closing(merged(streams) if lanes > 1 else streams[0]) as all_ended:
            for ended in all_ended:
                yield from ((row.number, row.reply) for row in ended)

    def _go_side_by_side(self, rows: int) -> bool:
        """Whether two halves are faster. Hooks that hold a state would mix them up."""
        model, wide = self.loaded.model, min(rows, self.batch) >= ENOUGH
        return wide and self.loaded.side_by_side and uses_onednn(model) and not has_hooks(model)

    def _steps(self, waiting: list[PromptRow], batch: int) -> Generator[list[PromptRow]]:
        """After each pass of one lane, the rows that it has ended."""
        lane = self._now.lane = Lane()
        token = torch.zeros(0, dtype=torch.long)
        try:
            while waiting or lane.rows:
                free = batch - len(lane.rows)
                if waiting and free >= max(1, int(ROOM * batch)):
                    fresh, waiting = waiting[:free], waiting[free:]
                    token = torch.cat([token, self._enter(lane, fresh)])
                    yield self._note(fresh, token[-len(fresh) :])
                else:
                    token = self._step(lane, token)
                    yield self._note(lane.rows, token)
                kept = [n for n, row in enumerate(lane.rows) if not row.ended]
                if len(kept) <= (1 - ROOM) * len(lane.rows):
                    token = self._leave(lane, kept, token)
        finally:
            self._now.lane = None

    def _note(self, rows: Sequence[PromptRow], token: Tensor) -> list[PromptRow]:
        """Add each row's new token to its reply; the rows that end by it."""
        ended = []
        for row, chosen in zip(rows, token.tolist(), strict=True):
            if row.ended:
                continue
            if chosen not in self.stops:
                row.reply.append(chosen)
            row.ended = chosen in self.stops or len(row.reply) >= self.most
            if row.ended:
                ended.append(row)
        return ended

    # --- rows come and go -------------------------------------------------------------------------
    def _enter(self, lane: Lane, fresh: list[PromptRow]) -> Tensor:
        """Read new prompts and make room for them; (new row,) their first reply tokens."""
        device, shared = self.loaded.device, len(self.start)
        lengths = torch.tensor([len(row.rest) for row in fresh])
        sizes, counts = lengths.unique_consecutive(return_counts=True)
        groups = [Group(shared, n, c) for n, c in zip(sizes.tolist(), counts.tolist(), strict=True)]
        ids = torch.tensor([i for row in fresh for i in row.rest], device=device)
        lane.first = len(lane.rows)
        lane.rows += fresh
        lane.lengths = torch.cat([lane.lengths, lengths + shared])
        lane.capacity = int(lane.lengths.max()) + self.most
        hidden = self._run(self._embed(ids), groups, 0, False)
        last = torch.cumsum(lengths, 0) - 1
        return self._choose(fresh, hidden[last.to(device)])

    def _leave(self, lane: Lane, kept: list[int], token: Tensor) -> Tensor:
        """Go on with some rows, moved together in the buffers."""
        which = torch.tensor(kept, dtype=torch.long)
        lane.rows = [lane.rows[n] for n in kept]
        lane.lengths = lane.lengths[which]
        for buffers in (lane.keys, lane.values):
            for module, buffer in buffers.items():
                buffers[module] = buffer[which.to(buffer.device)]
        return token[which]

    # --- one step ---------------------------------------------------------------------------------
    def _step(self, lane: Lane, token: Tensor) -> Tensor:
        """Feed (row,) tokens; (row,) the next ones."""
        device = self.loaded.device
        top = int(lane.lengths.max()) + 1
        lane.first, lane.masks = None, {}
        lane.seen = (torch.arange(top) <= lane.lengths[:, None]).to(device)
        output = self.loaded.decoder(
            inputs_embeds=self._embed(token.to(device))[None],
            position_ids=lane.lengths.to(device)[None],
            use_cache=False,
        )
        lane.lengths = lane.lengths + 1
        return self._choose(lane.rows, output.last_hidden_state[0])

    def _choose(self, rows: Sequence[PromptRow], hidden: Tensor) -> Tensor:
        """(row, d_model) -> (row,) next tokens, on the CPU."""
        logits = self.head.logits(hidden)
        if self.logits is not None:
            self.logits.append(logits)
        if not self.temperature:
            return logits.argmax(-1).cpu()
        chances = (logits / self.temperature).softmax(-1).cpu()
        both = zip(chances, rows, strict=True)
        return torch.cat([torch.multinomial(p, 1, generator=r.generator) for p, r in both])

    # --- attention --------------------------------------------------------------------------------
    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        lane: Lane | None = getattr(self._now, "lane", None)
        if lane is None:
            return super()._attend(module, query, key, value, attention_mask, **options)
        if lane.first is not None:
            self._keep(lane, lane.first, module, key, value)
            return super()._attend(module, query, key, value, attention_mask, **options)
        return self._attend_rows(lane, module, query, key, value, **options)

    def _keep(self, lane: Lane, first: int, module: nn.Module, key: Tensor, value: Tensor) -> None:
        """Put what a prefill has computed into the buffers, from row ``first`` on."""
        count, capacity = len(lane.rows), lane.capacity
        known = self._known.get(module)
        for buffers, states, start in (
            (lane.keys, key, known and known[0]),
            (lane.values, value, known and known[1]),
        ):
            before = buffers.get(module)
            _, heads, _, width = states.shape
            buffer = states.new_zeros(count, heads, capacity, width)
            if before is not None and first:
                room = min(before.shape[2], capacity)
                buffer[:first, :, :room] = before[:, :, :room]
            row, fed = first, 0
            for group in self._now.groups:
                rows = slice(row, row + group.count)
                tokens = states[0, :, fed : fed + group.tokens]
                if group.shared:
                    assert start is not None
                    buffer[rows, :, : group.shared] = start[:, :, : group.shared]
                buffer[rows, :, group.shared : group.shared + group.length] = tokens.unflatten(
                    1, (group.count, group.length)
                ).transpose(0, 1)
                row, fed = row + group.count, fed + group.tokens
            buffers[module] = buffer

    def _attend_rows(
        self,
        lane: Lane,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """(1, heads, row, head dim) each -> (1, row, heads, head dim): one token of every row."""
        at = lane.lengths.to(query.device)
        rows = torch.arange(len(at), device=query.device)
        keys, values = lane.keys[module], lane.values[module]
        keys[rows, :, at], values[rows, :, at] = key[0].transpose(0, 1), value[0].transpose(0, 1)
        top, window = lane.seen.shape[1], options.get("sliding_window")
        k, v = keys[:, :, :top], values[:, :, :top]
        mask = self._row_mask(lane, window, at, query.dtype)
        q = query[0].transpose(0, 1)[:, :, None]  # (row, heads, 1, head dim)
        own = self._own_attention(module)
        plain = own is grouped_sdpa and not is_unusual(options) and query.device.type == "cpu"
        exact = query.dtype == keys.dtype == torch.float32  # the sums of two parts are rounded
        if plain and exact and self.start and not (window and window < top):
            attended = attend_after(self._known[module], q, k, v, mask, options.get("scaling"))
        else:
            attended = own(module, q, k, v, mask, **options)[0]
        return attended.transpose(0, 1), None

    def _row_mask(self, lane: Lane, window: int | None, at: Tensor, dtype: torch.dtype) -> Tensor:
        """(row, 1, 1, seen) 0 where a row sees a token, -inf where it does not."""
        key = window, at.device
        if key not in lane.masks:
            seen = lane.seen.to(at.device)
            if window:
                distance = at[:, None] - torch.arange(seen.shape[1], device=at.device)
                seen = seen & (distance < window)
            zeros = torch.zeros(seen.shape, dtype=dtype, device=at.device)
            lane.masks[key] = zeros.masked_fill(~seen, float("-inf"))[:, None, None]
        return lane.masks[key]
