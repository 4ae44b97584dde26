"""Universal GCG (Zou et al., arXiv 2307.15043, algorithm 2): one suffix for several requests.

It may be optimised on several source models at once.

    loss(suffix) = mean over the prompts in play, and over the models, of the target loss

Progressive addition: the search starts with the first prompt; as soon as greedy decoding gives the
target of every prompt in play on every model, the next prompt joins. Token gradients are scaled to
unit norm per prompt and model before they are added, so that no prompt or model outweighs the
others (the authors' code scales the sum of a model's prompts, per position). The models must have
the same vocabulary: the suffix is one list of token ids.

Deviations: a prompt counts as solved when greedy decoding gives its target string (the authors'
code looks for refusal phrases in a reply); the mean stands for the sum, which changes no argmin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from attacks.gcg import PRESETS, GCGConfig, baselines, searched_result, step_seconds
from attacks.registry import ATTACKS, Attack, Key, sources_hash
from attacks.result import AttackResult
from attacks.slot import SuffixSlot, slot_for
from attacks.workbench import Progress, Task, Workbench
from core.errors import AttackPlaneError
from core.prompt import Renderer
from core.records import SEVERAL_SOURCES, Behaviour, content_hash, stream_seed
from core.rows import Row
from core.settings import setting

if TYPE_CHECKING:  # attacks are listed, and their options shown, without torch
    from torch import Tensor

    from attacks.gcg_search import GCGState
    from attacks.objective import TargetLoss
    from core.models import LoadedModel

UNIVERSAL = "gcg_universal"


class SharedSuffix:
    """The places of one suffix in several conversations. It must keep its tokens in all of them."""

    def __init__(self, slots: Sequence[SuffixSlot]) -> None:
        self.slots = slots
        self.initial_ids = slots[0].initial_ids
        for slot in slots:
            if slot.initial_ids != self.initial_ids:
                raise AttackPlaneError(
                    "the initial suffix has other tokens in another conversation",
                    where=f"{slot.renderer.loaded.spec}: {slot.content_before[:60]!r}",
                    got=f"{slot.initial_ids} instead of {self.initial_ids}",
                    remedy=(
                        "choose another init_suffix or placement (words parted by spaces are safe)"
                    ),
                )

    def faithful(self, suffixes: Sequence[Sequence[int]]) -> list[bool]:
        kept = list(range(len(suffixes)))
        for slot in self.slots:
            fine = slot.faithful([suffixes[i] for i in kept])
            kept = [i for i, ok in zip(kept, fine, strict=True) if ok]
        return [i in set(kept) for i in range(len(suffixes))]


class UniversalLoss:
    """What GCG asks of a loss, over several prompts and models.

    ``rows[prompt]`` holds one loss per model.
    """

    def __init__(self, rows: Sequence[Sequence[TargetLoss]]) -> None:
        self._rows = rows
        self.active = 1
        self.matches = False
        self.loaded, self.batch = rows[0][0].loaded, rows[0][0].batch

    @property
    def _in_play(self) -> list[TargetLoss]:
        return [loss for row in self._rows[: self.active] for loss in row]

    @property
    def waiting(self) -> bool:
        """Whether prompts have yet to join: until then no loss is low enough to stop."""
        return self.active < len(self._rows)

    def grow(self) -> bool:
        """The next prompt joins; False when all are in play."""
        more = self.waiting
        self.active += more
        return more

    def losses(self, suffixes: Tensor) -> Tensor:
        return self._mean(suffixes, lambda part: part.losses)

    def rough_losses(self, suffixes: Tensor) -> Tensor:
        return self._mean(suffixes, lambda part: part.rough_losses)

    def _mean(
        self, suffixes: Tensor, of: Callable[[TargetLoss], Callable[[Tensor], Tensor]]
    ) -> Tensor:
        import torch

        return torch.stack([of(part)(suffixes) for part in self._in_play]).mean(0)

    def best(self, suffixes: Tensor) -> tuple[int, float]:
        losses = self.losses(suffixes)
        return int(losses.argmin()), float(losses.min())

    def share(self, suffix: Tensor) -> None:
        for part in self._in_play:
            part.share(suffix)
        self.matches = all(part.matches for part in self._in_play)

    def take_operations(self) -> float:
        return sum(part.take_operations() for row in self._rows for part in row)

    def weights_changed(self) -> None:
        for part in [loss for row in self._rows for loss in row]:
            part.weights_changed()

    def token_gradient(self, suffix: Tensor) -> tuple[float, Tensor]:
        """Mean loss, and the sum of the prompts' gradients, each scaled to length 1 before."""
        parts = [part.token_gradient(suffix) for part in self._in_play]
        self.matches = all(part.matches for part in self._in_play)
        total = sum(g.cpu() / g.norm().clamp_min(1e-12).cpu() for _, g in parts)
        assert not isinstance(total, int)  # the sum of none
        return sum(loss for loss, _ in parts) / len(parts), total


@dataclass(frozen=True)
class UniversalConfig(GCGConfig):
    """GCG's settings, and on how many of the requests the suffix is optimised."""

    optimise_on: int = setting(
        4, "Requests that the suffix is optimised on; the others are held out.", low=1
    )


def optimised_on(bench: Workbench, config: UniversalConfig) -> list[Behaviour]:
    """The first requests that have a target string."""
    return [b for b in bench.behaviours if b.target_string][: config.optimise_on]


def check(bench: Workbench, config: UniversalConfig) -> None:
    """Refuse what a universal suffix cannot serve.

    Raises:
        AttackPlaneError: too few requests, a draft model, or several vocabularies.
    """
    if len(optimised_on(bench, config)) < config.optimise_on:
        raise AttackPlaneError(
            "fewer requests than the suffix is to be optimised on",
            where=UNIVERSAL,
            got=f"{len(bench.behaviours)} requests, optimise_on {config.optimise_on}",
        )
    if config.draft:
        raise AttackPlaneError(
            "probe sampling serves one request on one model",
            where=UNIVERSAL,
            got=f"draft {config.draft}",
            remedy="leave draft out",
        )


def _same_vocabulary(sources: Sequence[LoadedModel]) -> None:
    first = sources[0]
    for source in sources[1:]:
        if source.tokenizer.get_vocab() != first.tokenizer.get_vocab():
            raise AttackPlaneError(
                "the source models have different vocabularies",
                where=f"{first.spec} and {source.spec}",
                got=f"{len(first.tokenizer)} and {len(source.tokenizer)} tokens",
                remedy="a universal suffix is one list of tokens: choose checkpoints of one family",
            )


def identity(bench: Workbench, config: UniversalConfig, name: str) -> Row:
    """GCG's settings and the requests that the suffix is optimised on."""
    values = asdict(config)
    del values["optimise_on"]
    on = [(b.request, b.target_string) for b in optimised_on(bench, config)]
    return {**values, "optimised_on": content_hash(on)}


def keys(config: UniversalConfig, behaviour: Behaviour, bench: Workbench) -> list[Key]:
    """Variant ``seen`` for a request that the suffix was optimised on, else ``held out``."""
    seen = any(b.request == behaviour.request for b in optimised_on(bench, config))
    return [(UNIVERSAL, "seen" if seen else "held out")]


def run(bench: Workbench, task: Task, config: UniversalConfig) -> Iterator[AttackResult]:
    """The universal suffix after one request; it is optimised with the first one."""
    state = bench.once(("universal", config), lambda: _optimise(bench, task, config))
    results, losses = [], {}
    for renderer in _renderers(bench):
        slot = slot_for(renderer, task.behaviour, config)
        own = searched_result(slot, task.behaviour, UNIVERSAL, state, config.system_prompt)
        results.append(own)
        losses[renderer.loaded.spec] = own.loss
    in_play = {"prompts_in_play": state.active, "prompts": len(optimised_on(bench, config))}
    yield replace(
        results[0],
        variant=keys(config, task.behaviour, bench)[0][1],
        source_model=SEVERAL_SOURCES.join(model.spec for model in bench.sources),
        loss=sum(r.loss or 0.0 for r in results) / len(results),
        token_fidelity=all(r.token_fidelity for r in results),
        provenance=results[0].provenance | {"losses": losses, **in_play},
    )


def _renderers(bench: Workbench) -> list[Renderer]:
    """One renderer per source model."""
    return bench.once("renderers", lambda: [Renderer(model.loaded) for model in bench.sources])


def _state_name(bench: Workbench, config: UniversalConfig) -> str:
    about = [identity(bench, config, UNIVERSAL), sources_hash(bench.sources), bench.seed]
    return f"{UNIVERSAL}-{content_hash(about)}"


def _optimise(bench: Workbench, task: Task, config: UniversalConfig) -> GCGState:
    from attacks.gcg_search import GCGState, run_gcg
    from attacks.objective import target_loss
    from attacks.screening import rough_model

    renderers = _renderers(bench)
    _same_vocabulary([renderer.loaded for renderer in renderers])
    behaviours = optimised_on(bench, config)
    slots = [[slot_for(r, behaviour, config) for r in renderers] for behaviour in behaviours]
    name = _state_name(bench, config)
    saved = bench.states.load(name)
    rough = {s.renderer.loaded.spec: rough_model(bench, config, s, saved) for s in slots[0]}
    screened = None not in rough.values()
    rows = [
        [target_loss(slot, config, rough[slot.renderer.loaded.spec]) for slot in row]
        for row in slots
    ]
    objective = UniversalLoss(rows)

    def on_step(state: GCGState) -> None:
        if state.step % task.save_every == 0 or state.step == config.num_steps:
            bench.states.save(name, state.to_row)
        progress = Progress(state.step, config.num_steps, state.losses[-1], state.best_loss)
        task.on_step(progress)

    return run_gcg(
        objective,
        SharedSuffix([slot for row in slots for slot in row]),
        config,
        bench.allowed(ascii_only=config.ascii_only),
        seed=stream_seed(bench.seed, UNIVERSAL),
        state=GCGState(**saved) if saved else None,
        growth=objective,
        screened=screened,
        on_step=on_step,
    )


ATTACK = ATTACKS.add(
    Attack(
        name="gcg_universal",
        summary="Optimise one suffix for several requests and source models (universal GCG).",
        config=UniversalConfig,
        run=run,
        cost=lambda config, count, speed: (
            config.num_steps * config.optimise_on * step_seconds(config, speed)
        ),
        presets=PRESETS,
        sources="several",
        needs_target=True,
        keys=keys,
        identity=identity,
        baselines=baselines,
        save_every=5,
        check=check,
        finish=lambda bench, config: bench.states.drop(_state_name(bench, config)),
        examples=("gcg-universal --optimise-on 3 --limit 6",),
    )
)
