"""Checkpoints, which are targets like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evaluation.behaviours import DEMONSTRATION
from plots.training_png import LOSSES, draw
from training.devices import Devices
from training.loop import train
from training.registry import ARMS, TrainResult
from training.requests import requests_of
from training.saved import SECONDS


def train_arm(
    name: str,
    spec: str,
    out: Path,
    config: Any,
    behaviours: str = DEMONSTRATION,
    *,
    replies: str | None = None,
    save_every: int = 10,
) -> TrainResult:
    """Train one arm on the training split of a behaviour set; checkpoints are ``out/step-N``.

    Args:
        replies: a file of requests and replies, or ``ultrachat``, in place of the set's ordinary
            requests.
    """
    arm = ARMS.get(name)
    requests = requests_of(behaviours, arm.needs, replies, where=f"train {name}")
    if arm.fit:
        Devices().refuse_several(f"train {name}")
        return arm.fit(arm, spec, requests, config, out)
    result = train(arm, spec, requests, config, out, save_every=save_every)
    if result.first:
        result.files = [out / LOSSES, out / SECONDS, draw(out)]
    return result
