"""The target loss and its token gradient: one copy, used by every attack that optimises against a model.

    loss(suffix) = -(1/T) sum_t log p(target_t | before, suffix, after, target_<t)        [nats per target token]

Keys and values of ``before`` are computed once and shared by all candidates; the last target token is not fed; the
head is applied at the T predicting positions only. The token gradient is d loss / d one-hot(suffix) = (gradient at
the suffix embeddings) @ embedding_table^T (GCG, arXiv 2307.15043, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attacks.slot import SuffixSlot
from core.batching import BatchSize, memory_budget
from core.models import LoadedModel
from core.prefix import SharedPrefix


def mean_nll(logits: Tensor, target: Tensor) -> Tensor:
    """(batch, T, vocabulary) logits and (T,) ids -> (batch,) mean negative log-likelihood in nats per token."""
    picked = logits.gather(2, target.expand(logits.shape[0], -1)[..., None])[..., 0]
    return (logits.logsumexp(2) - picked).mean(1)


class TargetLoss:
    """Scores suffixes of one slot on one model. ``batch`` is how many candidates go through the model at once."""

    def __init__(self, loaded: LoadedModel, slot: SuffixSlot, *, batch_size: int | None = None) -> None:
        self.loaded = loaded

        def ids(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=loaded.device)

        self.before, self.after, self.target = (
            ids(slot.before_ids),
            ids(slot.after_ids),
            ids(slot.target_ids),
        )
        self.prefix = SharedPrefix(loaded, self.before)
        self.batch = BatchSize(batch_size or self._fitting(len(slot.initial_ids)))

    def _fitting(self, suffix_length: int) -> int:
        """Candidates a batch within the memory budget, from the tensors that one candidate needs."""
        config, width = self.loaded.config, self.loaded.dtype.itemsize
        fed = suffix_length + len(self.after) + len(self.target) - 1
        whole = fed + self.prefix.length
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        cache = 2 * config.num_hidden_layers * whole * config.hidden_size * width
        block = fed * (3 * inner + 6 * config.hidden_size) * width + config.num_attention_heads * (
            fed * whole * width
        )
        head = 3 * len(self.target) * self.loaded.embedding_table.shape[0] * 4
        # on a CPU larger batches lose to memory traffic (docs/lab-log.md)
        most = 32 if self.loaded.device.type == "cpu" else 512
        return max(1, min(most, memory_budget(self.loaded.device) // (cache + block + head)))

    def _logits(self, embeddings: Tensor) -> Tensor:
        """(batch, fed tokens, d_model) -> (batch, T, vocabulary); the fed tokens follow the prefix."""
        if self.prefix.usable:
            return self.loaded.last_logits(
                len(self.target),
                inputs_embeds=embeddings,
                past_key_values=self.prefix.expanded(embeddings.shape[0]),
                use_cache=True,
            )
        before = self.loaded.model.get_input_embeddings()(self.before)
        whole = torch.cat([before.expand(embeddings.shape[0], -1, -1), embeddings], 1)
        return self.loaded.last_logits(len(self.target), inputs_embeds=whole, use_cache=False)

    def _fed(self, suffixes: Tensor) -> Tensor:
        rest = torch.cat([self.after, self.target[:-1]]).expand(suffixes.shape[0], -1)
        return torch.cat([suffixes.to(self.loaded.device), rest], 1)

    @torch.no_grad()
    def losses(self, suffixes: Tensor) -> Tensor:
        """(candidate, suffix length) ids -> (candidate,) losses, float32 on the CPU."""
        embed = self.loaded.model.get_input_embeddings()

        def score(part: Sequence[Tensor]) -> Tensor:
            fed = self._fed(torch.stack(list(part)))
            return mean_nll(self._logits(embed(fed)), self.target).cpu()

        return torch.cat(list(self.batch.over(list(suffixes), score)))

    def token_gradient(self, suffix: Tensor) -> tuple[float, Tensor]:
        """Loss of one suffix (suffix length,) and its gradient (suffix length, vocabulary) float32, on the device."""
        embed = self.loaded.model.get_input_embeddings()
        with torch.enable_grad():
            embeddings = embed(self._fed(suffix[None])).detach()
            leaf = embeddings[:, : len(suffix)].clone().requires_grad_(True)
            whole = torch.cat([leaf, embeddings[:, len(suffix) :]], 1)
            loss = mean_nll(self._logits(whole), self.target)[0]
            (gradient,) = torch.autograd.grad(loss, leaf)
        table = self.loaded.embedding_table
        return float(loss.detach()), (gradient[0].to(table.dtype) @ table.T).float()


def plain_loss(loaded: LoadedModel, prompt_ids: Sequence[int], target_ids: Sequence[int]) -> float:
    """The same loss by one plain forward pass over the whole sequence: no cache, full logits. For ``verify``."""
    ids = torch.tensor([[*prompt_ids, *target_ids]], device=loaded.device)
    with torch.no_grad():
        logits = loaded.model(input_ids=ids, use_cache=False).logits[:, len(prompt_ids) - 1 : -1]
    return float(mean_nll(logits.float(), ids[0, len(prompt_ids) :])[0])
