"""Hidden states and logits of many candidates of one slot, by packed passes (``core/packed.py``).

Keys and values of what stands before the suffix, and of the current suffix, are kept. A candidate
that first differs from the current suffix at position p is fed from p on; many candidates go
through the model in one flat batch.

A *rough* pass runs on a copy of the model with coarser products (``attacks/rough.py``). It starts
from what the exact model computes for the current suffix, which the copy never runs itself.

The *bound* of a candidate is its loss with logits over a few likely tokens (and the target) in
place of the whole vocabulary: log sum_S exp - logit_target never exceeds a token's NLL. The likely
tokens are the top of the current suffix's distributions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from attacks.likelihood import target_nll
from attacks.rough import Known, RoughModel
from core.batching import BatchSize
from core.head import Head, head_of
from core.models import LoadedModel
from core.packed import Group, PackedDecoder
from core.prefix import keeps_keys_and_values_only

LIKELY = 1024
"""Tokens per target position that the lower bound looks at,"""
LIKELY_SHARE = 4
"""but over all positions at most this part of the vocabulary, so that the bound stays cheap."""
HEAD_BATCH = 16
"""Candidates whose logits over the whole vocabulary are held at once."""
GROUP_BLOCK = 4
"""On a GPU shared lengths are rounded down to a multiple: fewer kernels, a few more tokens fed."""


def shared_length(current: Tensor, suffix: Tensor) -> int:
    """How many of a candidate's first tokens are the current suffix's; its last is always fed."""
    length = min(len(current), len(suffix))
    same = (suffix[:length] == current[:length]).long().cumprod(0).sum()
    return min(int(same), len(suffix) - 1)


class PackedScorer:
    """Packed passes over suffixes of one slot.

    Args:
        before: (tokens,) ids in front of the suffix.
        rest: ids behind it, up to the last target token but one.
        target: (T,) ids.
        batch: candidates that go through the model at once.
        mellowmax: see ``target_nll``.
        rough: the copy of the model that rough passes run on; None: there are none. It is only as
            good as the weights that it was made of.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        before: Tensor,
        rest: Tensor,
        target: Tensor,
        *,
        batch: BatchSize,
        mellowmax: float,
        rough: RoughModel | None = None,
    ) -> None:
        self.loaded, self.before, self.rest, self.target = loaded, before, rest, target
        self.batch, self._mellowmax, self.rough = batch, mellowmax, rough
        self._embed = loaded.model.get_input_embeddings()
        self.fed = 0
        """Tokens that went through the model."""
        self._current = before[:0]
        self._likely: Tensor | None = None
        self._bounding: Head | None = None  # over likely tokens
        self._known: Known = {}

    def start(self, probe: Tensor) -> str | None:
        """Compute the prefix; the reason why packing cannot serve this model, or None.

        ``probe`` (tokens,) is a whole prompt that the head is tried on.
        """
        self._current, self._likely, self._known = self.before[:0], None, {}
        self._head = head_of(self.loaded, probe)
        if not self._head.usable:
            return "its logits are not an elementwise function of a linear head's"
        if not keeps_keys_and_values_only(self.loaded):
            return "it keeps more than keys and values"
        self._packed = PackedDecoder(self.loaded)
        self._rough_packed = self._packed
        if self.rough:
            self._rough_packed = PackedDecoder(self.rough.loaded, self._packed)
        if len(self.before):
            self.fed += len(self.before)
            with torch.no_grad():
                group = Group(0, len(self.before), 1)
                self._packed.hidden(self._embed(self.before), [group], keep=group.length)
        return None

    @property
    def can_be_rough(self) -> bool:
        """Whether there is a copy, and a current suffix that it can start from."""
        return self.rough is not None and bool(self._known)

    @property
    def likely_tokens(self) -> int:
        """How many tokens a bound looks at; 0 before the first ``logits_of_current``."""
        return 0 if self._likely is None else len(self._likely)

    def logits_of_current(self, suffix: Tensor, leaf: Tensor) -> Tensor:
        """(T, vocabulary) logits of one suffix, which becomes the current one.

        ``leaf`` (suffix length, d_model) holds its embeddings, which a gradient may be asked of.
        """
        self._current = suffix[:0]  # until the pass is through, nothing may share half of it
        fed = torch.cat([leaf, self._embed(self.rest)])
        shared = len(self.before)
        keep = shared + len(suffix)
        self.fed += len(fed)
        watching: AbstractContextManager[Known] = nullcontext({})
        if self.rough:
            watching = self.rough.watching(len(fed))
        with watching as known:
            hidden = self._packed.hidden(fed, [Group(shared, len(fed), 1)], keep=keep)
        self._known = known
        logits = self._head.logits(hidden[-len(self.target) :])
        self._current = suffix
        each = max(1, min(LIKELY, logits.shape[1] // LIKELY_SHARE // len(self.target)))
        likely = logits.detach().topk(each).indices.flatten()
        self._likely, self._bounding = torch.cat([likely, self.target]).unique(), None
        return logits

    def logits_of(self, fed: Tensor) -> Tensor:
        """(row, fed, d_model) embeddings behind the prefix -> (row, T, vocabulary)."""
        group = Group(len(self.before), fed.shape[1], len(fed))
        self.fed += group.tokens
        hidden = self._packed.hidden(fed.flatten(0, 1), [group]).unflatten(0, fed.shape[:2])
        return self._head.logits(hidden[:, -len(self.target) :].flatten(0, 1)).unflatten(
            0, (len(fed), -1)
        )

    def hidden(self, suffixes: Sequence[Tensor], *, rough: bool = False) -> Tensor:
        """Candidates of any lengths -> (candidate, T, d_model) states that predict the target."""
        block = 1 if self.loaded.device.type == "cpu" else GROUP_BLOCK
        decoder, two = self._rough_packed if rough else self._packed, self.loaded.side_by_side
        suffixes, current = [s.cpu() for s in suffixes], self._current.cpu()
        shared = torch.tensor([shared_length(current, s) // block * block for s in suffixes])
        lengths = torch.tensor([len(s) for s in suffixes]) - shared + len(self.rest)
        self.fed += int(lengths.sum())
        order = (shared * (int(lengths.max()) + 1) + lengths).argsort(stable=True)
        rest, count = self.rest.cpu(), len(self.target)

        def batch_of(part: Sequence[int]) -> tuple[Tensor, list[Group], Tensor]:
            """Embeddings, groups and predicting positions of some candidates, in ``order``."""
            rows = torch.stack([shared[torch.tensor(part)], lengths[torch.tensor(part)]], 1)
            groups = [
                Group(len(self.before) + int(start), int(length), int(number))
                for (start, length), number in zip(
                    *rows.unique(dim=0, return_counts=True), strict=True
                )
            ]
            pieces = [piece for i in part for piece in (suffixes[i][shared[i] :], rest)]
            ends = torch.cumsum(rows[:, 1], 0)
            predicting = ends[:, None] + torch.arange(-count, 0)
            device = self.loaded.device
            return self._embed(torch.cat(pieces).to(device)), groups, predicting.to(device)

        def score(part: Sequence[int]) -> Tensor:
            if not two or len(part) < 2:
                embeddings, groups, predicting = batch_of(part)
                return decoder.hidden(embeddings, groups)[predicting]
            halves = [batch_of(part[start::2]) for start in (0, 1)]
            both = decoder.hidden_of_two([half[:2] for half in halves])
            whole = both[0].new_empty(len(part), count, both[0].shape[1])
            for start, (hidden, half) in enumerate(zip(both, halves, strict=True)):
                whole[start::2] = hidden[half[2]]
            return whole

        with self._comparing() if rough else nullcontext():
            states = torch.cat(list(self.batch.over(order.tolist(), score)))
        return states[order.argsort().to(self.loaded.device)]

    def _comparing(self) -> AbstractContextManager[None]:
        """Fed tokens of the copy go with those of the current suffix at the same positions."""
        assert self.rough is not None
        first, fed = len(self.before), len(self._current) + len(self.rest)
        decoder = self._rough_packed
        return self.rough.comparing(
            self._known, lambda: (decoder.positions - first).clamp_(max=fed - 1)
        )

    def losses(self, hidden: Tensor) -> Tensor:
        """(candidate, T, d_model) -> (candidate,) losses by the whole head, float32 on the CPU."""
        return self._nll(hidden, self._head, self.target)

    def bounds(self, hidden: Tensor) -> Tensor:
        """(candidate, T, d_model) -> (candidate,) lower bounds of the losses."""
        assert self._likely is not None
        self._bounding = self._bounding or self._head.restricted(self._likely)
        target = torch.searchsorted(self._likely, self.target)
        return self._nll(hidden, self._bounding, target)

    def _nll(self, hidden: Tensor, head: Head, target: Tensor) -> Tensor:
        logits = (
            head.logits(part.flatten(0, 1)).unflatten(0, part.shape[:2])
            for part in hidden.split(HEAD_BATCH)
        )
        return torch.cat([target_nll(part, target, self._mellowmax).cpu() for part in logits])
