"""How likely texts are as replies: mean log-probability per token, teacher-forced, in nats.

    score(prompt, text) = (1 / T) sum_t log p(text_t | prompt, text_<t),   T = tokens of the text

1. ``Continuations`` reads prompts once, their common start once for all of them, and keeps their
   keys and values. Each text is then run after all of them in one batch: a table of prompts by
   texts.
2. ``after_own_prompt`` runs each text after its own prompt: the diagonal of such a table.

Both give the same numbers. Models that keep more than keys and values of earlier tokens are served
by whole sequences, which is slower and equally exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core.batching import BatchSize
from core.models import LoadedModel
from core.prefix import (
    SharedPrefix,
    forked,
    keeps_keys_and_values_only,
    shared_length,
    shares_a_start,
)

Ids = Sequence[int]
LOGIT_BYTES = 1 << 28
"""Of the logits of one batch of texts."""


class Continuations:
    """Prompts of one model, read once, and how likely texts are after them.

    Args:
        prompts: token ids of rendered prompts, up to the reply. They are read as one batch.

    Attributes:
        next: (prompt, vocabulary) log-probabilities of the first token of a reply.
    """

    @torch.no_grad()
    def __init__(self, loaded: LoadedModel, prompts: Sequence[Ids]) -> None:
        self.loaded, self.prompts = loaded, [list(p) for p in prompts]
        self._cached = keeps_keys_and_values_only(loaded)
        last = min(map(len, self.prompts)) - 1  # so that something of every prompt is left
        start = shared_length(self.prompts, last) if shares_a_start(loaded) else 0
        first = torch.tensor(self.prompts[0][:start], dtype=torch.long)
        prefix = SharedPrefix(loaded, first)
        n = len(prompts)
        ids, mask = _padded([p[start:] for p in self.prompts], loaded.device, left=True)
        self._mask = torch.cat([mask.new_ones(n, start), mask], 1)
        self._cache = prefix.expanded(n)
        options = {"past_key_values": self._cache, "use_cache": True} if self._cached else {}
        logits = loaded.last_logits(
            1,
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=(self._mask.cumsum(1) - 1).clamp_min(0)[:, start:],
            **options,
        )
        self.next = logits[:, -1].log_softmax(-1)

    @torch.no_grad()
    def log_probabilities(self, texts: Sequence[Ids]) -> Tensor:
        """(prompt, text) mean log-probability of each text after each prompt, nats per token."""
        n = len(self.prompts)
        if not self._cached:
            columns = [after_own_prompt(self.loaded, self.prompts, [text] * n) for text in texts]
            return torch.stack(columns, 1)
        table = torch.full((n, len(texts)), torch.nan)
        order = sorted(
            (i for i, text in enumerate(texts) if len(text)), key=lambda i: len(texts[i])
        )

        def work(part: Sequence[int]) -> None:
            table[:, list(part)] = self._block([texts[i] for i in part])

        budget = max(1, LOGIT_BYTES // (4 * self.next.shape[1]))
        for _ in BatchSize(budget).over(order, work, cost=lambda i: n * len(texts[i])):
            pass
        return table

    def _block(self, texts: Sequence[Ids]) -> Tensor:
        """(prompt, text) of some texts, in one batch of all pairs."""
        n = len(self.prompts)
        device = self.loaded.device
        prompt = torch.arange(n, device=device).repeat(len(texts))
        ids, real = (x.repeat_interleave(n, 0) for x in _padded(texts, device, left=False))
        scores = [self.next[prompt].gather(1, ids[:, :1])]
        if ids.shape[1] > 1:
            fed = ids[:, :-1]
            lengths = self._mask.sum(1)[prompt, None]
            logits = self.loaded.last_logits(
                fed.shape[1],
                input_ids=fed,
                attention_mask=torch.cat([self._mask[prompt], real[:, :-1]], 1),
                position_ids=lengths + torch.arange(fed.shape[1], device=device),
                past_key_values=forked(self._cache, prompt),
                use_cache=True,
            )
            scores.append(_log_probability(logits, ids[:, 1:]))
        mean = (torch.cat(scores, 1) * real).sum(1) / real.sum(1)
        return mean.unflatten(0, (len(texts), n)).T.cpu()


@torch.no_grad()
def after_own_prompt(
    loaded: LoadedModel, prompts: Sequence[Ids], texts: Sequence[Ids], *, batch_size: int = 8
) -> Tensor:
    """(row,) mean log-probability of text i after prompt i, nats per token; NaN for no tokens."""
    values = torch.full((len(prompts),), torch.nan)
    order = sorted(
        (i for i, text in enumerate(texts) if len(text)),
        key=lambda i: len(prompts[i]) + len(texts[i]),
    )

    def work(part: Sequence[int]) -> None:
        whole = [[*prompts[i], *texts[i]] for i in part]
        ids, mask = _padded(whole, loaded.device, left=False)
        keep = max(ids.shape[1] - len(prompts[i]) + 1 for i in part)
        keep = min(keep, ids.shape[1])
        logits = loaded.last_logits(keep, input_ids=ids, attention_mask=mask)
        first = ids.shape[1] - keep  # the position of the first logit
        for row, i in enumerate(part):
            start, length = len(prompts[i]) - 1 - first, len(texts[i])
            target = torch.tensor(list(texts[i]), device=loaded.device)
            own = _log_probability(logits[row, start : start + length], target)
            values[i] = own.mean().cpu()

    for _ in BatchSize(batch_size).over(order, work):
        pass
    return values


def log_odds(log_probabilities: Tensor, tokens: Sequence[int]) -> Tensor:
    """(..., vocabulary) log-probabilities -> (...) log-odds that the next token is one of these.

    log sum_{t in tokens} p(t) - log (1 - that sum), in nats; NaN without tokens.
    """
    if not len(tokens):
        return torch.full(log_probabilities.shape[:-1], torch.nan)
    chosen = torch.zeros(log_probabilities.shape[-1], dtype=torch.bool)
    chosen[list(tokens)] = True
    chosen = chosen.to(log_probabilities.device)
    inside = log_probabilities.masked_fill(~chosen, -torch.inf).logsumexp(-1)
    return inside - log_probabilities.masked_fill(chosen, -torch.inf).logsumexp(-1)


def _log_probability(logits: Tensor, ids: Tensor) -> Tensor:
    """(..., vocabulary) logits and (...) ids -> (...) log-probabilities of the ids."""
    return logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)


def _padded(rows: Sequence[Ids], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """(row, tokens) ids and mask; what is padded is masked."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for n, row in enumerate(rows):
        here = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[n, here], mask[n, here] = torch.tensor(list(row), dtype=torch.long), 1
    return ids.to(device), mask.to(device)
