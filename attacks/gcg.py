"""Greedy Coordinate Gradient (Zou et al., arXiv 2307.15043, algorithm 1) against one behaviour.

Each step: 1. token gradient of the target loss at the current suffix; 2. per position the top-k allowed tokens;
3. draw ``search_width`` candidates with ``n_replace`` positions replaced, drop no-ops and duplicates; 4. drop those
without token fidelity in the whole conversation; 5. score the rest exactly; 6. the lowest becomes the current suffix,
also where its loss is higher than before (the paper keeps no best). Returned is the best suffix over all steps with
its own loss.

Options that make it another algorithm are off by default: ``momentum`` in step 1 (MAC, arXiv 2405.01229), and those of
``attacks/selection.py`` in steps 5 and 6.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from attacks.candidates import sample_candidates
from attacks.objective import TargetLoss
from attacks.selection import choose
from attacks.slot import SuffixSlot
from core.errors import AttackPlaneError


@dataclass(frozen=True)
class GCGConfig:
    """Defaults are the paper's (its section 3: 500 steps, B = 512, k = 256, 20 tokens of "!")."""

    num_steps: int = 500
    search_width: int = 512
    topk: int = 256
    n_replace: int = 1
    suffix_length: int = 20
    init_suffix: str | None = None
    placement: str = "{request} {suffix}"
    system_prompt: str | None = None
    ascii_only: bool = True
    stop_loss: float = 0.0
    """Stop once the best loss is at or below this (nats per target token); 0 runs all steps, as the paper does."""
    stop_on_match: bool = False
    """Stop at a suffix after which greedy decoding gives the target, and return that one."""
    momentum: float = 0.0
    """mu of g <- mu g + (1 - mu) gradient, the direction that candidates are drawn by (MAC); 0 is GCG."""
    screen: int = 0
    merge: int = 0
    draft: str | None = None
    """Model spec of the draft model of probe sampling; for these three see ``attacks/selection.py``."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "search_width", "topk", "n_replace", "suffix_length"):
            if getattr(self, name) < (0 if name == "num_steps" else 1):
                raise AttackPlaneError(f"{name} is too small", where="gcg", got=getattr(self, name))
        if not 0 <= self.momentum < 1 or self.screen < 0 or self.merge < 0:
            got = (self.momentum, self.screen, self.merge)
            raise AttackPlaneError(
                "momentum must lie in [0, 1), screen and merge be 0 or more", where="gcg", got=got
            )


@dataclass
class GCGState:
    """All that the next step depends on; plain data, so that a saved state goes on to the bit."""

    suffix_ids: list[int]
    generator_state: list[int]
    batch_size: int
    best_ids: list[int] = field(default_factory=list)
    best_step: int = 0
    losses: list[float] = field(default_factory=list)
    """Loss of the current suffix after each step; index 0 is the initial suffix."""
    scored: list[int] = field(default_factory=list)
    """Candidates scored in each step, after the filters."""
    momentum: torch.Tensor | str | None = None
    """Running mean of the gradients, (suffix length, vocabulary); base64 of its float32 in a row. Only with momentum."""

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.scored)

    @property
    def best_loss(self) -> float:
        return self.losses[self.best_step]

    def note(self, loss: float) -> None:
        """Record the loss of ``suffix_ids`` and keep the best."""
        self.losses.append(loss)
        if len(self.losses) == 1 or loss < self.best_loss:
            self.best_step, self.best_ids = len(self.losses) - 1, list(self.suffix_ids)

    def __post_init__(self) -> None:
        if isinstance(self.momentum, str):
            values = torch.frombuffer(bytearray(base64.b64decode(self.momentum)), dtype=torch.float32)
            self.momentum = values.view(len(self.suffix_ids), -1)

    def to_row(self) -> dict[str, Any]:
        row = dict(vars(self))
        if isinstance(self.momentum, torch.Tensor):
            row["momentum"] = base64.b64encode(self.momentum.cpu().numpy().tobytes()).decode()
        return row


def run_gcg(
    objective: TargetLoss,
    slot: SuffixSlot,
    config: GCGConfig,
    allowed: torch.Tensor,
    *,
    seed: int,
    state: GCGState | None = None,
    draft: TargetLoss | None = None,
    on_step: Callable[[GCGState], None] = lambda state: None,
) -> GCGState:
    """Optimise one suffix; ``on_step`` is called after every step, and a state it was given can be passed back in.

    ``draft`` is the same slot's loss on the draft model, for probe sampling.

    Raises:
        AttackPlaneError: the loss is not finite (a precision too narrow for this model).
    """
    if config.n_replace > len(slot.initial_ids):
        raise AttackPlaneError(
            "more positions to replace than the suffix has tokens",
            where="gcg n_replace",
            got=f"{config.n_replace}, suffix of {len(slot.initial_ids)} tokens",
        )
    if config.draft and draft is None:
        raise AttackPlaneError("probe sampling needs the draft's loss", where="gcg draft", got=config.draft)
    generator = torch.Generator().manual_seed(seed)
    if state is None:
        state = GCGState(list(slot.initial_ids), [], objective.batch.value)
        state.note(_finite(float(objective.losses(torch.tensor([state.suffix_ids]))[0]), objective))
    else:
        generator.set_state(torch.tensor(state.generator_state, dtype=torch.uint8))
        objective.batch.value = state.batch_size
    while state.step < config.num_steps and state.best_loss > config.stop_loss:
        suffix = torch.tensor(state.suffix_ids)
        _, gradient = objective.token_gradient(suffix)
        if config.stop_on_match and objective.matches:
            break
        if config.momentum:
            gradient = _running_mean(state, gradient, config.momentum)
        candidates = sample_candidates(
            suffix,
            gradient,
            allowed,
            topk=config.topk,
            width=config.search_width,
            n_replace=config.n_replace,
            generator=generator,
        )
        candidates = candidates[torch.tensor(slot.faithful(candidates.tolist()), dtype=torch.bool)]
        state.scored.append(len(candidates))
        if len(candidates):
            state.suffix_ids, loss = choose(
                objective,
                slot,
                suffix,
                candidates,
                screen=config.screen,
                merge=config.merge,
                draft=draft,
                generator=generator,
            )
            state.note(_finite(loss, objective))
        else:  # every candidate merged with a neighbour: stay, and draw others in the next step
            state.note(state.losses[-1])
        state.generator_state = generator.get_state().tolist()
        state.batch_size = objective.batch.value
        on_step(state)
    if config.stop_on_match:
        objective.share(torch.tensor(state.suffix_ids))
        if objective.matches:
            state.best_step, state.best_ids = len(state.losses) - 1, list(state.suffix_ids)
    return state


def _running_mean(state: GCGState, gradient: torch.Tensor, momentum: float) -> torch.Tensor:
    """MAC's gradient, kept in the state."""
    if isinstance(state.momentum, torch.Tensor):
        gradient = momentum * state.momentum.to(gradient.device) + (1 - momentum) * gradient
    state.momentum = gradient
    return gradient


def _finite(loss: float, objective: TargetLoss) -> float:
    if not math.isfinite(loss):
        raise AttackPlaneError(
            "the target loss is not finite",
            where=objective.loaded.spec,
            got=loss,
            remedy="use a wider precision, for example ?dtype=float32 or ?dtype=bfloat16",
        )
    return loss
