"""Faster and rougher matrix products for a while: bfloat16 on a CPU, TF32 on CUDA, float32 results either way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def reduced_products(device: torch.device) -> Iterator[None]:
    """Float32 matrix products of this process in reduced precision; the setting is put back afterwards.

    Without hardware for it (AMX or AVX-512 BF16 on a CPU) the CPU computes as before.
    """
    backend, mode = (
        (torch.backends.cuda.matmul, "tf32")
        if device.type == "cuda"
        else (torch.backends.mkldnn.matmul, "bf16")
    )
    before = backend.fp32_precision
    backend.fp32_precision = mode
    try:
        yield
    finally:
        backend.fp32_precision = before
