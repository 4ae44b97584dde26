"""Which training arms there are. The command line, the manifest and the API read this.

An arm is declared in its own module of this package, or in a plugin:

    ARM = ARMS.add(Arm(name="sft", config=SFTConfig, method=method, needs=("harmless",), ...))

``method(bench, config)`` prepares what is trained on and returns a ``Method``: how a micro-batch
becomes losses. The loop (``training/loop.py``) does the rest.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from attacks.registry import Speed
from core.errors import AttackPlaneError, nearest
from core.registry import Registry
from core.rows import Row
from core.typed import from_values
from training.config import SMALL, TrainConfig
from training.requests import Requests

if TYPE_CHECKING:  # arms are listed, and their options shown, without torch
    from torch import Tensor

    from training.adapter import Adapted
    from training.data import Texts
    from training.devices import Devices
    from training.forward import Forward

PAPER, SMALL_PRESET = "paper", "small"
SEQUENCE, FORWARD_AND_BACKWARD = 60, 3
"""For estimates: tokens of a sequence (a request in its template and a short reply), and what an
update of it costs in forward passes."""
Losses: TypeAlias = "Mapping[str, Tensor]"
"""Component -> its weighted loss. Those of one mapping share a graph and are differentiated
together."""


class Clock:
    """Seconds by part of an update."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Bench:
    """What an arm works with: the model with its adapter, texts, and the processes."""

    adapted: Adapted
    forward: Forward
    texts: Texts
    devices: Devices
    clock: Clock
    config: Any


@dataclass(frozen=True)
class Method:
    """How one arm learns.

    Attributes:
        losses: number of a micro-batch, counted from 0 over the whole training -> its losses, graph
            by graph. Their sum is what the optimiser lowers.
        after_update: called with the number of finished updates after each; returns what else is
            logged.
        state, restore: what it keeps between updates besides weights; plain data and tensors.
    """

    losses: Callable[[int], Iterator[Losses]]
    after_update: Callable[[int], Mapping[str, float]] = lambda updates: {}
    state: Callable[[], Row] = dict
    restore: Callable[[Row], None] = lambda row: None


@dataclass
class TrainResult:
    """Checkpoint folders, what was logged update by update, seconds by part, other files.

    ``first``: whether this process is the one that writes and tells.
    """

    checkpoints: list[Path]
    losses: list[dict[str, float]]
    seconds: list[dict[str, float]]
    files: list[Path] = field(default_factory=list)
    note: str = ""
    first: bool = True


def update_cost(config: TrainConfig, speed: Speed, *, learnt: int = 0, frozen: int = 0) -> float:
    """Seconds of all updates.

    Args:
        learnt: sequences of a micro-batch that gradients go through; 0: its batch size.
        frozen: further sequences that are only read.
    """
    passes = FORWARD_AND_BACKWARD * (learnt or config.batch_size) + frozen
    return config.num_steps * config.accumulation * passes * SEQUENCE * speed.token


@dataclass(frozen=True)
class Arm:
    """One way to train, as everything else knows it.

    Attributes:
        name: on the command line and in the manifest.
        summary: one line of help.
        config: frozen dataclass of its settings, whose defaults are the paper's.
        method: prepares the training; None for an arm that is fitted without gradients.
        fit: fits such an arm: (arm, spec, requests, config, folder) -> result.
        needs: labels of the requests that it trains on.
        validates: whether it chooses something on the split validation.
        cost: (config, speed) -> seconds of one training, for plans (``update_cost``).
        small: what the preset ``small`` changes, besides what every arm changes.
        blocks: (config, number of blocks) -> the blocks that get an adapter; None: all.
        source: the paper or code that it follows.
        examples: command lines, without the program.
    """

    name: str
    summary: str
    config: type[Any]
    needs: Sequence[str]
    source: str
    method: Callable[[Bench, Any], Method] | None = None
    fit: Callable[[Arm, str, Requests, Any, Path], TrainResult] | None = None
    validates: bool = False
    cost: Callable[[Any, Speed], float] = lambda config, speed: update_cost(config, speed)
    small: Mapping[str, Any] = field(default_factory=dict)
    blocks: Callable[[Any, int], range | None] = lambda config, n_layers: None
    examples: Sequence[str] = ()

    @property
    def presets(self) -> dict[str, Row]:
        common = SMALL if issubclass(self.config, TrainConfig) else {}
        return {PAPER: {}, SMALL_PRESET: {**common, **self.small}}

    def make_config(
        self, values: Mapping[str, Any], *, preset: str = PAPER, where: str | None = None
    ) -> Any:
        """A config from a preset and ``values``, which win; ``where`` they stand, for messages.

        Raises:
            AttackPlaneError: unknown preset or setting, or a value that the config refuses.
        """
        where = where or f"train {self.name}"
        if preset not in self.presets:
            raise AttackPlaneError(
                f"unknown preset {preset!r}",
                where=where,
                remedy=nearest(preset, [*self.presets]),
            )
        merged = {**self.presets[preset], **values}
        merged = {k: tuple(v) if isinstance(v, list) else v for k, v in merged.items()}
        trained = issubclass(self.config, TrainConfig)
        if trained and "checkpoints" not in values:  # a preset's may lie beyond the steps
            defaults = {f.name: f.default for f in dataclasses.fields(self.config)}
            own = {**defaults, **merged}
            merged["checkpoints"] = tuple(c for c in own["checkpoints"] if c <= own["num_steps"])
        return from_values(self.config, merged, where)


ARMS: Registry[Arm] = Registry("training arm", "training")
