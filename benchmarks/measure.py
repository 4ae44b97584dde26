"""What the benchmarks share: models of a known size with random weights, wall time, a machine's
peak, memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from core.models import LoadedModel, default_device
from core.rows import Row

RANDOM: dict[str, Row] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}


def random_model(name: str, dtype: torch.dtype) -> LoadedModel:
    """A Llama of that size with random weights, and a byte-level tokenizer trained on the tests'
    few lines."""
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


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Wall time of one call in seconds, the device's queue emptied before and after; and its
    result."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def matrix_peak(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """GFLOP/s of a large square matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = ((10 * torch.randn(n, n, device=device)).to(dtype) for _ in range(2))
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    seconds = [timed(lambda: multiply(a, b.T), device)[0] for _ in range(repeats + 1)]
    return 2 * n**3 / median(seconds[1:]) / 1e9


def device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
