"""Replies a second: our decoder against transformers' ``generate``, in turn, on the same prompts.

Usage:

    python -m benchmarks.replay_speed                                (embedded model, float32)
    python -m benchmarks.replay_speed --model 'embedded?dtype=bfloat16' --prompts 96 --rounds 3

transformers pads on the left and runs whole prompts, as its users do, at several batch sizes; the
best of them counts. All give ``--tokens`` new tokens a prompt, or fewer where a reply ends. Greedy
replies are compared with a plain loop of whole sequences, prompt by prompt. The last line is
`ratio R`: seconds of transformers at its best batch over ours, median over the rounds.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial

import click
import torch
from torch import nn

import core.generate
from benchmarks.measure import device_name, matrix_peak, median, timed
from core.generate import complete, stop_ids
from core.models import LoadedModel, load
from core.products import FrozenLinear
from core.prompt import Conversation, Renderer
from core.text import aligned
from evaluation.behaviours import load_behaviours

BATCHES = (8, 16, 32, 96)


@torch.no_grad()
def generated(
    loaded: LoadedModel, ids: list[list[int]], tokens: int, batch: int
) -> list[list[int]]:
    """Reply ids by transformers, in the order of the prompts."""
    from transformers import GenerationConfig

    ends = stop_ids(loaded)
    pad = loaded.tokenizer.pad_token_id
    pad = ends[0] if pad is None else pad
    config = GenerationConfig(
        max_new_tokens=tokens, eos_token_id=ends, pad_token_id=pad, do_sample=False
    )
    order = sorted(range(len(ids)), key=lambda n: len(ids[n]))
    replies: list[list[int]] = [[] for _ in ids]
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        longest = max(len(ids[n]) for n in part)
        rows = torch.tensor([[pad] * (longest - len(ids[n])) + ids[n] for n in part])
        mask = torch.tensor([[0] * (longest - len(ids[n])) + [1] * len(ids[n]) for n in part])
        with core.generate._without_own_generation_config(loaded.model):
            out = loaded.model.generate(
                input_ids=rows.to(loaded.device),
                attention_mask=mask.to(loaded.device),
                generation_config=config,
            )
        for n, row in zip(part, out[:, longest:].tolist(), strict=True):
            end = next((i for i, token in enumerate(row) if token in ends), len(row))
            replies[n] = row[:end]
    return replies


def published(loaded: LoadedModel) -> LoadedModel:
    """The same weights in the layers that transformers gives them."""
    own = {id(p): p for p in loaded.model.parameters()}
    model = copy.deepcopy(loaded.model, own)
    layers: list[nn.Linear] = [m for m in model.modules() if isinstance(m, FrozenLinear)]
    for layer in layers:
        layer.__class__ = nn.Linear
    return dataclasses.replace(loaded, model=model)


@torch.no_grad()
def alone(loaded: LoadedModel, prompt: list[int], tokens: int) -> list[int]:
    """One prompt by whole sequences, no cache."""
    ids, ends = list(prompt), set(stop_ids(loaded))
    for _ in range(tokens):
        row = torch.tensor([ids], device=loaded.device)
        token = int(loaded.last_logits(1, input_ids=row, use_cache=False)[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


@click.command()
@click.option("--model", default="embedded")
@click.option("--prompts", type=click.IntRange(2), default=96)
@click.option("--tokens", type=click.IntRange(1), default=32)
@click.option("--rounds", type=click.IntRange(1), default=3)
@click.option("--checked", type=click.IntRange(0), default=96, help="Replies made by a plain loop.")
def main(model: str, prompts: int, tokens: int, rounds: int, checked: int) -> None:
    """Measure replies a second, in turn."""
    loaded = load(model)
    renderer = Renderer(loaded)
    asked = load_behaviours()[:prompts]
    texts = [renderer.render(Conversation.build(b.request)).text for b in asked]
    ids = renderer.tokenise(texts)
    mean = sum(map(len, ids)) / len(ids)
    peak = matrix_peak(loaded.device, loaded.dtype)
    click.echo(f"{loaded.describe()}; {device_name(loaded.device)}, {peak:.0f} GFLOP/s")
    click.echo(f"{len(ids)} prompts of {mean:.0f} tokens, {tokens} new ones")

    def ours() -> list[str]:
        return complete(renderer, texts, max_new_tokens=tokens)

    replies = ours()  # warms up, and is compared
    works: dict[str, Callable[[], object]] = {"ours": ours}
    theirs = published(loaded)
    for batch in BATCHES:
        if batch <= len(ids):
            works[f"transformers, {batch}"] = partial(generated, theirs, ids, tokens, batch)
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds):
        names = list(works)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(timed(works[name], loaded.device)[0])
    rows = [["", "seconds, median", "replies a second", "each round"]]
    for name, own in times.items():
        middle = median(own)
        each = " ".join(f"{t:.2f}" for t in own)
        rows.append([name, f"{middle:.2f}", f"{len(ids) / middle:.1f}", each])
    click.echo(aligned(rows))
    if checked:
        plain = [alone(theirs, prompt, tokens) for prompt in ids[:checked]]
        expected = [loaded.tokenizer.decode(r, skip_special_tokens=True).strip() for r in plain]
        same = sum(a == b for a, b in zip(replies, expected, strict=False))
        click.echo(f"the text of a plain loop in {same} of {len(expected)} replies")
    best = min((n for n in times if n != "ours"), key=lambda n: median(times[n]))
    ratios = [b / o for b, o in zip(times[best], times["ours"], strict=True)]
    click.echo(f"against {best}\nratio {median(ratios):.2f}")


if __name__ == "__main__":
    main()
