"""The quantity that every attack lowers: the target's negative log-likelihood.

It is in nats per target token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from core.models import LoadedModel

ROUNDING = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""By how much (nats per token) fast scoring may differ from one plain pass before we say so."""


def target_nll(logits: Tensor, target: Tensor, mellowmax: float = 0.0) -> Tensor:
    """(batch, T, vocabulary) logits and (T,) ids -> (batch,) mean negative log-likelihood in nats
    per token.

    With ``mellowmax`` = alpha > 0: (1/alpha) log mean_t exp(alpha nll_t), between the mean (alpha
    -> 0) and the worst token (alpha -> infinity); Asadi and Littman, arXiv 1612.05628. (nanogcg
    takes it over logits, which are no likelihoods.)
    """
    picked = logits.gather(2, target.expand(logits.shape[0], -1)[..., None])[..., 0]
    nll = logits.logsumexp(2) - picked
    if not mellowmax:
        return nll.mean(1)
    return ((mellowmax * nll).logsumexp(1) - math.log(nll.shape[1])) / mellowmax


def plain_loss(loaded: LoadedModel, prompt_ids: Sequence[int], target_ids: Sequence[int]) -> float:
    """The same loss by one plain forward pass: no cache, full logits. ``verify`` uses it."""
    ids = torch.tensor([[*prompt_ids, *target_ids]], device=loaded.device)
    with torch.no_grad():
        logits = loaded.model(input_ids=ids, use_cache=False).logits[:, len(prompt_ids) - 1 : -1]
    return float(target_nll(logits.float(), ids[0, len(prompt_ids) :])[0])
