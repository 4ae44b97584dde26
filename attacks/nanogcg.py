"""The package nanogcg as an attack, run as published. ``attacks/nanogcg_engine.py`` runs it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from attacks.gcg import PRESETS, SuffixSearchConfig, baselines
from attacks.registry import ATTACKS, Attack
from attacks.result import AttackResult, Search, suffix_result
from attacks.slot import slot_for
from attacks.workbench import Progress, Task, Workbench
from core.errors import AttackPlaneError, nearest
from core.records import stream_seed
from core.rows import Row
from core.settings import check_settings, setting

log = logging.getLogger(__name__)
NAME = "nanogcg"
OPTIONS = (
    "batch_size",
    "buffer_size",
    "use_mellowmax",
    "mellowmax_alpha",
    "use_prefix_cache",
    "filter_ids",
)
"""Fields of nanogcg's GCGConfig that ours has no word for."""


@dataclass(frozen=True)
class NanoGCGConfig(SuffixSearchConfig):
    """Defaults are GCG's; ``options`` are further fields of nanogcg's own GCGConfig."""

    num_steps: int = setting(500, "Optimiser steps.", flag="--steps", low=1)
    stop_on_match: bool = setting(
        False, "Stop at a suffix after which greedy decoding gives the target."
    )
    options: Row = setting(
        {}, "Another field of nanogcg's GCGConfig, for example buffer_size=4.", flag="--option"
    )

    def __post_init__(self) -> None:
        check_settings(self, NAME)
        for name in self.options:
            if name not in OPTIONS:
                raise AttackPlaneError(
                    f"unknown option {name!r}", where=NAME, remedy=nearest(name, list(OPTIONS))
                )


OURS_ALONE: Row = {
    "stop_loss": 0.0,
    "momentum": 0.0,
    "screen": 0,
    "merge": 0,
    "draft": None,
    "mellowmax": 0.0,
    "buffer": 0,
    "final_width": None,
    "final_n_replace": None,
}
"""Settings that GCG's artifacts name and nanogcg does not have: part of the artifacts' identity."""


def identity(bench: Workbench, config: NanoGCGConfig, name: str) -> Row:
    """As GCG's, with nanogcg's own options beside it."""
    values = asdict(config)
    options = values.pop("options")
    return {**values, **OURS_ALONE, "engine_options": options}


def run(bench: Workbench, task: Task, config: NanoGCGConfig) -> Iterator[AttackResult]:
    """One suffix for one request by the published package, with what is wrong with it."""
    from attacks.likelihood import ROUNDING, plain_loss
    from attacks.nanogcg_engine import faults_of, operations_of, reference, scored_ids

    slot = slot_for(bench.renderer, task.behaviour, config)
    engine = bench.entered("nanogcg", lambda: reference(bench.source))
    kept: list[list[int]] = []
    losses: list[float] = []

    def on_step(step: Row) -> None:
        kept.append(step["kept"])
        losses.append(step["loss"])
        task.on_step(Progress(len(losses), config.num_steps, losses[-1], min(losses)))

    options = {
        "num_steps": config.num_steps,
        "search_width": config.search_width,
        "topk": config.topk,
        "n_replace": config.n_replace,
        "allow_non_ascii": not config.ascii_only,
        "early_stop": config.stop_on_match,
        "seed": stream_seed(bench.seed, task.behaviour.behaviour_id, NAME) % 2**32,
        **config.options,
    }
    answer = engine.run(slot, options, system=config.system_prompt, on_step=on_step)
    best = answer["losses"].index(min(answer["losses"]))
    before = (*slot.before_ids, *slot.initial_ids, *slot.after_ids)
    initial = plain_loss(bench.source, before, slot.target_ids)
    scored = scored_ids(answer, kept[best])
    result = suffix_result(
        slot,
        task.behaviour,
        NAME,
        kept[best],
        system=config.system_prompt,
        search=Search([initial, *answer["losses"]], best + 1, scored),
        suffix=answer["best_string"],
        allow_trim=True,  # nanogcg does not care whether the template trims its suffix
    )
    tolerance = ROUNDING[bench.source.dtype]
    faults = faults_of(engine, answer, scored, bool(result.token_fidelity), options, tolerance)
    for fault in faults:
        log.warning("%s: %s", task.behaviour.behaviour_id, fault)
    scoring = {"operations": operations_of(slot, options) * len(losses)}
    yield replace(result, faults=faults, provenance=result.provenance | {"scoring": scoring})


ATTACK = ATTACKS.add(
    Attack(
        name="nanogcg",
        summary="Run the published package nanogcg as a reference, in its own environment.",
        config=NanoGCGConfig,
        run=run,
        presets=PRESETS,
        sources="one",
        needs_target=True,
        identity=identity,
        baselines=baselines,
        steps=lambda config: config.num_steps,
        unit="step",
        examples=("nanogcg --limit 1 --steps 4",),
    )
)
