"""What a search asks of a loss, of the place of a suffix, and of the progress of several prompts.

``objective.TargetLoss`` and ``universal.UniversalLoss`` are losses, ``slot.SuffixSlot`` and
``universal.SharedSuffix`` are places; any other object that offers the same can be searched on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from core.batching import BatchSize
from core.models import LoadedModel


class SuffixLoss(Protocol):
    """A loss of suffixes, in nats per target token. Suffixes are (candidate, suffix length) ids."""

    loaded: LoadedModel
    batch: BatchSize
    matches: bool
    """Whether greedy decoding gives the target after the suffix last shared or differentiated."""

    def losses(self, suffixes: Tensor) -> Tensor:
        """(candidate,) exact losses, float32 on the CPU."""
        ...

    def rough_losses(self, suffixes: Tensor) -> Tensor:
        """(candidate,) losses in reduced precision."""
        ...

    def best(self, suffixes: Tensor) -> tuple[int, float]:
        """Index and exact loss of the candidate with the lowest loss."""
        ...

    def share(self, suffix: Tensor) -> None:
        """Make this suffix the one that candidates are expected to resemble."""
        ...

    def token_gradient(self, suffix: Tensor) -> tuple[float, Tensor]:
        """Loss of one suffix and its (suffix length, vocabulary) gradient."""
        ...

    def take_operations(self) -> float:
        """Operations since this was last asked: 2 a parameter and token forward, 4 backward."""
        ...

    def weights_changed(self) -> None:
        """Compute anew what is kept of the model; call it after every training step."""
        ...


class SuffixPlace(Protocol):
    """Where a suffix stands: its first value, and which values keep their tokens there."""

    @property
    def initial_ids(self) -> tuple[int, ...]: ...

    def faithful(self, suffixes: Sequence[Sequence[int]]) -> list[bool]:
        """Token fidelity of each suffix in its whole conversation."""
        ...


class Growth(Protocol):
    """Prompts that join a loss one after another (universal GCG)."""

    active: int
    """Prompts in the loss."""

    @property
    def waiting(self) -> bool:
        """Whether prompts have yet to join."""
        ...

    def grow(self) -> bool:
        """Let the next prompt join; False when all are in the loss."""
        ...
