"""Adaptive dense-to-sparse optimisation of a suffix (ADC, arXiv 2405.09113, algorithm 1).

A suffix is relaxed to z, (start, position, vocabulary): at each position all tokens have weights,
which sum to 1. Its embedding is z @ embedding table. Each step, for all starts at once:

1. v <- momentum v + gradient of the target loss in z;  z <- z - learning_rate v
2. S = exp(number of target tokens that are not the likeliest). Each position keeps its floor(S)
   or floor(S) + 1 largest weights, so many of either that the mean is S. So z is dense while the
   target is far, and one-hot where it is met.
3. Weights below 0 become 0, and those of a position are divided by their sum.

The suffix of a start is the likeliest token of each position. Every ``read_every`` steps the
suffixes are scored exactly, and the best that keeps its tokens is kept.

The paper's settings are 16 starts, learning rate 10, momentum 0.99, 5000 steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attacks.adc import ADCConfig
from attacks.objective import TargetLoss
from attacks.protocols import SuffixPlace


@dataclass
class ADCResult:
    """The best suffix that was read; ``losses``: lowest exact loss of each reading."""

    ids: list[int]
    loss: float
    losses: list[float] = field(default_factory=list)
    best_reading: int = 0
    matches: bool = False
    operations: float = 0.0


def sparsified(z: Tensor, sparsity: Tensor, generator: torch.Generator) -> Tensor:
    """(start, position, vocabulary) weights with ``sparsity`` (start,) kept a position on average.

    Which positions keep one more is drawn. A position without a weight above 0 keeps its largest.
    """
    starts, length, vocabulary = z.shape
    sparsity = sparsity.clamp(1, vocabulary)
    low = sparsity.floor()
    more = ((sparsity - low) * length).round()
    rank = torch.rand(starts, length, generator=generator).argsort(1).argsort(1)
    kept = (low[:, None] + (rank < more[:, None])).clamp_max(vocabulary).long()
    most = int(kept.max())
    top = z.topk(most, dim=2)
    wanted = torch.arange(most) < kept[..., None]
    values = (top.values * wanted).clamp_min(0)
    empty = values.sum(2) <= 0
    values[..., 0] = torch.where(empty, torch.ones_like(values[..., 0]), values[..., 0])
    return torch.zeros_like(z).scatter_(2, top.indices, values / values.sum(2, keepdim=True))


def run_adc(
    objective: TargetLoss,
    slot: SuffixPlace,
    config: ADCConfig,
    allowed: Tensor,
    *,
    seed: int,
    on_step: Callable[[int, ADCResult], None] = lambda step, best: None,
) -> ADCResult:
    """Optimise one suffix.

    Args:
        allowed: (vocabulary,) bool.
        on_step: called with the steps done and the best so far.
    """
    generator = torch.Generator().manual_seed(seed)
    initial = torch.tensor(slot.initial_ids)
    objective.take_operations()  # what was prepared is no part of the search
    first = float(objective.losses(initial[None])[0])
    best = ADCResult(initial.tolist(), first, [first])
    ids = allowed.nonzero()[:, 0]  # weights are of allowed tokens alone
    table = objective.loaded.embedding_table[ids.to(objective.loaded.device)].detach()
    z = torch.randn(config.starts, len(initial), len(ids), generator=generator).softmax(2)
    velocity = torch.zeros_like(z)
    for step in range(1, config.num_steps + 1):
        missed, gradient = objective.soft_gradient(z, table)
        velocity = config.momentum * velocity + gradient
        z = sparsified(z - config.learning_rate * velocity, missed.double().exp(), generator)
        if step % config.read_every == 0 or step == config.num_steps:
            _read(objective, slot, ids[z.argmax(2)], best)
        best.operations += objective.take_operations()
        on_step(step, best)
        if config.stop_on_match and best.matches:
            break
    return best


def _read(objective: TargetLoss, slot: SuffixPlace, suffixes: Tensor, best: ADCResult) -> None:
    """Score the starts' suffixes that keep their tokens, and take the best into the result."""
    kept = suffixes[torch.tensor(slot.faithful(suffixes.tolist()), dtype=torch.bool)]
    if not len(kept):  # a reading of which nothing is known stands as the one before
        best.losses.append(best.losses[-1])
        return
    losses = objective.losses(kept)
    best.losses.append(float(losses.min()))
    if best.losses[-1] < best.loss:
        winner = kept[losses.argmin()]
        best.ids, best.loss = winner.tolist(), best.losses[-1]
        best.best_reading = len(best.losses) - 1
        objective.share(winner)
        best.matches = objective.matches
