"""Batched completion of rendered prompts, by transformers' own ``generate``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from core.batching import BatchSize
from core.models import LoadedModel
from core.prefix import SharedPrefix, shared_length, shares_a_start
from core.progress import bar as progress_bar
from core.prompt import Renderer
from core.rows import Row

OWN_NAME = re.compile(r"^\s*Assistant:")
NEXT_TURN = re.compile(r"^\s*(?:User|Human|Assistant):", re.M)
BATCH = 64
"""Replies made side by side: a matrix product of few rows takes as long as one of many."""


def complete(
    renderer: Renderer,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = BATCH,
    description: str = "generate",
) -> list[str]:
    """Replies to whole rendered texts (BOS included), in their order. Greedy without a temperature.

    The reply of a model without a chat template ends where it invents a next turn. Prompts are
    batched by length and padded on the left, after the start that all of them share, which runs
    once. Sampling draws from a stream of its own, started from ``seed``; the global one is left as
    it was.
    """
    loaded = renderer.loaded
    ids = renderer.tokenise(texts)
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    start = _common_start(loaded, ids)
    replies = [""] * len(ids)
    batches = BatchSize(batch_size)
    with progress_bar(len(ids), description, "reply") as bar:

        def work(part: Sequence[int]) -> None:
            rows = _generate(loaded, [ids[i] for i in part], start, max_new_tokens, temperature)
            texts = loaded.tokenizer.batch_decode(rows, skip_special_tokens=True)
            for index, text in zip(part, texts, strict=True):
                replies[index] = (text if loaded.has_chat_template else first_turn(text)).strip()
            bar.update(len(part))

        devices = [loaded.device] if loaded.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for _ in batches.over(order, work):
                pass
    return replies


def first_turn(text: str) -> str:
    """A reply up to where it begins a next turn of the plain template (``core/prompt.py``)."""
    return NEXT_TURN.split(OWN_NAME.sub("", text), maxsplit=1)[0]


def stop_ids(loaded: LoadedModel) -> list[int]:
    """Tokens that end a reply: the checkpoint's, else the tokenizer's end of text, else none."""
    own = loaded.model.generation_config.eos_token_id
    stop = own if own is not None else loaded.tokenizer.eos_token_id
    return [stop] if isinstance(stop, int) else list(stop or [])


def _common_start(loaded: LoadedModel, ids: list[list[int]]) -> SharedPrefix | None:
    """Keys and values of the tokens that all prompts begin with (the template's system prompt)."""
    if len(ids) < 2 or not shares_a_start(loaded):
        return None
    shared = shared_length(ids, min(map(len, ids)) - 1)  # every row feeds a token of its own
    prefix = SharedPrefix(loaded, torch.tensor(ids[0][:shared]))
    return prefix if prefix.usable else None


@torch.no_grad()
def _generate(
    loaded: LoadedModel,
    ids: list[list[int]],
    start: SharedPrefix | None,
    max_new_tokens: int,
    temperature: float,
) -> torch.Tensor:
    from transformers import GenerationConfig

    ends = stop_ids(loaded)
    pad = loaded.tokenizer.pad_token_id
    pad = pad if pad is not None else (ends[0] if ends else 0)
    longest = max(map(len, ids))
    shared = start.length if start else 0
    rows = torch.tensor([_padded(row, shared, longest, pad) for row in ids], device=loaded.device)
    ones = ([1] * len(row) for row in ids)
    mask = torch.tensor([_padded(row, shared, longest, 0) for row in ones], device=loaded.device)
    cache = {"past_key_values": start.expanded(len(ids))} if start else {}
    options: Row = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=pad, **options
    )
    with _without_own_generation_config(loaded.model), _contiguous_head(loaded.model):
        out = loaded.model.generate(
            input_ids=rows, attention_mask=mask, generation_config=config, **cache
        )
    return out[:, longest:]


def _padded(row: list[int], shared: int, length: int, pad: int) -> list[int]:
    """``row`` at full length; the padding stands after the tokens that all rows share."""
    return row[:shared] + [pad] * (length - len(row)) + row[shared:]


@contextmanager
def _contiguous_head(model: Any) -> Iterator[None]:
    """Hand the head a contiguous state. Of a strided one, the last token of each row, torch makes a
    batched product, for which it copies the head's matrix once per row in bfloat16."""
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: (args[0].contiguous(), *args[1:])
    )
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _without_own_generation_config(model: Any) -> Iterator[None]:
    """Hide the checkpoint's generation settings, with which transformers would fill up ours."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
