"""Greedy Coordinate Gradient (Zou et al., arXiv 2307.15043, algorithm 1) against one behaviour.

Each step: 1. token gradient of the target loss at the current suffix; 2. per position the top-k
allowed tokens;
3. draw ``search_width`` candidates with ``n_replace`` positions replaced, drop no-ops and
   duplicates; 4. drop those without token fidelity in the whole conversation; 5. score the rest;
   6. the lowest becomes the current suffix, also where its loss is higher than before (the paper
   keeps no best). Returned is the best suffix over all steps with its own loss.

Step 5 scores all candidates exactly, or finds the lowest by rough scores first
(``attacks/screening.py``).

Options that make it another algorithm are off by default:

``momentum``       step 1 takes a running mean of the gradients (MAC, arXiv 2405.01229)
``lsgm``           the gradient of step 1 counts residual branches less (``attacks/damping.py``)
``positions``      step 3 draws positions by the fall that the gradient promises at each, not
                   uniformly (ours)
``mellowmax``      the loss of steps 1 and 5 weighs the worst target tokens more
                   (``likelihood.target_nll``). nanogcg takes it over logits, which are no
                   likelihoods: losses under it cannot be compared
``buffer``         step 1 starts from the best of so many suffixes kept so far, and step 6 replaces
                   the worst of them if the winner is better (ACG and nanogcg; theirs begins with
                   random suffixes, ours with the initial one)
``final_width``, ``final_n_replace``  step 3's numbers go linearly from their first values to these
                   (ACG anneals the positions from many to one)
and those of ``attacks/selection.py`` in steps 5 and 6.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from attacks.candidates import sample_candidates
from attacks.gcg import GCGConfig
from attacks.protocols import Growth, SuffixLoss, SuffixPlace
from attacks.screening import Screening
from attacks.selection import choose
from core.errors import AttackPlaneError
from core.rows import Row


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
    """Running mean of the gradients, (suffix length, vocabulary); base64 of its float32 in a row.
    Only with momentum."""
    buffer: list[tuple[float, list[int], int]] = field(default_factory=list)
    """The best suffixes with their losses and steps, best first. Only with a buffer."""
    current_step: int = 0
    """Step that ``suffix_ids`` is of; with a buffer not always the last one."""
    bests: list[tuple[int, list[int]]] = field(default_factory=list)
    """(step, suffix) of each that was the best in its turn."""
    active: int = 1
    """Prompts in the loss. Only ``attacks/universal.py`` has more than one."""
    operations: float = 0.0
    """Spent so far: 2 a parameter and token forward, 4 backward."""
    screening: Screening | None = None
    """What is known of rough losses; None: all candidates are scored exactly. A dict in a row."""

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.scored)

    @property
    def best_loss(self) -> float:
        return self.losses[self.best_step]

    def note(self, loss: float, buffer: int = 0) -> None:
        """Record the loss of ``suffix_ids`` and keep the best.

        With a buffer, go on from its best suffix.
        """
        self.losses.append(loss)
        if len(self.losses) == 1 or loss < self.best_loss:
            self.best_step, self.best_ids = len(self.losses) - 1, list(self.suffix_ids)
            self.bests.append((self.best_step, self.best_ids))
        self.current_step = len(self.losses) - 1
        if buffer:
            kept = [*self.buffer, (loss, list(self.suffix_ids), self.current_step)]
            self.buffer = sorted(kept, key=lambda entry: entry[0])[:buffer]
            self.suffix_ids, self.current_step = list(self.buffer[0][1]), self.buffer[0][2]

    def begin_anew(self, loss: float, buffer: int = 0) -> None:
        """Forget the best: a prompt joined the loss, and earlier losses do not compare."""
        self.losses.pop()
        self.buffer, self.best_step, self.best_ids = [], len(self.losses), list(self.suffix_ids)
        self.bests = [(self.best_step, self.best_ids)]
        self.losses.append(loss)
        self.current_step = self.best_step
        self.screening = Screening() if self.screening else None
        if buffer:
            self.buffer = [(loss, list(self.suffix_ids), self.current_step)]

    def __post_init__(self) -> None:
        if isinstance(self.momentum, str):
            values = torch.frombuffer(
                bytearray(base64.b64decode(self.momentum)), dtype=torch.float32
            )
            self.momentum = values.view(len(self.suffix_ids), -1)
        if isinstance(self.screening, dict):
            self.screening = Screening(**self.screening)

    def to_row(self) -> Row:
        row = dict(vars(self))
        if isinstance(self.momentum, torch.Tensor):
            row["momentum"] = base64.b64encode(self.momentum.cpu().numpy().tobytes()).decode()
        row["screening"] = asdict(self.screening) if self.screening else None
        return row


def run_gcg(
    objective: SuffixLoss,
    slot: SuffixPlace,
    config: GCGConfig,
    allowed: torch.Tensor,
    *,
    seed: int,
    state: GCGState | None = None,
    draft: SuffixLoss | None = None,
    growth: Growth | None = None,
    screened: bool = False,
    on_step: Callable[[GCGState], None] = lambda state: None,
) -> GCGState:
    """Optimise one suffix.

    Args:
        draft: the same slot's loss on the draft model, for probe sampling.
        growth: prompts that join the loss as it is solved, for a universal suffix.
        screened: find the winner by rough scores first; a given ``state`` goes on as it was begun.
        on_step: called after every step; a state that it was given can be passed back in.

    Raises:
        AttackPlaneError: the loss is not finite (a precision too narrow for this model).
    """
    _check(slot, config, draft)
    generator = torch.Generator().manual_seed(seed)
    objective.take_operations()  # what was prepared is no part of the search
    if state is None:
        state = _begun(objective, slot, config, screened)
    else:
        _go_on(state, objective, generator, growth)
    while state.step < config.num_steps and not _low_enough(state, config, growth):
        suffix = torch.tensor(state.suffix_ids)
        _, gradient = objective.token_gradient(suffix)
        if objective.matches and growth and growth.grow():
            state.active = growth.active
            state.begin_anew(_loss_of(state.suffix_ids, objective), config.buffer)
            continue
        if config.stop_on_match and objective.matches:
            break
        if config.momentum:
            gradient = _running_mean(state, gradient, config.momentum)
        candidates = sample_candidates(
            suffix,
            gradient,
            allowed,
            topk=config.topk,
            width=config.width_at(state.step),
            n_replace=config.n_replace_at(state.step),
            generator=generator,
            by_gradient=config.positions == "gradient",
        )
        _take_best(state, objective, slot, config, suffix, candidates, draft, generator)
        state.operations += objective.take_operations()
        state.operations += draft.take_operations() if draft else 0.0
        state.generator_state = generator.get_state().tolist()
        state.batch_size = objective.batch.value
        on_step(state)
    if config.stop_on_match:
        objective.share(torch.tensor(state.suffix_ids))
        if objective.matches:
            state.best_step, state.best_ids = state.current_step, list(state.suffix_ids)
    return state


def _begun(objective: SuffixLoss, slot: SuffixPlace, config: GCGConfig, screened: bool) -> GCGState:
    """The state before the first step."""
    state = GCGState(list(slot.initial_ids), [], objective.batch.value)
    state.screening = Screening() if screened else None
    state.note(_loss_of(state.suffix_ids, objective), config.buffer)
    return state


def _go_on(
    state: GCGState, objective: SuffixLoss, generator: torch.Generator, growth: Growth | None
) -> None:
    """Bring the rest of a search to where a saved state left it."""
    generator.set_state(torch.tensor(state.generator_state, dtype=torch.uint8))
    objective.batch.value = state.batch_size
    while growth and growth.active < state.active and growth.grow():
        pass


def _check(slot: SuffixPlace, config: GCGConfig, draft: SuffixLoss | None) -> None:
    most = max(config.n_replace, config.final_n_replace or 0)
    if most > len(slot.initial_ids):
        raise AttackPlaneError(
            "more positions to replace than the suffix has tokens",
            where="gcg n_replace",
            got=f"{most}, suffix of {len(slot.initial_ids)} tokens",
        )
    if config.draft and draft is None:
        raise AttackPlaneError(
            "probe sampling needs the draft's loss", where="gcg draft", got=config.draft
        )


def _low_enough(state: GCGState, config: GCGConfig, growth: Growth | None) -> bool:
    """Whether the search may stop; while prompts have yet to join, no loss is low enough."""
    waiting = growth is not None and growth.waiting
    return not waiting and state.best_loss <= config.stop_loss


def _take_best(
    state: GCGState,
    objective: SuffixLoss,
    slot: SuffixPlace,
    config: GCGConfig,
    suffix: torch.Tensor,
    candidates: torch.Tensor,
    draft: SuffixLoss | None,
    generator: torch.Generator,
) -> None:
    """Steps 4 to 6: drop candidates without fidelity, score the rest, take one into the state."""
    candidates = candidates[torch.tensor(slot.faithful(candidates.tolist()), dtype=torch.bool)]
    state.scored.append(len(candidates))
    if not len(candidates):  # every one merged with a neighbour: stay, and draw others next time
        state.note(state.losses[state.current_step])
        return
    state.suffix_ids, loss = choose(
        objective,
        slot,
        suffix,
        candidates,
        screening=state.screening,
        merge=config.merge,
        draft=draft,
        generator=generator,
    )
    state.note(_finite(loss, objective), config.buffer)


def _running_mean(state: GCGState, gradient: torch.Tensor, momentum: float) -> torch.Tensor:
    """MAC's gradient, kept in the state."""
    if isinstance(state.momentum, torch.Tensor):
        gradient = momentum * state.momentum.to(gradient.device) + (1 - momentum) * gradient
    state.momentum = gradient
    return gradient


def _loss_of(suffix_ids: list[int], objective: SuffixLoss) -> float:
    return _finite(float(objective.losses(torch.tensor([suffix_ids]))[0]), objective)


def _finite(loss: float, objective: SuffixLoss) -> float:
    if not math.isfinite(loss):
        raise AttackPlaneError(
            "the target loss is not finite",
            where=objective.loaded.spec,
            got=loss,
            remedy="use ?dtype=float32; if it is that, the weights are at fault",
        )
    return loss
