"""What a model does under many interventions: its next token, refusals' log-probability, replies.

Each row of a batch has an intervention of its own. Work that rows share is done once:

1. Tokens that all prompts share at the start, such as the system prompt, go through the model once
   for each intervention. They need not be run for each prompt: an edit changes them in the same
   way whatever follows.
2. Each prompt goes through once without an edit. This gives its next-token distribution, which is
   the reference of KL, its keys and values, and the residual that enters the lowest edited layer.
   The edited pass starts at that layer and takes the keys and values below it from this pass.
3. From its cache each row scores the refusal texts. Then it decodes a reply greedily. Rows whose
   reply has ended leave the batch.

A matched control stands in the same batch as its intervention, because it moves every token exactly
as far as the intervention does in that pass.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from core.batching import BatchSize
from core.continuations import log_odds
from core.errors import AttackPlaneError
from core.models import LoadedModel
from core.prefix import keeps_keys_and_values_only, shared_length
from core.progress import bar as progress_bar
from core.prompt import Prompt
from geometry.edited_batch import EditedBatch, SharedEdits
from geometry.interventions import Intervention, touched

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What one prompt led to under one intervention.

    Attributes:
        kl: KL(plain || edited) of the next token, nats.
        refusal: mean log-probability of the refusal texts, nats per token; NaN without such texts.
        d: ``refusal`` less the mean log-probability of the compliance texts (outcome D), nats per
            token; NaN without both.
        log_odds: that the next token is one of the refusal tokens, nats; NaN without such tokens.
        reply: token ids, without the end of turn.
        delta_norm: mean length of what was added to an edited token of the prompt at one layer, in
            units of the residual.
    """

    kl: float
    refusal: float
    d: float
    log_odds: float
    reply: tuple[int, ...]
    delta_norm: float


def _may_share(
    loaded: LoadedModel, prompt: Prompt, interventions: Sequence[Intervention | None]
) -> bool:
    """Whether this model gives the same result when blocks are skipped.

    One prompt is tried, with the intervention that begins at the highest layer.
    """
    highest = max(interventions, key=_lowest)
    if highest is None or highest.follows is not None or _lowest(highest) < 1:
        return True  # nothing would be skipped
    place = torch.zeros(1, 0)
    nothing = torch.zeros(0, dtype=torch.long, device=loaded.device)
    whole = EditedBatch(SharedEdits(loaded, [highest], nothing, place, False), [prompt], 0)
    try:
        shared = EditedBatch(SharedEdits(loaded, [highest], nothing, place, True), [prompt], 0)
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
    """Groups of indices: each intervention together with the controls that follow it.

    Groups that begin at one layer stand side by side.

    Raises:
        AttackPlaneError: a control whose intervention is missing.
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
    compliances: Sequence[Sequence[int]] = (),
    refusal_tokens: Sequence[int] = (),
    max_new_tokens: int = 0,
    share: bool = True,
    rows: int = 64,
    description: str = "interventions",
) -> list[list[Outcome]]:
    """The outcome of every prompt (outer list) under every intervention (inner list).

    Args:
        interventions: None stands for the model left alone.
        refusals: token ids of refusals, read as replies.
        compliances: token ids of openings that comply; with refusals they give ``d``.
        refusal_tokens: first tokens of refusals, for ``log_odds``.
        max_new_tokens: length of the replies; 0 decodes none.
        share: False recomputes the layers below the lowest edited one for every row.
        rows: the largest number of rows in a batch.
    """
    if not keeps_keys_and_values_only(loaded):
        raise AttackPlaneError(
            "interventions serve models that keep keys and values only of earlier tokens",
            where=loaded.spec,
            got=loaded.hook or "recurrent, convolution or shared state",
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
    outcomes: dict[tuple[int, int], Outcome] = {}
    batches = BatchSize(rows)
    with progress_bar(len(prompts) * len(interventions), description, "row") as bar:

        def work(units: Sequence[list[int]]) -> None:
            chosen = [n for unit in units for n in unit]
            edits = [interventions[n] for n in chosen]
            place = torch.stack([masks[edit.where if edit else ""][0][:shared] for edit in edits])
            of = SharedEdits(loaded, edits, prefix, place, share)

            inner = BatchSize(batches.value)

            def read(some: Sequence[int]) -> None:
                batch = EditedBatch(of, [prompts[p] for p in some], shared)
                scores = batch.log_probabilities([*refusals, *compliances], inner.value)
                refusal = scores[:, : len(refusals)].mean(1)  # NaN without texts
                d = refusal - scores[:, len(refusals) :].mean(1)
                odds = log_odds(batch.next, refusal_tokens).cpu()
                delta = batch.delta_norm
                replies = batch.replies(max_new_tokens) if max_new_tokens else [()] * len(delta)
                for row, cell in enumerate((p, n) for p in some for n in chosen):
                    outcomes[cell] = Outcome(
                        kl=float(batch.kl[row]),
                        refusal=float(refusal[row]),
                        d=float(d[row]),
                        log_odds=float(odds[row]),
                        reply=replies[row],
                        delta_norm=float(delta[row]),
                    )
                bar.update(len(delta))

            for _, same in groupby(order, key=lambda i: len(prompts[i].ids)):
                for _ in inner.over(list(same), read, cost=lambda _: len(chosen)):
                    pass

        for _, level in groupby(
            _units(interventions), key=lambda unit: _lowest(interventions[unit[0]])
        ):
            for _ in batches.over(list(level), work, cost=len):
                pass
    return [[outcomes[p, n] for n in range(len(interventions))] for p in range(len(prompts))]
