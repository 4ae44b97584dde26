"""Batched completion of rendered prompts.

By our own decoder (``core/decoding.py``) where it serves the model, else by transformers'
``generate``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from core.batching import BatchSize, memory_budget
from core.decodable import decodes
from core.decoding import RowDecoder
from core.head import head_of
from core.models import LoadedModel
from core.prefix import SharedPrefix, shared_length, shares_a_start
from core.products import packed
from core.progress import bar as progress_bar
from core.prompt import Renderer
from core.records import stream_seed
from core.rows import Row

OWN_NAME = re.compile(r"^\s*Assistant:")
NEXT_TURN = re.compile(r"^\s*(?:User|Human|Assistant):", re.M)
log = logging.getLogger(__name__)
BATCH = 96
"""Replies made side by side: a matrix product of few rows takes as long as one of many."""
MANY = 1024
"""New tokens from which on weights are laid out anew for the call; that takes 0.3 s."""


def complete(
    renderer: Renderer,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int | Sequence[int] = 0,
    batch_size: int = BATCH,
    description: str = "generate",
) -> list[str]:
    """Replies to whole rendered texts (BOS included), in their order. Greedy without a temperature.

    The reply of a model without a chat template ends where it invents a next turn. What all prompts
    begin with runs once. Each reply is sampled from a stream of its own, started from ``seed`` and
    its number, or from a seed of its own where several are given: whatever shares its batch, it is
    the same. The global stream is left as it was.
    """
    loaded = renderer.loaded
    ids = renderer.tokenise(texts)
    replies = [""] * len(ids)
    if not ids:
        return replies

    def keep(part: Sequence[int], rows: Any) -> None:
        texts = loaded.tokenizer.batch_decode(rows, skip_special_tokens=True)
        for index, text in zip(part, texts, strict=True):
            replies[index] = (text if loaded.has_chat_template else first_turn(text)).strip()
        bar.update(len(part))

    with progress_bar(len(ids), description, "reply") as bar:
        seeds = [seed] * len(ids) if isinstance(seed, int) else list(seed)
        numbers = range(len(ids)) if isinstance(seed, int) else [0] * len(ids)
        own = [stream_seed(s, "reply", n) for s, n in zip(seeds, numbers, strict=True)]
        made_by = _decode if decodes(loaded, ids[0]) else _by_transformers
        many = len(ids) * max_new_tokens >= MANY
        with packed(loaded.model, min(batch_size, len(ids))) if many else nullcontext():
            made_by(loaded, ids, keep, How(max_new_tokens, temperature, own, batch_size))
    return replies


Keep = Callable[[Sequence[int], Any], None]
"""Takes numbers of prompts, and the token ids of their replies."""


@dataclass(frozen=True)
class How:
    """How replies are made; see ``complete``."""

    max_new_tokens: int
    temperature: float
    seeds: Sequence[int]
    batch_size: int


def _decode(
    loaded: LoadedModel,
    ids: list[list[int]],
    keep: Keep,
    how: How,
) -> None:
    """By our own decoder; it goes on with fewer rows where the memory ends."""
    shared = shared_length(ids, min(map(len, ids)) - 1) if len(ids) > 1 else 0
    head = head_of(loaded, torch.tensor(ids[0]))
    missing = list(range(len(ids)))
    batch = min(how.batch_size, _fitting(loaded, ids, how.max_new_tokens))
    while missing:
        options: Row = {"stops": stop_ids(loaded), "max_new_tokens": how.max_new_tokens}
        options |= {"temperature": how.temperature, "seeds": how.seeds, "batch": batch}
        decoder = RowDecoder(loaded, head, ids[0][:shared], **options)
        numbers, done = list(missing), set()
        try:
            for place, reply in decoder.replies({n: ids[n][shared:] for n in numbers}):
                keep([place], [reply])
                done.add(place)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch = max(1, batch // 2)
            log.warning("out of memory: batches of %d from here on", batch)
            torch.cuda.empty_cache()
        missing = [n for n in numbers if n not in done]


def _fitting(loaded: LoadedModel, ids: list[list[int]], max_new_tokens: int) -> int:
    """Rows whose keys and values fit the memory's budget."""
    config = loaded.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * loaded.dtype.itemsize
    return max(1, memory_budget(loaded.device) // (token * (max(map(len, ids)) + max_new_tokens)))


def _by_transformers(
    loaded: LoadedModel,
    ids: list[list[int]],
    keep: Keep,
    how: How,
) -> None:
    """By transformers' ``generate``, for models that keep other states than keys and values."""
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    start = _common_start(loaded, ids)

    def work(part: Sequence[int]) -> None:
        own = [ids[i] for i in part]
        keep(part, _generate(loaded, own, start, how.max_new_tokens, how.temperature))

    devices = [loaded.device] if loaded.device.type == "cuda" else []
    if not how.temperature:
        for _ in BatchSize(how.batch_size).over(order, work):
            pass
        return
    with torch.random.fork_rng(devices=devices):  # it has one stream: so one reply at a time
        for index in order:
            torch.manual_seed(how.seeds[index])
            work([index])


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
