"""What would editing along a direction do? Many directions at once, by gradients.

Scoring a direction in full takes passes of its own. Here the backward passes of a prompt serve any
number of directions u. With a_lt the residual that enters block l at token t, w_lt = a_lt -
a_(l-1)t what the layer before wrote into it (w_0t is the embedding), and g_lt the gradient of a
number f with respect to a_lt, an edit changes f to first order by

    ablating u at all layers    - sum over l, t of (u . w_lt) (u . g_lt)
    writing u in place of r     - sum over l, t of (r . w_lt) (u . g_lt)      (a matched control)
    adding s u at layer l       s sum over t of u . g_lt

An ablation at all layers takes u out of all that is written, so each write counts once. f is the
outcome D (``evaluation/refusal_score.py``): the mean log-probability of refusals less that of
openings that comply. It does not saturate as the first of the two does where a model always
refuses. The sums run over the prompt and the text. And with f_v the
log-probability of v as the next token, and p_v its probability,

    KL of the next token        1/2 sum over the likeliest v of p_v (change of f_v)^2

Attribution patching (Nanda 2023) is the same approximation. Measured on 35 candidates of the
embedded model (docs/lab-log.md, 2026-11-28): estimated and measured changes of refusals have a rank
correlation of 0.8 to 0.9, the two KLs one of 0.9 to 0.97. The estimated KL is about a third of the
measured one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from core.models import LoadedModel
from core.prompt import Prompt
from core.tree import reader_of
from geometry.activations import read_residuals

LIKELIEST = 8
"""Next tokens that a KL is estimated from."""
TOGETHER = 8
"""Prompts, or texts of one prompt, that go through the model at once."""


class Texts(NamedTuple):
    """Token ids of what outcome D is read on: refusals, and openings that comply."""

    refusals: Sequence[Sequence[int]]
    compliances: Sequence[Sequence[int]] = ()

    @property
    def weighted(self) -> list[tuple[Sequence[int], float]]:
        """Every text with its weight in D."""
        return [
            (ids, sign / len(texts))
            for texts, sign in ((self.refusals, 1.0), (self.compliances, -1.0))
            for ids in texts
        ]


def ablated(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    texts: Texts,
    directions: Tensor,
    read: Tensor | None = None,
) -> Tensor:
    """(n, d_model) unit directions -> (n,) change of outcome D, nats per token.

    ``read`` (d_model,): the direction along which the residual is read, where it is another.
    """
    total = torch.zeros(len(directions), dtype=torch.float64)
    for written, gradient in _of_texts(loaded, prompts, texts):
        total -= _products(directions, written, gradient, read)
    return total / len(prompts)


def added(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    texts: Texts,
    directions: Tensor,
    layers: Sequence[int],
    lengths: Tensor,
) -> Tensor:
    """The same where each direction is added at its layer and length."""
    pushes = torch.zeros(loaded.n_layers + 1, loaded.d_model, dtype=torch.float64)
    for _, gradient in _of_texts(loaded, prompts, texts):
        pushes += gradient.double().sum(1).cpu()
    along = (directions.double() * pushes[list(layers)]).sum(-1)
    return along * lengths.double() / len(prompts)


def next_token_kl(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    directions: Tensor,
    read: Tensor | None = None,
) -> Tensor:
    """(n, d_model) unit directions -> (n,) estimated KL of the next token under ablation, nats."""
    total = torch.zeros(len(directions), dtype=torch.float64)
    for prompt in prompts:
        with _read(loaded, [prompt.ids] * LIKELIEST, 1) as (logits, states):
            of = logits[:, -1].log_softmax(-1)  # every row is the prompt, for one token each
            likeliest = of.detach()[0].topk(LIKELIEST)
            scores = of.gather(1, likeliest.indices[:, None]).sum()
            gradients = torch.stack(torch.autograd.grad(scores, states), 1).float()
            written = _written(states)
        shares = likeliest.values.exp() / 2
        for share, mine, gradient in zip(shares.tolist(), written, gradients, strict=True):
            total += share * _products(directions, mine, gradient, read) ** 2
    return total / len(prompts)


def _of_texts(
    loaded: LoadedModel, prompts: Sequence[Prompt], texts: Texts
) -> Iterator[tuple[Tensor, Tensor]]:
    """(written, gradient of the summed outcome D) of some prompts each; (layer, token, d_model)."""
    ids, weights = zip(*texts.weighted, strict=True)
    reader = reader_of(loaded, ids, prompts[0].ids)
    if reader is None:
        for prompt in prompts:
            for start in range(0, len(ids), TOGETHER):
                yield from _of_some(loaded, prompt, texts.weighted[start : start + TOGETHER])
        return
    for start in range(0, len(prompts), TOGETHER):
        states: dict[int, Tensor] = {}
        with read_residuals(loaded, states.__setitem__):
            scores = reader.with_gradients([p.ids for p in prompts[start : start + TOGETHER]])
        residuals = [states[layer] for layer in range(loaded.n_layers + 1)]
        gradients = torch.autograd.grad((scores @ torch.tensor(weights)).sum(), residuals)
        yield _written(residuals)[0], torch.stack(gradients, 1)[0].float()


def _of_some(
    loaded: LoadedModel, prompt: Prompt, texts: Sequence[tuple[Sequence[int], float]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same of one prompt with some texts, in one pass; what follows a text changes nothing."""
    longest, before = max(len(ids) for ids, _ in texts), len(prompt.ids)
    rows = [[*prompt.ids, *ids, *[ids[-1]] * (longest - len(ids))] for ids, _ in texts]
    with _read(loaded, rows, longest + 1) as (logits, states):
        of = logits[:, :-1].log_softmax(-1)
        scores = [
            row[torch.arange(len(ids)), torch.tensor(list(ids), device=row.device)].mean()
            for row, (ids, _) in zip(of, texts, strict=True)
        ]
        gradients = torch.autograd.grad(torch.stack(scores).sum(), states)
        gradient, written = torch.stack(gradients, 1).float(), _written(states)
    for n, (ids, weight) in enumerate(texts):
        end = before + len(ids)
        yield written[n, :, :end], weight * gradient[n, :, :end]


@contextmanager
def _read(
    loaded: LoadedModel, rows: Sequence[Sequence[int]], last: int
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """One pass with gradients, rows of one length: logits of the ``last`` tokens, (row, token,
    vocabulary), and the residuals of all layers, (row, token, d_model) each."""
    states: dict[int, Tensor] = {}
    embed = loaded.model.get_input_embeddings()
    with torch.enable_grad():
        with read_residuals(loaded, states.__setitem__):
            entered = embed(torch.tensor([list(ids) for ids in rows], device=loaded.device))
            entered = entered.detach().requires_grad_(True)
            logits = loaded.last_logits(last, inputs_embeds=entered, use_cache=False)
        yield logits, [states[layer] for layer in range(loaded.n_layers + 1)]


def _written(states: Sequence[Tensor]) -> Tensor:
    """(row, layer, token, d_model): what each layer wrote into the residual."""
    a = torch.stack([s.detach().float() for s in states], 1)
    return torch.cat([a[:, :1], a[:, 1:] - a[:, :-1]], 1)


def _products(directions: Tensor, written: Tensor, gradient: Tensor, read: Tensor | None) -> Tensor:
    """(n,) sums over layers and tokens of (r . w) (u . g); r is u where nothing else is read."""
    u = directions.float().to(written.device)
    r = u if read is None else read.float().to(written.device)[None]
    w, g = written.flatten(0, 1) @ r.T, gradient.flatten(0, 1) @ u.T
    return (w.double() * g.double()).sum(0).cpu()
