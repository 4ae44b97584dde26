"""What a model does under many interventions: next token, log-probability of refusals, greedy
replies.

Interventions are rows of one batch, each row with its own edit. Work that rows share is done once:

1. Tokens that all prompts share at the start (system prompt, template) go through the model once an
   intervention, not once a prompt: an edit changes them in the same way before every prompt.
2. Each prompt goes through once unedited: its next-token distribution (the reference of KL), keys
   and values, and the residual entering the lowest edited layer L. The edited pass skips the blocks
   below L, where no edit has happened yet, and takes their keys and values from the unedited one.
3. From its cache each refusal text is scored, then replies are decoded greedily; rows that end
   leave the batch.

A matched control follows its intervention: it stands in the same batch and moves every token as far
as that one does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from core.batching import BatchSize
from core.errors import AttackPlaneError
from core.generate import stop_ids
from core.models import LoadedModel
from core.prefix import forked, keeps_keys_and_values_only
from core.prompt import Prompt
from geometry.activations import read_residuals, shared_length
from geometry.interventions import Edits, Intervention, edited, touched

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """Of one prompt under one intervention.

    ``kl``: KL(plain || edited) of the next token, nats. ``refusal``: mean log-probability of the
    refusals, nats per token (NaN without refusals). ``reply``: token ids, without the end of turn.
    ``delta_norm``: mean length of what was added to a touched token of the prompt at one layer, in
    units of the residual.
    """

    kl: float
    refusal: float
    reply: tuple[int, ...]
    delta_norm: float


@contextmanager
def _skipped(
    loaded: LoadedModel, layer: int, residual: Tensor, kinds: Sequence[bool]
) -> Iterator[None]:
    """While open, blocks below ``layer`` compute nothing and the last of them returns ``residual``
    (row, token, d_model).

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


class _Edited:
    """Some interventions (leaders with their followers) on one model, and their keys and values of
    the shared prefix."""

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
        """Unedited: (row, vocabulary) next log-probabilities, the residual at ``start``, which
        blocks return a tuple."""
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


class _Batch:
    """Prompts of one length under the interventions of an ``_Edited``; row = prompt x interventions
    + intervention."""

    def __init__(self, of: _Edited, prompts: Sequence[Prompt], shared: int) -> None:
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

    def refusals(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """(row,) mean log-probability of the texts (token ids), nats per token; the cache stays as
        it is."""
        found = []
        for text in texts:
            ids = torch.tensor(text, device=self.loaded.device)
            scores = [self.next[:, None, ids[:1]]]
            if len(ids) > 1:
                rows = ids[None, :-1].expand(len(self.next), -1)
                self.edits.mask = self._on_reply.expand(-1, rows.shape[1])
                with edited(self.loaded, self.edits):
                    logits = self.loaded.last_logits(
                        rows.shape[1],
                        input_ids=rows,
                        past_key_values=forked(self.cache),
                        use_cache=True,
                    )
                scores.append(
                    logits.log_softmax(-1).gather(2, ids[None, 1:, None].expand(len(rows), -1, -1))
                )
            found.append(torch.cat([s.flatten(1) for s in scores], 1).mean(1))
        return (
            torch.stack(found).mean(0).cpu() if found else torch.full((len(self.next),), torch.nan)
        )

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


def _may_share(
    loaded: LoadedModel, prompt: Prompt, interventions: Sequence[Intervention | None]
) -> bool:
    """Whether skipping blocks changes nothing on this model; tried on one prompt with the highest
    edit."""
    highest = max(interventions, key=_lowest)
    if highest is None or highest.follows is not None or _lowest(highest) < 1:
        return True  # nothing would be skipped
    place = torch.zeros(1, 0)
    nothing = torch.zeros(0, dtype=torch.long, device=loaded.device)
    whole = _Batch(_Edited(loaded, [highest], nothing, place, False), [prompt], 0)
    try:
        shared = _Batch(_Edited(loaded, [highest], nothing, place, True), [prompt], 0)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        log.warning("%s: blocks are not skipped (%s: %s)", loaded.spec, type(error).__name__, error)
        return False
    worst = float((shared.next.exp() - whole.next.exp()).abs().max())
    bound = 1e-3 if loaded.dtype == torch.float32 else 3e-2
    if worst > bound:
        log.warning("%s: blocks are not skipped (probabilities differ by %.1g)", loaded.spec, worst)
    return worst <= bound


def _lowest(edit: Intervention | None) -> int:
    return min(edit.layers) if edit and edit.layers else -1


def _units(interventions: Sequence[Intervention | None]) -> list[list[int]]:
    """Indices of each intervention that follows none, with its followers; those that begin at one
    layer side by side.

    Raises:
        AttackPlaneError: a follower without the one that it follows.
    """
    units = {n: [n] for n, edit in enumerate(interventions) if edit is None or edit.follows is None}
    of = {id(interventions[n]): n for n in units}
    for n, edit in enumerate(interventions):
        if edit is not None and edit.follows is not None:
            if id(edit.follows) not in of:
                raise AttackPlaneError(
                    "a matched control needs its intervention in the same list", got=edit.name
                )
            units[of[id(edit.follows)]].append(n)
    return sorted(units.values(), key=lambda unit: _lowest(interventions[unit[0]]))


@torch.no_grad()
def rollout(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    interventions: Sequence[Intervention | None],
    *,
    refusals: Sequence[Sequence[int]] = (),
    max_new_tokens: int = 0,
    share: bool = True,
    rows: int = 64,
    description: str = "interventions",
) -> list[list[Outcome]]:
    """Outcomes of every prompt (outer list) under every intervention (inner list; None: left
    alone).

    Args:
        refusals: token ids of refusals as replies. max_new_tokens: of the replies; 0 decodes none.
        share: False recomputes the layers below the lowest edited one for every row.
        rows: most rows of a batch.
    """
    if not keeps_keys_and_values_only(loaded):
        raise AttackPlaneError(
            "interventions serve models that keep keys and values only of earlier tokens",
            where=loaded.spec,
            got="recurrent, convolution or shared state",
            remedy="choose a model with attention in every layer",
        )
    share = share and _may_share(loaded, prompts[0], interventions)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    shared = shared_length([p.ids for p in prompts], min(p.t_inst for p in prompts)) if share else 0
    masks = {
        where: torch.stack([touched(p, where)[0][:shared] for p in prompts])
        for where in {edit.where for edit in interventions if edit}
    }
    if any((mask != mask[0]).any() for mask in masks.values()):
        shared = 0  # a place counted from the end lies in the shared tokens of some prompts only
    masks[""] = torch.zeros(1, max(shared, 0))
    prefix = torch.tensor(prompts[0].ids[:shared], dtype=torch.long, device=loaded.device)
    found: dict[tuple[int, int], Outcome] = {}
    batches = BatchSize(rows)
    with tqdm(
        total=len(prompts) * len(interventions), desc=description, unit="row", leave=False
    ) as bar:

        def work(units: Sequence[list[int]]) -> None:
            chosen = [n for unit in units for n in unit]
            edits = [interventions[n] for n in chosen]
            place = torch.stack([masks[edit.where if edit else ""][0][:shared] for edit in edits])
            of = _Edited(loaded, edits, prefix, place, share)

            def read(some: Sequence[int]) -> None:
                batch = _Batch(of, [prompts[p] for p in some], shared)
                scores, delta = batch.refusals(refusals), batch.delta_norm
                replies = batch.replies(max_new_tokens) if max_new_tokens else [()] * len(delta)
                for row, cell in enumerate((p, n) for p in some for n in chosen):
                    numbers = (
                        float(batch.kl[row]),
                        float(scores[row]),
                        replies[row],
                        float(delta[row]),
                    )
                    found[cell] = Outcome(*numbers)
                bar.update(len(delta))

            for _, same in groupby(order, key=lambda i: len(prompts[i].ids)):
                for _ in BatchSize(batches.value).over(
                    list(same), read, cost=lambda _: len(chosen)
                ):
                    pass

        for _, level in groupby(
            _units(interventions), key=lambda unit: _lowest(interventions[unit[0]])
        ):
            for _ in batches.over(list(level), work, cost=len):
                pass
    return [[found[p, n] for n in range(len(interventions))] for p in range(len(prompts))]
