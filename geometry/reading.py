"""Residuals that gradients flow through: for training on where a prompt lies.

``collect`` in ``activations.py`` reads many prompts fast and without a graph. This reads a few in
one padded batch, with the graph, from whatever the model's weights are now.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core.errors import AttackPlaneError
from core.models import LoadedModel
from core.prompt import Prompt
from geometry.activations import read_residuals, span_of


def differentiable_residuals(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    *,
    positions: Sequence[str] = ("t_inst", "t_post_inst"),
    layers: Sequence[int] | None = None,
) -> Tensor:
    """(prompt, layer, position, d_model) residuals in the model's precision, on its device.

    Prompts are padded on the right, where causal attention cannot see the padding. A position of
    several tokens (``response``) is their mean.

    Args:
        layers: residual layers to read; None: all of them, 0 to n_layers.

    Raises:
        AttackPlaneError: no prompts, a position that a prompt does not have, no such layer.
    """
    wanted = range(loaded.n_layers + 1) if layers is None else layers
    outside = [layer for layer in wanted if not 0 <= layer <= loaded.n_layers]
    if not prompts or outside:
        raise AttackPlaneError(
            "nothing to read" if not prompts else "no such layer",
            where=loaded.spec,
            got=outside or "no prompts",
            remedy=f"layers 0 to {loaded.n_layers}",
        )
    rows = [[*p.ids, *p.target_ids] for p in prompts]
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    weights = torch.zeros(len(rows), len(positions), longest)
    for n, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        ids[n, : len(row)], mask[n, : len(row)] = torch.tensor(row), 1
        for column, name in enumerate(positions):
            span = span_of(prompt, name)
            if span is None:
                raise AttackPlaneError(
                    "a prompt has no such position", where=f"prompt {n}", got=name
                )
            weights[n, column, span.start : span.stop] = 1 / len(span)
    kept: dict[int, Tensor] = {}
    picked = weights.to(loaded.device, loaded.dtype)

    def keep(layer: int, hidden: Tensor) -> None:
        if layer in wanted:
            kept[layer] = picked @ hidden

    with read_residuals(loaded, keep):
        loaded.decoder(
            input_ids=ids.to(loaded.device), attention_mask=mask.to(loaded.device), use_cache=False
        )
    return torch.stack([kept[layer] for layer in wanted], 1)
