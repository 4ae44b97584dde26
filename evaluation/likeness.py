"""How like its base a model still is: KL over replies, and how well it reads plain prose.

KL          mean over tokens of the base's own replies of KL(base || model), nats per token
perplexity  exp of the mean negative log-likelihood per token of held-out prose
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.continuations import after_own_prompt
from core.models import LoadedModel
from core.prompt import Renderer


@dataclass(frozen=True)
class Reference:
    """The base's replies to some prompts, and what it says of each of their tokens.

    Attributes:
        vocabulary: hash of the tokenizer; KL is known only between models that share it.
        texts: (prompt ids, reply ids) pairs.
        log_p: (reply tokens of all pairs, vocabulary), float32 on the CPU.
    """

    vocabulary: str
    texts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    log_p: Tensor


@torch.no_grad()
def next_log_p(loaded: LoadedModel, prompt: Sequence[int], reply: Sequence[int]) -> Tensor:
    """(reply tokens, vocabulary) log-probabilities of the tokens of a reply, on the CPU."""
    ids = torch.tensor([[*prompt, *reply]], device=loaded.device)
    logits = loaded.last_logits(len(reply) + 1, input_ids=ids)[0, :-1]
    return logits.log_softmax(-1).cpu()


def reference(
    renderer: Renderer, prompts: Sequence[str], replies: Sequence[str], tokens: int
) -> Reference:
    """The base's own replies to rendered prompts, cut to ``tokens``; empty ones are left out."""
    pairs = []
    ids = zip(renderer.tokenise(prompts), renderer.tokenise(replies), strict=True)
    for prompt, reply in ids:
        if reply:
            pairs.append((tuple(prompt), tuple(reply[:tokens])))
    log_p = torch.cat([next_log_p(renderer.loaded, *pair) for pair in pairs])
    return Reference(renderer.vocabulary_hash, tuple(pairs), log_p)


def kl_to(base: Reference, renderer: Renderer) -> float | None:
    """KL(base || model), nats per token; None for a model with another tokenizer."""
    if renderer.vocabulary_hash != base.vocabulary:
        return None
    total, start = 0.0, 0
    for prompt, reply in base.texts:
        own = next_log_p(renderer.loaded, prompt, reply)
        p = base.log_p[start : start + len(reply)]
        width = min(own.shape[1], p.shape[1])  # rows without a token may pad a vocabulary
        own, p = own[:, :width], p[:, :width]
        total += float((p.exp() * (p - own)).sum())
        start += len(reply)
    return total / start


def perplexity(renderer: Renderer, texts: Sequence[str]) -> tuple[float, float]:
    """(perplexity per token, bits per character) of plain texts, without a chat template.

    Bits per character can be compared between tokenizers, perplexities cannot.
    """
    start = renderer.tokenizer.bos_token_id
    fed = [
        ids if start is None or ids[0] == start else [start, *ids]
        for ids in renderer.tokenise(texts)
    ]
    # the first token of each cannot be predicted
    firsts, rests = [ids[:1] for ids in fed], [ids[1:] for ids in fed]
    lengths = torch.tensor([len(rest) for rest in rests])
    means = after_own_prompt(renderer.loaded, firsts, rests)
    nll = -float((means.double() * lengths).sum())
    return math.exp(nll / int(lengths.sum())), nll / math.log(2) / sum(map(len, texts))
