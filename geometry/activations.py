"""Residual stream at a few positions of every prompt, all layers, one forward pass.

Layer L is the residual entering block L (``resid_pre``); layer n_layers is what leaves the last block, before the
final norm. Hooks keep only the wanted positions, so memory does not grow with prompt length. Prompts are sorted by
length and padded on the right, where causal attention cannot see the padding; tokens that all prompts share at the
start (system prompt, template) are run once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from core.batching import BatchSize
from core.errors import AttackPlaneError
from core.models import LoadedModel
from core.prefix import SharedPrefix
from core.prompt import Prompt
from core.records import Activations

POSITIONS = ("t_goal", "t_inst", "t_post_inst")


@contextmanager
def captured(loaded: LoadedModel, rows: Tensor, columns: Tensor, out: Tensor) -> Iterator[None]:
    """While open, a forward pass writes ``out[:, layer] = residual[rows, columns]`` for every layer.

    ``rows`` and ``columns`` are (prompt, position) indices into (batch, fed tokens); ``out`` is (prompt, layer,
    position, d_model) float32 on the CPU. Hooks are gone when it closes, also after an error.
    """

    def keep(layer: int, hidden: Tensor) -> None:
        out[:, layer] = hidden[rows, columns].float().cpu()

    def before(layer: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keep(layer, args[0] if args else kwargs["hidden_states"])

        return hook

    def after(_: Any, __: Any, output: Any) -> None:
        keep(loaded.n_layers, output[0] if isinstance(output, tuple) else output)

    handles = [
        block.register_forward_pre_hook(before(layer), with_kwargs=True)
        for layer, block in enumerate(loaded.blocks)
    ]
    handles.append(loaded.blocks[-1].register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def shared_length(ids: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all prompts share, ending before the first wanted position."""
    limit = min(min(p) for p in positions)
    # whatever the lexicographically first and last share, all between them share too
    first, last = min(map(tuple, ids)), max(map(tuple, ids))
    for index in range(min(limit, len(first), len(last))):
        if first[index] != last[index]:
            return index
    return min(limit, len(first), len(last))


def collect(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[str],
    *,
    batch_size: int = 32,
    share_prefix: bool = True,
    description: str = "activations",
) -> Activations:
    """Residuals of ``prompts`` at ``POSITIONS``; a prompt without a request span has NaN at t_goal."""
    if not prompts:
        raise AttackPlaneError("no prompts to read", where=loaded.spec)
    positions = [(p.t_goal if p.t_goal is not None else p.t_inst, p.t_inst, p.t_post_inst) for p in prompts]
    shared = shared_length([p.ids for p in prompts], positions) if share_prefix else 0
    prefix = SharedPrefix(loaded, torch.tensor(prompts[0].ids[:shared], dtype=torch.long))
    if not prefix.usable:
        shared = 0
    resid = torch.empty(len(prompts), loaded.n_layers + 1, len(POSITIONS), loaded.d_model)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    with tqdm(total=len(prompts), desc=description, unit="prompt", leave=False) as bar:

        @torch.no_grad()
        def work(part: Sequence[int]) -> None:
            longest = max(len(prompts[i].ids) for i in part) - shared
            fed = torch.zeros(len(part), longest, dtype=torch.long)
            for row, i in enumerate(part):
                own = prompts[i].ids[shared:]
                fed[row, : len(own)] = torch.tensor(own)
            columns = torch.tensor([positions[i] for i in part]) - shared
            rows = torch.arange(len(part))[:, None].expand_as(columns)
            out = torch.empty(len(part), *resid.shape[1:])
            cache = {"past_key_values": prefix.expanded(len(part))} if shared else {}
            device = loaded.device
            with captured(loaded, rows.to(device), columns.to(device), out):
                loaded.decoder(input_ids=fed.to(device), use_cache=bool(shared), **cache)
            resid[list(part)] = out
            bar.update(len(part))

        for _ in BatchSize(batch_size).over(order, work):
            pass
    for index, prompt in enumerate(prompts):
        if prompt.t_goal is None:
            resid[index, :, 0] = torch.nan
    return Activations(resid, POSITIONS, tuple(prompt_ids), loaded.spec)
