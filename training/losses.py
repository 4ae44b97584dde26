"""Losses of training, as pure functions of tensors. One function per term, each with its source.

What pads a batch never counts: labels of -100 and tokens of weight 0 are left out of every mean.
Which way a term pushes when it is minimised stands in its docstring.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

IGNORED = -100
"""A label that does not count."""
FLOOR = -5.0
"""log p (nats) below which the away term leaves a token alone [HarmBench's code]."""


# --- of tokens ------------------------------------------------------------------------------------
def reply_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over labelled tokens, in nats. Raises the labels' probability.

        - (1 / N) sum over labelled tokens of log p(token | what stands before it)

    ``logits`` (..., vocabulary) predict ``labels`` (...); N is the number of labels that count.
    """
    flat = logits.float().flatten(0, -2)
    return nn.functional.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED)


def away_loss(logits: Tensor, labels: Tensor, floor: float = FLOOR) -> Tensor:
    """R2D2's away term (HarmBench, arXiv 2402.04249): lowers the labels' probability.

        - (1 / T) sum_t log(1 - p_t) 1[log p_t >= floor]        nats per target token

    A token that is unlikely already is left alone, but counts in T. ``logits`` (..., vocabulary),
    ``labels`` (...). log(1 - p) is taken as a logsumexp without the label, which stays exact where
    p is near one.
    """
    counted = labels != IGNORED
    flat, wanted = logits.float()[counted], labels[counted][:, None]
    whole = flat.logsumexp(-1)
    log_p = flat.gather(-1, wanted)[:, 0] - whole
    rest = flat.scatter(-1, wanted, -torch.inf).logsumexp(-1) - whole
    return -torch.where(log_p >= floor, rest, 0.0).sum() / counted.sum()


def kl_loss(base: Tensor, tuned: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(base || tuned) of the next token, mean over labelled tokens, in nats. Keeps the base.

        T^2 mean_t sum_v p_base(v) (log p_base(v) - log p_tuned(v)),   p at temperature T

    HARC (arXiv 2607.00572) has T = 1; RepBend (arXiv 2504.01550) has T = 2, and so a factor of 4.
    ``base`` and ``tuned`` are (..., vocabulary) logits, ``labels`` (...) says which count.
    """
    counted = labels != IGNORED
    p, q = ((x.float()[counted] / temperature).log_softmax(-1) for x in (base, tuned))
    return temperature**2 * (p.exp() * (p - q)).sum(-1).mean()


def reply_log_probability(logits: Tensor, labels: Tensor, owner: Tensor, rows: int) -> Tensor:
    """(row,) summed log-probabilities of whole replies, in nats.

    ``logits`` (tokens, vocabulary), ``labels`` (tokens,), ``owner`` (tokens,): whose a token is.
    """
    log_p = logits.float().log_softmax(-1).gather(-1, labels.clamp_min(0)[:, None])[:, 0]
    counted = torch.where(labels != IGNORED, log_p, 0.0)
    return counted.new_zeros(rows).index_add(0, owner, counted)


def dpo_loss(
    chosen: Tensor, rejected: Tensor, base_chosen: Tensor, base_rejected: Tensor, beta: float
) -> Tensor:
    """DPO (arXiv 2305.18290, Eq. 7): raises the chosen reply above the rejected one.

        - mean log sigmoid(beta ((chosen - base_chosen) - (rejected - base_rejected)))

    All four are (pair,) summed log-probabilities of whole replies, in nats.
    """
    gain = (chosen - base_chosen) - (rejected - base_rejected)
    return -nn.functional.logsigmoid(beta * gain).mean()


# --- of the residual stream -----------------------------------------------------------------------
def coupling_loss(states: Tensor, direction: Tensor, harmful: Tensor, margin: float) -> Tensor:
    """HARC's hinge on one direction (arXiv 2607.00572), mean over the batch.

        harmful:  relu(margin - cos(h, v))        pushes h towards v, up to the margin
        benign:   relu(cos(h, v))                 pushes h away from v, down to zero

    ``states`` (batch, d_model), ``direction`` (d_model,) without gradient, ``harmful`` (batch,).
    """
    cosines = nn.functional.cosine_similarity(states.float(), direction.detach()[None], dim=-1)
    return torch.where(harmful, (margin - cosines).relu(), cosines.relu()).mean()


def moved(tuned: Tensor, base: Tensor, weight: Tensor) -> Tensor:
    """Mean over tokens and layers of ||h' - h||_2, not squared. Keeps h' at h.

    The retain term of circuit breakers (arXiv 2406.04313) and both norms of RepBend (arXiv
    2504.01550). ``tuned`` and ``base`` are (layer, token, d_model); ``weight`` (token,) says how
    often a token counts.
    """
    distance = _norm(tuned.float() - base.float())
    return (distance * weight).sum() / (weight.sum() * len(distance))


def rerouted(tuned: Tensor, base: Tensor, weight: Tensor) -> Tensor:
    """Circuit breakers' term on harmful text (arXiv 2406.04313): turns h' away from h.

        mean over tokens and layers of relu(cos(h', h))

    It is zero once they are orthogonal. Shapes as for ``moved``.
    """
    cosines = nn.functional.cosine_similarity(tuned.float(), base.float(), dim=-1)
    return (cosines.relu() * weight).sum() / (weight.sum() * len(cosines))


def gathered(states: Tensor) -> Tensor:
    """RepBend's third term (arXiv 2504.01550): mean over i != j of 1 - cos(h_i, h_j).

    Makes them alike. ``states`` (layer, row, d_model) at the last token of unsafe prompts; one row
    alone gives 0.
    """
    units = nn.functional.normalize(states.float(), dim=-1)
    n = units.shape[-2]
    different = (1 - units @ units.transpose(-1, -2)).sum((-1, -2)) / max(1, n * (n - 1))
    return different.mean() if n > 1 else 0 * different.mean()


def _norm(difference: Tensor) -> Tensor:
    """(..., d_model) -> (...): the length, with gradient 0 (not NaN) where it is zero."""
    square = difference.square().sum(-1)
    still = square == 0
    return torch.where(still, 0.0, torch.where(still, 1.0, square).sqrt())
