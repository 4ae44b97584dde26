"""What CB and RepBend share: they compare inner states with the base's.

In what units are distances of states measured: as they are, or by the model's own lengths?

CB and RepBend weigh distances of residual states against terms that have no unit (cosines, KL). The
published weights were found on models whose states are of the order of 10 long. SmolLM2's are
hundreds long, and there a distance drowns everything else. With ``relative`` a distance counts in
tenths of the base's median length at its layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.settings import setting
from training.config import TrainConfig
from training.examples import Example
from training.registry import Bench

if TYPE_CHECKING:  # arms are listed, and their options shown, without torch
    from torch import Tensor

TENTHS = 10.0
PROBED = 16
"""Examples that lengths are taken from."""


@dataclass(frozen=True)
class StatesConfig(TrainConfig):
    """Settings of an arm that moves the states of harmful continuations and holds ordinary ones."""

    relative: bool = setting(
        False, "Measure distances by the base's own lengths (training/states.py)."
    )
    opened: bool = setting(False, "Hold ordinary replies that open as harmful ones do too.")


def units(
    bench: Bench, examples: Sequence[Example], layers: Sequence[int], *, relative: bool
) -> Tensor:
    """(layer, 1, 1) lengths that count as one: ones, or a tenth of the base's median length."""
    import torch

    if not relative:
        return torch.ones(len(layers), 1, 1, device=bench.adapted.loaded.device)
    with bench.adapted.off():
        states = bench.forward(examples[:PROBED], layers).all_residuals(layers)
    return states.float().norm(dim=-1).median(-1).values[:, None, None] / TENTHS
