"""What would editing along a direction do to refusals? All directions at once, to first order.

Scoring a direction in full takes passes of its own. Here one backward pass per prompt serves any
number of directions, since an edit changes the mean log-probability of refusals by about

    ablating u at all layers    - u^T W u,    W = sum over layers l and tokens t of w_lt g_lt^T
    adding u at layer l         + u . p_l,    p_l = sum over tokens t of g_lt

a_lt is the residual that enters block l, w_lt = a_lt - a_(l-1)t what the layer before wrote into it
(w_0t is the embedding), and g_lt the gradient of the log-probability with respect to a_lt. An
ablation at all layers takes u out of all that is written, so each write counts once. The sums run
over the prompt and the refusal. Attribution patching (Nanda 2023) is the same approximation.

It is good enough to choose what is scored in full (docs/lab-log.md, 2026-11-28).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.models import LoadedModel
from core.prompt import Prompt
from geometry.activations import read_residuals


@dataclass(frozen=True)
class Attribution:
    """Of the mean log-probability of refusals (nats per token), a mean over prompts.

    Attributes:
        writes: W, (d_model, d_model) float64.
        pushes: p, (layer, d_model) float64.
    """

    writes: Tensor
    pushes: Tensor

    def ablated(self, directions: Tensor) -> Tensor:
        """(n, d_model) unit directions -> (n,) changes by ablating each at all layers."""
        u = directions.double()
        return -((u @ self.writes) * u).sum(-1)

    def added(self, directions: Tensor, layers: Sequence[int], lengths: Tensor) -> Tensor:
        """(n, d_model) unit directions -> (n,) changes by adding each at its layer and length."""
        return (directions.double() * self.pushes[list(layers)]).sum(-1) * lengths.double()


def attribution(
    loaded: LoadedModel, prompts: Sequence[Prompt], refusals: Sequence[Sequence[int]]
) -> Attribution:
    """Attribution of the mean over ``refusals`` (token ids) of their log-probability as replies."""
    d, n = loaded.d_model, loaded.n_layers + 1
    writes = torch.zeros(d, d, dtype=torch.float64)
    pushes = torch.zeros(n, d, dtype=torch.float64)
    embed = loaded.model.get_input_embeddings()
    for prompt in prompts:
        for refusal in refusals:
            ids = torch.tensor([[*prompt.ids, *refusal]], device=loaded.device)
            states: dict[int, Tensor] = {}
            with torch.enable_grad(), read_residuals(loaded, states.__setitem__):
                entered = embed(ids).detach().requires_grad_(True)
                logits = loaded.model(inputs_embeds=entered, use_cache=False).logits
                of = logits[0, len(prompt.ids) - 1 : -1].float().log_softmax(-1)
                score = of.gather(1, ids[0, len(prompt.ids) :, None]).mean()
                layers = [states[layer] for layer in range(n)]
                gradients = torch.autograd.grad(score, layers)
            a = torch.stack([s.detach()[0] for s in layers]).double().cpu()  # (layer, token, d)
            g = torch.stack([s[0] for s in gradients]).double().cpu()
            written = torch.cat([a[:1], a[1:] - a[:-1]])
            writes += torch.einsum("ltd,lte->de", written, g)
            pushes += g.sum(1)
    count = len(prompts) * len(refusals)
    return Attribution(writes / count, pushes / count)
