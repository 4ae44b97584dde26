"""Rough scores of all candidates, exact ones of those that may be best: GCG's own winner, sooner.

A copy of the model with coarser products (``attacks/rough.py``) scores every candidate. Its errors
(rough less exact loss) are nearly one constant: what differs between candidates is small beside
what their losses differ by. So candidates are scored exactly in the order of their rough losses,
until

    rough loss of the next - mean error - MARGIN x standard deviation of the errors > lowest exact

where mean and deviation are those of all errors that this search has seen. The winner is missed
only where its own error is more than so many deviations above the mean, and then by less than its
loss lies below the next one. The first step also scores some of all candidates exactly, so that
errors are known not only where rough losses are low. The loss of what is taken is always the exact
one. Nothing is gained where the machine has no fast products of 8-bit integers, or the model is in
bfloat16 already: ``gains`` measures it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attacks.gcg import GCGConfig
from attacks.objective import TargetLoss
from attacks.protocols import SuffixLoss
from attacks.rough import RoughModel
from attacks.slot import SuffixSlot
from attacks.workbench import Workbench
from core.measured import is_faster, seconds_of
from core.models import LoadedModel
from core.products import has_integer_products
from core.rows import Row

MARGIN = 2.25
"""Standard deviations of the error that the next candidate is given."""
KNOWN = 32
"""Errors that must be known before anything is left out."""
TRIED = 48
"""Candidates that ``gains`` scores; fewer would not show what a batch of a search takes."""
TOGETHER = 4
"""Most candidates that are scored exactly at once, where no more are asked for."""
GAIN = 0.6
"""Screening is used where a rough pass takes at most this share of an exact one."""
METHOD = "rounded differences"
"""What the kept measurement is of: another kind of rough pass is measured anew."""


def rough_copy(loaded: LoadedModel) -> RoughModel | None:
    """The copy that rough losses come from.

    None where the model has a hook, is not in float32, lies on several devices, or has no linear
    layers to round, and on a CPU without products of 8-bit integers (VNNI): there sums of them may
    saturate.
    """
    if loaded.hook or loaded.dtype != torch.float32 or loaded.shared_out:
        return None
    if loaded.device.type == "cpu" and not has_integer_products():
        return None
    rough = RoughModel(loaded)
    return rough if rough.layers else None


def gains(objective: TargetLoss, initial: Tensor) -> bool:
    """Whether a rough pass is so much faster than an exact one, on suffixes like this one.

    It is measured once for a model on this machine.
    """
    loaded = objective.loaded
    about = [METHOD, loaded.fingerprint, str(loaded.device)]
    return is_faster("screening", about, lambda: _seconds(objective, initial), GAIN)


def rough_model(
    bench: Workbench, config: GCGConfig, slot: SuffixSlot, saved: Row | None
) -> RoughModel | None:
    """The copy of the slot's model that candidates are screened by; None where nothing is gained.

    That is measured once on this machine. A search that was begun goes on in its own way.
    """
    loaded = slot.renderer.loaded
    if config.exact or config.draft or (saved and not saved["screening"]):
        return None
    rough = bench.once(("rough", loaded.spec), lambda: rough_copy(loaded))
    if rough is None or saved is not None:
        return rough

    def measured() -> bool:
        return gains(TargetLoss(loaded, slot, rough=rough), torch.tensor(slot.initial_ids))

    return rough if bench.once(("screening", loaded.spec), measured) else None


def _seconds(objective: TargetLoss, initial: Tensor) -> tuple[float, float]:
    """Of a rough and of an exact pass over the same candidates."""
    objective.share(initial)
    candidates = initial.repeat(TRIED, 1)
    rows = torch.arange(TRIED)
    candidates[rows, rows % len(initial)] = initial.flip(0)[rows % len(initial)] ^ 1
    return (
        seconds_of(lambda: objective.rough_losses(candidates), 2),
        seconds_of(lambda: objective.losses(candidates), 2),
    )


@dataclasses.dataclass
class Screening:
    """What a search has learnt of the errors of rough losses; plain data, for its saved state.

    Attributes:
        count, mean, squares: of the errors so far; squares is the sum of squared deviations.
        exactly: candidates that were scored exactly.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    exactly: int = 0

    def learn(self, error: float) -> None:
        """Welford's update."""
        self.count += 1
        before = error - self.mean
        self.mean += before / self.count
        self.squares += before * (error - self.mean)

    @property
    def deviation(self) -> float:
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else math.inf

    def lowest(
        self, objective: SuffixLoss, candidates: Tensor, count: int = 1
    ) -> list[tuple[int, float]]:
        """(index, exact loss) of the ``count`` candidates with the lowest losses, best first."""
        rough = objective.rough_losses(candidates)
        left, known = rough.argsort(), list[tuple[float, int]]()
        most = max(TOGETHER, count)
        part = left[: self._may_be_best(rough[left[:most]], float(rough[left[:count]][-1]))]
        if self.count < KNOWN:  # some of all
            part = left[torch.linspace(0, len(left) - 1, min(KNOWN, len(left))).round().long()]
        while len(part):
            losses: Sequence[float] = objective.losses(candidates[part]).tolist()
            for index, loss in zip(part.tolist(), losses, strict=True):
                if not math.isfinite(loss):
                    return [(index, loss)]
                self.learn(float(rough[index]) - loss)
                known.append((loss, index))
            left = left[~torch.isin(left, part)]
            enough = sorted(known)[count - 1][0] if len(known) >= count else math.inf
            part = left[: self._may_be_best(rough[left[:most]], enough + self.mean)]
        self.exactly += len(known)
        return [(index, loss) for loss, index in sorted(known)[:count]]

    def _may_be_best(self, rough: Tensor, enough: float) -> int:
        """How many of the next candidates, by their rough losses, may be below a rough loss."""
        return int((~(rough > enough + MARGIN * self.deviation)).sum())
