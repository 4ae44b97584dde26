"""Peak memory: of the device on CUDA, else of this process."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

PEAK = "peak_mib"


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
