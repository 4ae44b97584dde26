"""Batches of prompts under many interventions: what ``rollout.py`` runs one after another.

Blocks below the lowest edited layer are skipped, and take keys, values and residual from an
unedited pass; a prefix that all prompts share goes through the model once per intervention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from core.generate import stop_ids
from core.models import LoadedModel
from core.prefix import forked
from core.prompt import Prompt
from geometry.activations import read_residuals
from geometry.edits import Edits, edited
from geometry.interventions import Intervention, touched


@contextmanager
def _skipped(
    loaded: LoadedModel, layer: int, residual: Tensor, kinds: Sequence[bool]
) -> Iterator[None]:
    """While open, blocks below ``layer`` compute nothing.

    The last of them returns ``residual`` (row, token, d_model).

    ``kinds``: whether each block returns a tuple.
    """

    def stand_in(value: Tensor | None, as_tuple: bool) -> Any:
        def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            out = hidden_states if value is None else value
            return (out, None) if as_tuple else out

        return forward

    below = list(loaded.blocks)[:layer]
    try:
        for index, block in enumerate(below):
            block.forward = stand_in(residual if index == layer - 1 else None, kinds[index])
        yield
    finally:
        for block in below:
            block.__dict__.pop("forward", None)


class SharedEdits:
    """Interventions on one model, and their keys and values of the shared prefix."""

    def __init__(
        self,
        loaded: LoadedModel,
        edits: Sequence[Intervention | None],
        prefix: Tensor,
        place: Tensor,
        share: bool,
    ) -> None:
        """``prefix`` (shared tokens,) ids; ``place`` (intervention, shared tokens) which of them
        are edited."""
        self.loaded, self.all = loaded, list(edits)
        layers = sorted({layer for edit in edits if edit for layer in edit.layers})
        self.start = min([loaded.n_layers, *layers[:1]]) if share else 0
        self.plain, self.cache = self.fresh(), self.fresh()
        self.moved = self.count = torch.zeros(len(edits))
        if len(prefix):
            _, residual, kinds = self.pass_alone(prefix[None], self.plain)
            rows = torch.zeros(len(edits), dtype=torch.long, device=loaded.device)
            stacked = Edits(self.all, loaded.d_model, loaded.device)
            stacked.mask = place.to(loaded.device)
            with edited(loaded, stacked), _skipped(loaded, self.start, residual[rows], kinds):
                loaded.decoder(
                    input_ids=prefix[None].expand(len(rows), -1),
                    past_key_values=self.cache,
                    use_cache=True,
                )
            self.cache.layers[: self.start] = forked(self.plain, rows).layers[: self.start]
            self.moved, self.count = stacked.moved, stacked.count

    def fresh(self) -> DynamicCache:
        return DynamicCache(config=self.loaded.model.config)

    def pass_alone(self, ids: Tensor, cache: DynamicCache) -> tuple[Tensor, Tensor, list[bool]]:
        """The unedited pass of some rows.

        It gives (row, vocabulary) next log-probabilities, the residual at ``start``, and which
        blocks return a tuple.
        """
        kept: list[Tensor] = []
        kinds: list[bool] = []

        def keep(layer: int, hidden: Tensor) -> None:
            if layer == self.start:
                kept.append(hidden)

        handles = [
            block.register_forward_hook(lambda _, __, out: kinds.append(isinstance(out, tuple)))
            for block in self.loaded.blocks
        ]
        try:
            with read_residuals(self.loaded, keep):
                logits = self.loaded.last_logits(
                    1, input_ids=ids, past_key_values=cache, use_cache=True
                )
        finally:
            for handle in handles:
                handle.remove()
        return logits[:, -1].log_softmax(-1), kept[0], kinds


class EditedBatch:
    """Prompts of one length under the interventions of a ``SharedEdits``.

    Row = prompt x number of interventions + intervention.
    """

    def __init__(self, of: SharedEdits, prompts: Sequence[Prompt], shared: int) -> None:
        self.loaded, n = of.loaded, len(of.all)
        device = self.loaded.device
        whose = torch.arange(len(prompts), device=device).repeat_interleave(n)
        which = torch.arange(n, device=device).repeat(len(prompts))
        ids = torch.tensor([p.ids[shared:] for p in prompts], device=device)
        self.edits = Edits(of.all * len(prompts), self.loaded.d_model, device)
        places = [
            touched(p, edit.where) if edit else (torch.zeros(len(p.ids)), False)
            for p in prompts
            for edit in of.all
        ]
        self.edits.mask = torch.stack([mask[shared:] for mask, _ in places]).to(device)
        self._on_reply = torch.tensor([[float(reply)] for _, reply in places], device=device)
        alone = forked(of.plain, whose.new_zeros(len(prompts))) if shared else of.fresh()
        base, residual, kinds = of.pass_alone(ids, alone)
        self.cache = forked(of.cache, which) if shared else of.fresh()
        with (
            edited(self.loaded, self.edits),
            _skipped(self.loaded, of.start, residual[whose], kinds),
        ):
            logits = self.loaded.last_logits(
                1, input_ids=ids[whose], past_key_values=self.cache, use_cache=True
            )
        self.cache.layers[: of.start] = forked(alone, whose).layers[: of.start]
        self.next = logits[:, -1].log_softmax(-1)
        reference = base[whose]
        self.kl = (reference.exp() * (reference - self.next)).sum(-1).clamp_min(0).cpu()
        moved, count = (
            self.edits.moved + of.moved[which.cpu()],
            self.edits.count + of.count[which.cpu()],
        )
        self.delta_norm = moved / count.clamp_min(1)

    def log_probabilities(self, texts: Sequence[Sequence[int]], rows: int = 64) -> Tensor:
        """(row, text) mean log-probability of each text as the reply, nats per token.

        Texts go through the model together, up to ``rows`` rows at once. The cache stays as it is.
        """
        together = max(1, rows // len(self.next))
        parts = [
            self._of_some(texts[start : start + together])
            for start in range(0, len(texts), together)
        ]
        return torch.cat(parts, 1) if parts else torch.zeros(len(self.next), 0)

    def _of_some(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """As above, in one pass of text x row; what follows a text's end changes nothing."""
        n, count, device = len(self.next), len(texts), self.loaded.device
        lengths = torch.tensor([len(text) for text in texts], device=device)
        longest = int(lengths.max())
        ids = torch.zeros(count, longest, dtype=torch.long, device=device)
        for text, row in zip(texts, ids, strict=True):
            row[: len(text)] = torch.tensor(text, device=device)
        scores = self.next[:, ids[:, 0]].T[..., None]
        if longest > 1:
            which = torch.arange(n, device=device).repeat(count) if count > 1 else None
            edits = self.edits.repeated(count)
            edits.mask = self._on_reply.repeat(count, 1).expand(-1, longest - 1)
            with edited(self.loaded, edits):
                logits = self.loaded.last_logits(
                    longest - 1,
                    input_ids=ids[:, :-1].repeat_interleave(n, 0),
                    past_key_values=forked(self.cache, which),
                    use_cache=True,
                )
            wanted = ids[:, 1:].repeat_interleave(n, 0)[..., None]
            later = logits.log_softmax(-1).gather(2, wanted)
            scores = torch.cat([scores, later.unflatten(0, (count, n))[..., 0]], 2)
        real = torch.arange(longest, device=device) < lengths[:, None, None]
        return ((scores * real).sum(-1) / lengths[:, None]).T.cpu()

    def replies(self, max_new_tokens: int) -> list[tuple[int, ...]]:
        """Greedy replies as token ids. Uses the cache up."""
        stops = set(stop_ids(self.loaded))
        replies: list[list[int]] = [[] for _ in range(len(self.next))]
        left, token = torch.arange(len(self.next)), self.next.argmax(-1)
        ended = torch.zeros(len(left), dtype=torch.bool)
        for step in range(max_new_tokens):
            ended |= torch.tensor([t in stops for t in token.tolist()])
            for row in (~ended).nonzero()[:, 0].tolist():
                replies[int(left[row])].append(int(token[row]))
            if ended.all() or step == max_new_tokens - 1:
                break
            needed = ~ended
            needed[self.edits.leader[~ended].cpu()] = True  # who is followed goes on
            if not needed.all():
                keep = needed.nonzero()[:, 0].to(token.device)
                left, token, ended = left[keep.cpu()], token[keep], ended[keep.cpu()]
                self.cache.batch_select_indices(keep)
                self._on_reply = self._on_reply[keep]
                self.edits.select(keep)
            self.edits.mask = self._on_reply
            with edited(self.loaded, self.edits):
                logits = self.loaded.last_logits(
                    1, input_ids=token[:, None], past_key_values=self.cache, use_cache=True
                )
            token = logits[:, -1].argmax(-1)
        return [tuple(reply) for reply in replies]
