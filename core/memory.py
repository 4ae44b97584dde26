"""Memory: its peak, and what a process does with what it frees."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

PEAK = "peak_mib"
BLOCKS = 32 * 2**20
"""Bytes of the largest freed block that ``keep_freed`` keeps, the most that every glibc allows."""


def forget_peak(device: torch.device) -> None:
    """Start counting peak memory anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device: torch.device) -> float | None:
    """Peak since ``forget_peak`` in MiB: memory of the device on CUDA, else of this process; None
    where not told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(
        int(s.split()[1]) / 1024 for s in status.read_text().splitlines() if s.startswith("VmHWM")
    )


def keep_freed() -> None:
    """From here on this process keeps what it frees, for its next tensors. For glibc only.

    Otherwise a freed tensor of some megabytes goes back to the system, and the next one gets new
    pages, each of which costs a fault: a fifth of a rough pass (docs/lab-log.md).
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(mmap_threshold, BLOCKS)
    mallopt(trim_threshold, 2**31 - 1)
