"""Faster and rougher matrix products for a while: bfloat16 on a CPU, TF32 on CUDA.

Results are float32 either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def _products(device: torch.device, cpu: str, cuda: str) -> Iterator[None]:
    backend: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    mode = cpu
    if device.type == "cuda":
        backend, mode = torch.backends.cuda.matmul, cuda
    before = backend.fp32_precision
    backend.fp32_precision = mode
    try:
        yield
    finally:
        backend.fp32_precision = before


def reduced_products(device: torch.device) -> AbstractContextManager[None]:
    """Float32 matrix products of this process in reduced precision; the setting is put back
    afterwards.

    Without hardware for it (AMX or AVX-512 BF16 on a CPU) the CPU computes as before.
    """
    return _products(device, "bf16", "tf32")


def is_reduced(device: torch.device) -> bool:
    """Whether a stretch of ``reduced_products`` is under way on a CPU."""
    products: Any = torch.backends.mkldnn
    return device.type == "cpu" and products.matmul.fp32_precision == "bf16"


def full_products(device: torch.device) -> AbstractContextManager[None]:
    """Full precision within a reduced stretch: the many small products of attention are slower in
    bfloat16 on a CPU.

    Outside such a stretch it touches nothing, so that threads do not undo each other's settings.
    """
    return _products(device, "ieee", "ieee") if is_reduced(device) else nullcontext()
