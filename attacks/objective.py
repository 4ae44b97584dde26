"""The target loss and its token gradient: one copy, used by every attack that optimises a prompt.

    loss(suffix) = -(1/T) sum_t log p(target_t | before, suffix, after, target_<t)

in nats per target token. The last target token is not fed; the head is applied at the T predicting
positions only. There are three ways to run the model. All are exact; the first that serves a model
is taken:

``packed``  keys and values of ``before`` and of the current suffix are shared
            (``attacks/packed_scorer.py``)
``cached``  keys and values of ``before`` are shared (``core/prefix.py``)
``plain``   whole sequences

The token gradient is d loss / d one-hot(suffix) = (gradient at the suffix embeddings) @
embedding_table^T (GCG, arXiv 2307.15043, algorithm 1). Its forward pass leaves the current
suffix's keys and values for the candidates.

``best`` needs only the argmin. A candidate whose lower bound exceeds the best complete loss is out
without its full head (float32 only: coarser rounding would blur the bound).

What is kept of the prefix belongs to the weights of the moment: after a training step call
``weights_changed``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from attacks.damping import damped
from attacks.gcg import GCGConfig
from attacks.likelihood import ROUNDING, target_nll
from attacks.packed_scorer import PackedScorer
from attacks.rough import RoughModel
from attacks.slot import Slot, SuffixSlot
from core.batching import BatchSize, memory_budget
from core.models import LoadedModel
from core.prefix import SharedPrefix

log = logging.getLogger(__name__)

PATHS = ("packed", "cached", "plain")
BOUND_MARGIN = 1e-4
"""Rounding (nats per token) allowed between a bound and the loss it bounds, in float32."""
CPU_CANDIDATES, GPU_CANDIDATES = 128, 512
"""Most candidates of a batch. Larger ones gain nothing on a CPU (docs/lab-log.md)."""


class TargetLoss:
    """Scores suffixes of one slot on one model.

    Args:
        batch_size: candidates that go through the model at once; None takes what fits.
        path: one of ``PATHS``; None takes the first that serves the model, which is tried on the
            initial suffix.
        mellowmax: alpha of ``target_nll``; 0: the mean.
        rough: the copy of the model that ``rough_losses`` come from, on the packed path.
        lsgm: see ``damped``; 1: the gradient of the loss.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        slot: Slot,
        *,
        batch_size: int | None = None,
        path: str | None = None,
        mellowmax: float = 0.0,
        rough: RoughModel | None = None,
        lsgm: float = 1.0,
    ) -> None:
        self.loaded, self._mellowmax, self._lsgm = loaded, mellowmax, lsgm
        self.before, self._initial, self.after, self.target = (
            torch.tensor(ids, dtype=torch.long, device=loaded.device)
            for ids in (slot.before_ids, slot.initial_ids, slot.after_ids, slot.target_ids)
        )
        self._embed = loaded.model.get_input_embeddings()
        self._rest = torch.cat([self.after, self.target[:-1]])
        self._parameters = sum(p.numel() for p in loaded.model.parameters())
        self._tokens = self._tokens_back = 0  # tokens outside of the scorer, tokens of gradients
        self.fully_scored = 0
        """Candidates whose whole head was computed in the last ``best``."""
        self.matches = False
        """Whether greedy decoding gives the target after the suffix last differentiated."""
        self.batch = BatchSize(batch_size or self._fitting(len(slot.initial_ids)))
        self.scorer = PackedScorer(
            loaded,
            *(self.before, self._rest, self.target),
            batch=self.batch,
            mellowmax=mellowmax,
            rough=rough,
        )
        self._asked = path
        self._begin()

    def _begin(self) -> None:
        """Choose the path and compute the prefix."""
        self.path = self._asked or "packed"
        if self.path == "packed" and (fault := self._fault_of_packing()):
            log.warning("%s: no packed scoring (%s)", self.loaded.spec, fault)
            self.path = "cached"
        if self.path == "cached":
            self.prefix = SharedPrefix(self.loaded, self.before)
            if not self.prefix.usable:
                self.path = "plain"

    def weights_changed(self) -> None:
        """Compute anew what is kept of the model: prefix, current suffix, embedding table.

        A rough copy is of the weights before: from here on rough losses are exact.
        """
        self.scorer.rough = None
        self.loaded.weights_changed()
        self._begin()

    def _fitting(self, suffix_length: int) -> int:
        """Candidates a batch within the memory budget, from the tensors that one needs."""
        config, width = self.loaded.config, self.loaded.dtype.itemsize
        fed = suffix_length + len(self._rest)
        whole = fed + len(self.before)
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        cache = 2 * config.num_hidden_layers * whole * config.hidden_size * width
        attention = config.num_attention_heads * fed * whole * width
        block = fed * (3 * inner + 6 * config.hidden_size) * width + attention
        head = 3 * len(self.target) * self.loaded.embedding_table.shape[0] * 4
        most = CPU_CANDIDATES if self.loaded.device.type == "cpu" else GPU_CANDIDATES
        return max(1, min(most, memory_budget(self.loaded.device) // (cache + block + head)))

    def _fault_of_packing(self) -> str | None:
        """The reason why packed passes cannot be used on this model, or None."""
        try:
            fault = self.scorer.start(torch.cat([self.before, self._initial]))
            return fault or (self._difference() if self._asked is None else None)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, IndexError) as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    @torch.no_grad()
    def _difference(self) -> str | None:
        """Packed losses of two suffixes, one fed from its middle, against a plain pass."""
        initial = self._initial
        self.scorer.logits_of_current(initial, self._embed(initial))
        other = initial.clone()
        other[len(initial) // 2] = self.target[0]
        both = torch.stack([initial, other])
        packed = self._packed_losses(list(both))
        plain = self._nll(self._whole_logits(self._embed(self._fed(both)))).cpu()
        worst = float((packed - plain).abs().max())
        agree = worst <= ROUNDING[self.loaded.dtype]
        return None if agree else f"losses differ by {worst:.2g} from a plain pass"

    def _packed_losses(self, suffixes: Sequence[Tensor]) -> Tensor:
        return self.scorer.losses(self.scorer.hidden(suffixes))

    # --- cached and plain -------------------------------------------------------------------------
    def _nll(self, logits: Tensor) -> Tensor:
        return target_nll(logits, self.target, self._mellowmax)

    def _whole_logits(self, embeddings: Tensor) -> Tensor:
        """(batch, fed, d_model) -> (batch, T, vocabulary), the prefix computed anew."""
        before = self._embed(self.before).expand(embeddings.shape[0], -1, -1)
        whole = torch.cat([before, embeddings], 1)
        self._tokens += whole.shape[0] * whole.shape[1]
        return self.loaded.last_logits(len(self.target), inputs_embeds=whole, use_cache=False)

    def _logits(self, embeddings: Tensor) -> Tensor:
        """(batch, fed, d_model) -> (batch, T, vocabulary); the fed tokens follow the prefix."""
        if self.path == "plain":
            return self._whole_logits(embeddings)
        self._tokens += embeddings.shape[0] * embeddings.shape[1]
        return self.loaded.last_logits(
            len(self.target),
            inputs_embeds=embeddings,
            past_key_values=self.prefix.expanded(embeddings.shape[0]),
            use_cache=True,
        )

    def _fed(self, suffixes: Tensor) -> Tensor:
        rest = self._rest.expand(suffixes.shape[0], -1)
        return torch.cat([suffixes.to(self.loaded.device), rest], 1)

    def take_operations(self) -> float:
        """Operations since this was last asked: 2 N a token forward, 4 N backward, N parameters.

        Those of the rough copy count alike.
        """
        tokens = self._tokens + self.scorer.fed
        found = self._parameters * (2.0 * tokens + 4.0 * self._tokens_back)
        self._tokens = self._tokens_back = self.scorer.fed = 0
        return found

    # --- what attacks use -------------------------------------------------------------------------
    @torch.no_grad()
    def losses(self, suffixes: Tensor | Sequence[Tensor]) -> Tensor:
        """(candidate, suffix length) ids, or a list of any lengths -> (candidate,) losses.

        Float32 on the CPU.
        """
        if self.path == "packed":
            return self._packed_losses(list(suffixes))

        def score(part: Sequence[Tensor]) -> Tensor:
            return self._nll(self._logits(self._embed(self._fed(torch.stack(list(part)))))).cpu()

        losses = torch.empty(len(suffixes))
        lengths = torch.tensor([len(s) for s in suffixes])
        for length in lengths.unique():  # candidates of one length make a batch without padding
            which = torch.nonzero(lengths == length)[:, 0]
            same = [suffixes[int(i)] for i in which]
            losses[which] = torch.cat(list(self.batch.over(same, score))).float()
        return losses

    @torch.no_grad()
    def rough_losses(self, suffixes: Tensor) -> Tensor:
        """(candidate,) losses by a rough pass over likely tokens; exact where there is none."""
        if self.path != "packed" or not self.scorer.can_be_rough:
            return self.losses(suffixes)
        return self.scorer.bounds(self.scorer.hidden(list(suffixes), rough=True))

    @torch.no_grad()
    def best(self, suffixes: Tensor) -> tuple[int, float]:
        """Index and loss of the lowest loss: the argmin of ``losses``, with less head work."""
        bounded = self.path == "packed" and self.scorer.likely_tokens
        if not bounded or self.loaded.dtype != torch.float32:
            losses = self.losses(suffixes)
            self.fully_scored = len(losses)
            return int(losses.argmin()), float(losses.min())
        hidden = self.scorer.hidden(list(suffixes))
        bounds = self.scorer.bounds(hidden)
        winner, lowest = int(bounds.argmin()), float("inf")
        self.fully_scored = 0
        if not bounds.isfinite().all():
            return winner, float("nan")
        for part in bounds.argsort().split(4):
            if float(bounds[part[0]]) > lowest + BOUND_MARGIN:
                break
            losses = self.scorer.losses(hidden[part.to(hidden.device)])
            self.fully_scored += len(part)
            if not losses.isfinite().all():
                return int(part[0]), float("nan")
            if float(losses.min()) < lowest:
                winner, lowest = int(part[losses.argmin()]), float(losses.min())
        return winner, lowest

    @torch.no_grad()
    def share(self, suffix: Tensor) -> None:
        """``token_gradient`` without the gradient: the suffix becomes current; does it match?"""
        suffix = suffix.to(self.loaded.device)
        if self.path == "packed":
            logits = self.scorer.logits_of_current(suffix, self._embed(suffix))
        else:
            logits = self._logits(self._embed(self._fed(suffix[None])))[0]
        self.matches = self._greedy(logits)

    def _greedy(self, logits: Tensor) -> bool:
        """Whether (T, vocabulary) logits give the target token by token."""
        return bool((logits.argmax(-1) == self.target).all())

    def soft_gradient(self, weights: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Of relaxed suffixes, (start, position, token) weights of the rows of ``table``.

        Returns (start,) how many target tokens are not the likeliest, and the gradients of the
        losses in the weights, both on the CPU.
        """
        with torch.enable_grad():
            leaf = weights.to(table.device, table.dtype).requires_grad_(True)
            logits = self._soft_logits(leaf @ table)
            self._tokens_back += len(leaf) * (leaf.shape[1] + len(self._rest))
            (gradient,) = torch.autograd.grad(self._nll(logits).sum(), leaf)
        missed = (logits.detach().argmax(-1) != self.target).sum(-1)
        return missed.cpu(), gradient.float().cpu()

    def _soft_logits(self, embeddings: Tensor) -> Tensor:
        """(start, position, d_model) -> (start, T, vocabulary)."""
        rest = self._embed(self._rest).detach().expand(len(embeddings), -1, -1)
        fed = torch.cat([embeddings, rest], 1)
        return self.scorer.logits_of(fed) if self.path == "packed" else self._logits(fed)

    def token_gradient(self, suffix: Tensor) -> tuple[float, Tensor]:
        """Loss of one (suffix length,) suffix, and its gradient.

        The gradient is (suffix length, vocabulary) float32, on the model's device.
        """
        suffix = suffix.to(self.loaded.device)
        with torch.enable_grad(), damped(self.loaded, self._lsgm):
            leaf = self._embed(suffix).detach().clone().requires_grad_(True)
            if self.path == "packed":
                logits = self.scorer.logits_of_current(suffix, leaf)[None]
            else:
                logits = self._logits(torch.cat([leaf, self._embed(self._rest)])[None])
            loss = self._nll(logits)[0]
            self._tokens_back += len(suffix) + len(self._rest)
            (gradient,) = torch.autograd.grad(loss, leaf)
        self.matches = self._greedy(logits[0])
        table = self.loaded.embedding_table.detach()
        return float(loss.detach()), (gradient.to(table.dtype) @ table.T).float()


def target_loss(slot: SuffixSlot, config: GCGConfig, rough: RoughModel | None) -> TargetLoss:
    """The loss that a search with these settings lowers."""
    return TargetLoss(
        slot.renderer.loaded, slot, mellowmax=config.mellowmax, lsgm=config.lsgm, rough=rough
    )
