"""Which tokens a suffix may hold, and which candidates one step of GCG tries.

Algorithm 1 of GCG (arXiv 2307.15043): per position the top-k tokens with the most negative
gradient; then B candidates, each the current suffix with one position (or n) drawn uniformly and
replaced by one of its top-k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def allowed_tokens(tokenizer: Any, vocabulary: int, *, ascii_only: bool = True) -> Tensor:
    """(vocabulary,) bool: the tokens that a suffix may hold.

    They decode to printable text, ASCII if asked, and are neither special nor added tokens.
    """
    allowed = torch.zeros(vocabulary, dtype=torch.bool)
    known = min(len(tokenizer), vocabulary)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    texts = tokenizer.batch_decode([[i] for i in range(known)], clean_up_tokenization_spaces=False)
    for index, text in enumerate(texts):
        fine = bool(text) and text.isprintable() and "\ufffd" not in text
        allowed[index] = fine and (text.isascii() or not ascii_only) and index not in special
    return allowed


def promised(suffix: Tensor, gradient: Tensor, scores: Tensor) -> Tensor:
    """(position,) by how much, to first order, the best token of each position lowers the loss.

    In shares of the largest; at least a thousandth, so that every position may be drawn.
    """
    current = gradient.cpu().gather(1, suffix[:, None])[:, 0]
    fall = (current - scores.amin(1).cpu()).clamp_min(0)
    return (fall / fall.max().clamp_min(1e-12)).clamp_min(1e-3)


def sample_candidates(
    suffix: Tensor,
    gradient: Tensor,
    allowed: Tensor,
    *,
    topk: int,
    width: int,
    n_replace: int,
    generator: torch.Generator,
    by_gradient: bool = False,
) -> Tensor:
    """Draw candidates on the CPU: no no-ops, no duplicates, first come first kept.

    Args:
        suffix: (suffix length,) current ids.
        gradient: (suffix length, vocabulary).
        allowed: (vocabulary,) bool.
        topk: tokens per position.
        width: candidates drawn.
        n_replace: positions replaced in each.
        by_gradient: draw positions by how much the gradient promises there, not uniformly.

    Returns:
        (candidate, suffix length) ids with candidate <= width.
    """
    suffix, length = suffix.cpu(), len(suffix)
    scores = gradient.masked_fill(~allowed.to(gradient.device), float("inf"))
    top = scores.topk(min(topk, int(allowed.sum())), largest=False).indices.cpu()
    if by_gradient:
        weights = promised(suffix, gradient, scores).expand(width, -1)
        positions = torch.multinomial(weights, n_replace, generator=generator)
    else:
        positions = torch.rand(width, length, generator=generator).topk(n_replace).indices
    choices = torch.randint(top.shape[1], (width, n_replace), generator=generator)
    candidates = suffix.repeat(width, 1).scatter_(1, positions, top[positions, choices])
    seen = {tuple(suffix.tolist())}
    kept = []
    for index, row in enumerate(candidates.tolist()):
        if tuple(row) not in seen:
            seen.add(tuple(row))
            kept.append(index)
    return candidates[kept]
