"""Seconds of one GCG step by parts, and what the shared prefix saves. Usage:

    python -m benchmarks.gcg_step --model embedded --width 64
    python -m benchmarks.gcg_step --random llama-8b --dtype bfloat16 --width 512      (random weights, no download)

Parts: token gradient, sampling, fidelity filter, scoring. ``plain`` scores the same candidates without the cache
of the shared prefix; the largest difference between the two losses is printed. GFLOP/s counts two operations per
weight and fed token (head at target positions only) and is compared with a large matrix product of the same run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from attacks.candidates import allowed_tokens, sample_candidates
from attacks.objective import TargetLoss
from attacks.slot import SuffixSlot, default_slot
from core.models import DTYPES, LoadedModel, default_device, load
from core.prompt import Renderer
from evaluation.behaviours import load_behaviours

RANDOM: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "llama-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip


def random_model(name: str, dtype: torch.dtype) -> LoadedModel:
    """A Llama of that size with random weights, and a byte-level tokenizer trained on the demonstration set."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import CHATML, byte_level

    tokenizer = byte_level(CHATML, ["<|im_start|>", "<|im_end|>"])
    config: Any = LlamaConfig(**RANDOM[name], max_position_embeddings=4096)
    device = default_device()
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
    return LoadedModel(f"random {name}", model, tokenizer, device, "random")


def seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float, Any]:
    """Median wall time of ``work`` after one warm-up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    result, times = work(), []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        result = work()
        wait()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2], result


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of a large square matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    took, _ = seconds(lambda: a @ b, device, 7)
    return 2 * n**3 / took / 1e9


def scoring_gflop(loaded: LoadedModel, slot: SuffixSlot, candidates: int) -> float:
    """Necessary operations of scoring: two per block weight and fed token, two per head weight and target token."""
    body = sum(p.numel() for block in loaded.blocks for p in block.parameters())
    fed = len(slot.initial_ids) + len(slot.after_ids) + len(slot.target_ids) - 1
    return 2 * candidates * (body * fed + loaded.embedding_table.numel() * len(slot.target_ids)) / 1e9


@click.command()
@click.option("--model", default="embedded")
@click.option(
    "--random", "random_name", type=click.Choice(list(RANDOM)), help="Random weights of a known size."
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", help="With --random.")
@click.option("--width", "widths", type=int, multiple=True, default=(64,))
@click.option("--topk", type=int, default=256)
@click.option("--repeats", type=int, default=3)
@click.option("--plain/--no-plain", default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Append the rows here as JSON lines.")
def main(
    model: str,
    random_name: str | None,
    dtype: str,
    widths: tuple[int, ...],
    topk: int,
    repeats: int,
    plain: bool,
    out: Path | None,
) -> None:
    """Measure one GCG step by parts."""
    loaded = random_model(random_name, DTYPES[dtype]) if random_name else load(model)
    behaviour = load_behaviours(label="harmful", splits=["test"])[0]
    assert behaviour.target_string is not None
    renderer = Renderer(loaded)
    slot = default_slot(
        renderer, behaviour.request, behaviour.target_string, length=20,
        placement="{request} {suffix}", system=None,
    )  # fmt: skip
    objective = TargetLoss(loaded, slot)
    suffix = torch.tensor(slot.initial_ids)
    allowed = allowed_tokens(loaded.tokenizer, loaded.embedding_table.shape[0])
    device, peak = loaded.device, matrix_peak(loaded.device, loaded.dtype)
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    click.echo(f"{loaded.describe()}; {name}; matrix product {peak:.0f} GFLOP/s")
    click.echo(
        f"tokens: {len(slot.before_ids)} prefix, {len(suffix)} suffix, {len(slot.after_ids)} tail, {len(slot.target_ids)} target"
    )
    gradient_s, (_, gradient) = seconds(lambda: objective.token_gradient(suffix.to(device)), device, repeats)
    for width in widths:
        generator = torch.Generator().manual_seed(0)
        sample_s, drawn = seconds(
            partial(
                sample_candidates,
                suffix,
                gradient,
                allowed,
                topk=topk,
                width=width,
                n_replace=1,
                generator=generator,
            ),
            device,
            repeats,
        )
        filter_s, kept = seconds(partial(slot.faithful, drawn.tolist()), device, repeats)
        drawn = drawn[torch.tensor(kept)]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        score_s, losses = seconds(partial(objective.losses, drawn), device, repeats)
        rate = scoring_gflop(loaded, slot, len(drawn)) / score_s
        row = {
            "model": loaded.spec, "dtype": str(loaded.dtype), "device": name, "width": width,
            "scored": len(drawn), "batch": objective.batch.value, "gradient_s": gradient_s,
            "sample_s": sample_s, "fidelity_s": filter_s, "scoring_s": score_s,
            "step_s": gradient_s + sample_s + filter_s + score_s, "gflops": rate, "share_of_peak": rate / peak,
        }  # fmt: skip
        if device.type == "cuda":
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if plain:
            objective.prefix.usable = False
            plain_s, plain_losses = seconds(partial(objective.losses, drawn), device, 1)
            objective.prefix.usable = True
            row |= {
                "plain_scoring_s": plain_s,
                "largest_difference": float((losses - plain_losses).abs().max()),
            }
        click.echo("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
        if out:
            with open(out, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
