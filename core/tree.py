"""How likely the same texts are after many prompts: a prompt and all its texts are one row.

1. What all prompts begin with goes through the model once (``core/packed.py``).
2. A row is what is left of a prompt, and then all texts, one after another. A text stands at the
   positions behind the prompt, and sees the prompt and itself, but no other text.
3. Rows lie in one flat batch. So nothing is padded, and no keys and values are copied for a text.

Whether a model can be read so is found once, by comparing with plain passes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from core.decoding import TOLERANCE
from core.head import Head, head_of
from core.models import LoadedModel
from core.packed import Group, PackedDecoder
from core.prefix import keeps_keys_and_values_only, shared_length

log = logging.getLogger(__name__)
Ids = Sequence[int]
KEPT = "_attack_plane_tree"
"""Where a model keeps whether it can be read so."""
LOGIT_BYTES = 1 << 28
"""Of the logits that are held at once."""


class _Rows:
    """Prompts without their start, each with all texts behind it, shortest first.

    Attributes:
        flat: token ids of all rows.
        last: (row,) where each prompt ends. behind: (row, fed token of the texts) places in
            ``flat``.
        back: puts rows into the order of the prompts.
    """

    def __init__(self, prompts: Sequence[Ids], start: int, texts: Sequence[Ids]) -> None:
        fed = [token for text in texts for token in text[:-1]]
        order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
        rows = [[*prompts[n][start:], *fed] for n in order]
        self.groups = [
            Group(start, size, len(list(same))) for size, same in groupby(map(len, rows))
        ]
        self.flat = torch.tensor([token for row in rows for token in row])
        ends = torch.tensor([len(row) for row in rows]).cumsum(0)
        self.last = ends - len(fed) - 1
        self.behind = ends[:, None] - len(fed) + torch.arange(len(fed))
        self.back = torch.tensor(order).argsort()


class TreeReader(PackedDecoder):
    """Reads texts after prompts of one model.

    Args:
        texts: token ids of each text; none is empty.
    """

    def __init__(self, loaded: LoadedModel, head: Head, texts: Sequence[Ids]) -> None:
        super().__init__(loaded)
        self.head, self.texts = head, [list(text) for text in texts]
        self._embed = loaded.model.get_input_embeddings()
        fed = [len(text) - 1 for text in self.texts]  # nothing is predicted after a last token
        self._after = torch.cat([torch.arange(n) for n in fed])
        self._owner = torch.arange(1, len(fed) + 1).repeat_interleave(torch.tensor(fed))
        self._with_texts = False  # whether the rows that run now have texts behind them

    @torch.no_grad()
    def read(self, prompts: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        """(prompt, text) mean log-probability, nats per token; (prompt, vocabulary) of the next.

        Args:
            prompts: token ids of rendered prompts, up to the reply. They are read as one batch.
        """
        start = shared_length(prompts, min(map(len, prompts)) - 1)
        self._masks, self._with_texts = {}, False
        if start:
            ids = torch.tensor(list(prompts[0][:start]), device=self.loaded.device)
            self.hidden(self._embed(ids), [Group(0, start, 1)], keep=start)
        rows = _Rows(prompts, start, self.texts)
        return self._scores(self._embed(rows.flat.to(self.loaded.device)), rows)

    def with_gradients(self, prompts: Sequence[Ids]) -> Tensor:
        """(prompt, text) as ``read``; gradients flow to the residuals of all tokens."""
        rows = _Rows(prompts, 0, self.texts)
        with torch.enable_grad():
            entered = self._embed(rows.flat.to(self.loaded.device)).detach().requires_grad_(True)
            return self._scores(entered, rows)[0]

    def _scores(self, entered: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
        self._masks, self._with_texts = {}, True
        hidden = self.hidden(entered, rows.groups)
        last = self.head.logits(hidden[rows.last.to(hidden.device)]).log_softmax(-1)
        scores = torch.cat([self._first(last), self._later(hidden, rows.behind)], 1)
        return (scores @ self._mean())[rows.back], last[rows.back.to(last.device)]

    def _first(self, last: Tensor) -> Tensor:
        """(row, vocabulary) -> (row, text) log-probability of each text's first token."""
        return last[:, [text[0] for text in self.texts]].cpu()

    def _later(self, hidden: Tensor, behind: Tensor) -> Tensor:
        """(row, fed token of the texts) log-probability of the token after it."""
        wanted = torch.tensor([token for text in self.texts for token in text[1:]])
        together = max(1, LOGIT_BYTES // (4 * self.head.tokens * max(1, len(wanted))))
        parts = [torch.zeros(0, len(wanted))]
        for some in behind.split(together):
            logits = self.head.logits(hidden[some.flatten().to(hidden.device)])
            target = wanted.repeat(len(some)).to(logits.device)
            own = logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)
            parts.append(own.unflatten(0, (len(some), len(wanted))).cpu())
        return torch.cat(parts)

    def _mean(self) -> Tensor:
        """(token, text) shares: first tokens of all texts, then the others, as they lie."""
        owner = torch.cat([torch.arange(1, len(self.texts) + 1), self._owner])
        lengths = torch.tensor([len(text) for text in self.texts])
        return (owner[:, None] == torch.arange(1, len(lengths) + 1)) / lengths

    # --- the form of a row ------------------------------------------------------------------------
    def _positions(self, group: Group) -> Tensor:
        if not self._with_texts:
            return super()._positions(group)
        before = group.shared + group.length - len(self._after)
        return torch.cat([torch.arange(group.shared, before), before + self._after])

    def _visible(self, group: Group, window: int | None) -> Tensor:
        visible = super()._visible(group, window)
        if not self._with_texts:
            return visible
        rest = group.length - len(self._after)
        owner = torch.cat([torch.zeros(group.shared + rest, dtype=torch.long), self._owner])
        mine = owner[group.shared :, None]
        return visible & ((owner == 0) | (owner == mine))


def reader_of(loaded: LoadedModel, texts: Sequence[Ids], probe: Ids) -> TreeReader | None:
    """A reader of these texts; None where this model cannot be read so."""
    if not texts or not all(map(len, texts)) or not keeps_keys_and_values_only(loaded):
        return None
    head = head_of(loaded, torch.tensor(list(probe)))
    if not head.usable:
        return None
    known: bool | None = vars(loaded).get(KEPT)
    if known is None:
        known = vars(loaded)[KEPT] = _agrees(loaded, head, list(probe))
    return TreeReader(loaded, head, texts) if known else None


def _agrees(loaded: LoadedModel, head: Head, probe: list[int]) -> bool:
    """Whether two texts after two prompts have the log-probabilities of plain passes."""
    prompts, texts = [probe, probe[:-1]], [probe[-2:], [*probe[-1:], *probe[-2:]]]
    if len(probe) < 3:
        return False
    try:
        found, _ = TreeReader(loaded, head, texts).read(prompts)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, IndexError) as error:
        log.warning("%s: texts are read by transformers (%s)", loaded.spec, type(error).__name__)
        return False
    plain = torch.tensor([[_plain(loaded, p, t) for t in texts] for p in prompts])
    worst = float((found - plain).abs().max())
    if worst > (limit := TOLERANCE[loaded.dtype] * float(plain.abs().max())):
        log.warning("%s: texts are read by transformers (they differ by %.2g)", loaded.spec, worst)
    return worst <= limit


@torch.no_grad()
def _plain(loaded: LoadedModel, prompt: list[int], text: list[int]) -> float:
    ids = torch.tensor([[*prompt, *text]], device=loaded.device)
    logits = loaded.last_logits(len(text) + 1, input_ids=ids, use_cache=False)[0, :-1].float()
    own = logits.log_softmax(-1).gather(1, torch.tensor(text, device=logits.device)[:, None])
    return float(own.mean())
