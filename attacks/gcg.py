"""GCG as an attack: its settings, and one suffix per request.

The search itself is ``attacks/gcg_search.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from attacks.baselines import SUFFIX_BASELINES, SuffixBaselinesConfig
from attacks.registry import ATTACKS, PAPER, QUICK, Attack, Speed
from attacks.result import AttackResult, Search, suffix_result
from attacks.slot import SuffixConfig, SuffixSlot, slot_for
from attacks.workbench import Progress, Task, Workbench
from core.errors import AttackPlaneError
from core.records import Behaviour, stream_seed
from core.rows import Row
from core.settings import check_settings, setting

if TYPE_CHECKING:  # attacks are listed, and their options shown, without torch
    from attacks.gcg_search import GCGState
    from core.models import LoadedModel

log = logging.getLogger(__name__)
NAME = "gcg"
TEMPLATE_TOKENS, TARGET_TOKENS = 40, 12
"""Rough lengths of a chat template and of a target, for estimates only."""


@dataclass(frozen=True)
class SuffixSearchConfig(SuffixConfig):
    """What every GCG has, ours and nanogcg's.

    Defaults are the paper's (section 3: 500 steps, B = 512, k = 256, 20 tokens of "!").
    """

    num_steps: int = setting(500, "Optimiser steps.", flag="--steps", low=0)
    search_width: int = setting(512, "Candidates per step.", flag="--width", low=1, high=10**6)
    topk: int = setting(256, "Tokens tried per position.", low=1)
    n_replace: int = setting(1, "Positions replaced in each candidate.", low=1)


@dataclass(frozen=True)
class GCGConfig(SuffixSearchConfig):
    """The paper's settings, and options that are not the paper's, which are off."""

    stop_loss: float = setting(
        0.0, "Stop at this loss (nats per target token); 0: never, as in the paper.", low=0
    )
    stop_on_match: bool = setting(
        False, "Stop at a suffix after which greedy decoding gives the target, and return it."
    )
    momentum: float = setting(
        0.0, "mu of g <- mu g + (1 - mu) gradient (MAC); 0: none.", low=0, below=1
    )
    exact: bool = setting(
        False,
        "Score all candidates exactly. Without it they are scored roughly first, where that is "
        "faster here, and those exactly that may be the best.",
    )
    lsgm: float = setting(
        1.0, "Gradients through residual branches times this (LSGM: 0.5); 1: as they are.", low=0
    )
    positions: str = setting(
        "uniform",
        "Draw positions uniformly, or by how much the gradient promises there.",
        choices=("uniform", "gradient"),
    )
    merge: int = setting(0, "Merge the best so many candidates (I-GCG); 0: none.", low=0)
    draft: str | None = setting(
        None, "Draft model of probe sampling (a model spec with the same vocabulary)."
    )
    mellowmax: float = setting(
        0.0, "Weigh the worst target tokens by this alpha; 0: the mean.", low=0
    )
    buffer: int = setting(0, "Go on from the best of so many suffixes; 0: none.", low=0)
    final_width: int | None = setting(None, "Width of the last step, reached linearly.", low=1)
    final_n_replace: int | None = setting(
        None, "Positions replaced in the last step, reached linearly.", low=1
    )

    def __post_init__(self) -> None:
        check_settings(self, "gcg")

    def width_at(self, step: int) -> int:
        """Candidates of a step, counted from 0."""
        return self._annealed(self.search_width, self.final_width, step)

    def n_replace_at(self, step: int) -> int:
        return self._annealed(self.n_replace, self.final_n_replace, step)

    def _annealed(self, first: int, last: int | None, step: int) -> int:
        if last is None:
            return first
        return round(first + (last - first) * step / max(1, self.num_steps - 1))


def draft_model(source: LoadedModel, draft: LoadedModel) -> LoadedModel:
    """The draft model of probe sampling, which must read the source's ids.

    Raises:
        AttackPlaneError: another vocabulary.
    """
    if draft.tokenizer.get_vocab() != source.tokenizer.get_vocab():
        raise AttackPlaneError(
            "the draft model has another vocabulary than the source",
            where=f"draft {draft.spec}",
            got=f"{len(draft.tokenizer)} tokens, source {len(source.tokenizer)}",
            remedy="choose a smaller model of the source's own family",
        )
    return draft


def run(bench: Workbench, task: Task, config: GCGConfig) -> Iterator[AttackResult]:
    """One suffix for one request."""
    from attacks.gcg_search import GCGState, run_gcg
    from attacks.objective import TargetLoss, target_loss
    from attacks.screening import rough_model

    slot = slot_for(bench.renderer, task.behaviour, config)
    saved = bench.states.load(task.key)
    draft = None
    if config.draft:
        model = draft_model(bench.source, bench.model(config.draft).loaded)
        draft = TargetLoss(model, slot, mellowmax=config.mellowmax)

    def on_step(state: GCGState) -> None:
        if state.step % task.save_every == 0:
            bench.states.save(task.key, state.to_row)
        progress = Progress(state.step, config.num_steps, state.losses[-1], state.best_loss)
        task.on_step(progress)

    rough = rough_model(bench, config, slot, saved)
    state = run_gcg(
        target_loss(slot, config, rough),
        slot,
        config,
        bench.allowed(ascii_only=config.ascii_only),
        seed=stream_seed(bench.seed, task.behaviour.behaviour_id, NAME),
        state=GCGState(**saved) if saved else None,
        draft=draft,
        screened=rough is not None,
        on_step=on_step,
    )
    result = searched_result(slot, task.behaviour, NAME, state, config.system_prompt)
    _compare(result, state, config, bench.source, task)
    yield result


def _compare(
    result: AttackResult, state: GCGState, config: GCGConfig, source: LoadedModel, task: Task
) -> None:
    """Say so where the search and a plain pass do not see the same loss."""
    from attacks.likelihood import ROUNDING

    assert result.loss is not None
    agree = abs(result.loss - state.best_loss) <= ROUNDING[source.dtype]
    if not config.mellowmax and not agree:
        log.warning(
            "%s: the search saw loss %.4f, a plain pass gives %.4f on %s; please report this",
            *(task.behaviour.behaviour_id, state.best_loss, result.loss, source.spec),
        )


def searched_result(
    slot: SuffixSlot, behaviour: Behaviour, attack: str, state: GCGState, system: str | None
) -> AttackResult:
    """The best suffix of a search, with its losses and snapshots."""
    texts = slot.suffix_texts([ids for _, ids in state.bests])
    steps = [step for step, _ in state.bests]
    snapshots = [(n, slot.content_with(text)) for n, text in zip(steps, texts, strict=True)]
    search = Search(state.losses, state.best_step, snapshots=snapshots)
    found = suffix_result(slot, behaviour, attack, state.best_ids, system=system, search=search)
    scored: Row = {"candidates": sum(state.scored), "operations": state.operations}
    scored["screened"] = state.screening is not None
    if state.screening:
        scored |= {"exactly": state.screening.exactly, "rough_error": state.screening.deviation}
    return replace(found, provenance=found.provenance | {"scoring": scored})


def identity(bench: Workbench, config: GCGConfig, name: str) -> Row:
    """The settings; a draft model by its weights."""
    values = asdict(config)
    if config.draft:
        values["draft"] = [config.draft, bench.model(config.draft).fingerprint]
    return values


def step_seconds(config: GCGConfig, speed: Speed) -> float:
    """Seconds of one step; about half of the suffix is shared with the current one."""
    width = (config.search_width + (config.final_width or config.search_width)) / 2
    fed = config.suffix_length / 2 + TEMPLATE_TOKENS / 4 + TARGET_TOKENS
    return speed.gradient + width * fed * speed.token


def baselines(config: SuffixSearchConfig) -> list[tuple[str, Any]]:
    """The plain request, the initial suffix and a random one, by the search's own settings."""
    names = [f.name for f in fields(SuffixBaselinesConfig)]
    same = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return [(SUFFIX_BASELINES, SuffixBaselinesConfig(**same))]


PRESETS: dict[str, Row] = {
    PAPER: {},
    QUICK: {"num_steps": 30, "search_width": 32, "topk": 64},
}
"""Of all suffix searches."""
FAST = "fast"
"""Not the paper's search: the best candidates of a step are merged (I-GCG), and gradients through
residual branches halved (LSGM)."""
ATTACK = ATTACKS.add(
    Attack(
        name="gcg",
        summary="Optimise adversarial suffixes, one per request (GCG).",
        config=GCGConfig,
        run=run,
        cost=lambda config, count, speed: count * config.num_steps * step_seconds(config, speed),
        presets={**PRESETS, FAST: {"num_steps": 25, "search_width": 64, "merge": 7, "lsgm": 0.5}},
        on_cpu=FAST,
        sources="one",
        needs_target=True,
        identity=identity,
        baselines=baselines,
        steps=lambda config: config.num_steps,
        unit="step",
        save_every=5,
        examples=(
            "gcg",
            "gcg --model embedded+runs/demo/checkpoints/step-12 --run runs/second --limit 16",
            "gcg --model ORG/NAME --behaviours goals.csv --label-of-file harmful --preset paper",
        ),
    )
)
