"""One suffix for several behaviours and several source models: universal GCG (Zou et al., arXiv 2307.15043, algorithm 2).

    loss(suffix) = mean over the prompts in play, and over the models, of the target loss

Progressive addition: the search starts with the first prompt; as soon as greedy decoding gives the target of every prompt in
play on every model, the next prompt joins. Token gradients are scaled to unit norm per prompt and model before they are
added, so that no prompt or model outweighs the others (the authors' code scales the sum of a model's prompts, per position). The models must have the same vocabulary: the
suffix is one list of token ids.

Deviations: a prompt counts as solved when greedy decoding gives its target string (the authors' code looks for refusal
phrases in a reply); the mean stands for the sum, which changes no argmin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from attacks.gcg import GCGConfig, GCGState, run_gcg
from attacks.method import OnFailure, stream_seed
from attacks.objective import TargetLoss
from attacks.slot import SuffixSlot
from attacks.suffixes import Baselines, SuffixMethod
from core.errors import AttackPlaneError
from core.models import LoadedModel
from core.records import SEVERAL_SOURCES, AttackArtifact, Behaviour, content_hash
from core.store import RunFolder

UNIVERSAL = "gcg_universal"


class SharedSuffix:
    """The places of one suffix in several conversations; a suffix must keep its tokens in all of them."""

    def __init__(self, slots: Sequence[SuffixSlot]) -> None:
        self.slots = slots
        self.initial_ids = slots[0].initial_ids
        for slot in slots:
            if slot.initial_ids != self.initial_ids:
                raise AttackPlaneError(
                    "the initial suffix has other tokens in another conversation",
                    where=f"{slot.renderer.loaded.spec}: {slot.content_before[:60]!r}",
                    got=f"{slot.initial_ids} instead of {self.initial_ids}",
                    remedy="choose another --init-suffix or --placement (words parted by spaces are safe)",
                )

    def faithful(self, suffixes: Sequence[Sequence[int]]) -> list[bool]:
        kept = list(range(len(suffixes)))
        for slot in self.slots:
            fine = slot.faithful([suffixes[i] for i in kept])
            kept = [i for i, ok in zip(kept, fine, strict=True) if ok]
        return [i in set(kept) for i in range(len(suffixes))]


class UniversalLoss:
    """What GCG asks of a loss, over several prompts and models. ``rows[prompt]`` holds one loss a model."""

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

    def _mean(self, suffixes: Tensor, of: Callable[[TargetLoss], Callable[[Tensor], Tensor]]) -> Tensor:
        return torch.stack([of(part)(suffixes) for part in self._in_play]).mean(0)

    def best(self, suffixes: Tensor) -> tuple[int, float]:
        losses = self.losses(suffixes)
        return int(losses.argmin()), float(losses.min())

    def share(self, suffix: Tensor) -> None:
        for part in self._in_play:
            part.share(suffix)
        self.matches = all(part.matches for part in self._in_play)

    def token_gradient(self, suffix: Tensor) -> tuple[float, Tensor]:
        """Mean loss, and the sum of the unit-norm gradients, each position's row scaled by the whole gradient's norm."""
        found = [part.token_gradient(suffix) for part in self._in_play]
        self.matches = all(part.matches for part in self._in_play)
        total = sum(g.cpu() / g.norm().clamp_min(1e-12).cpu() for _, g in found)
        assert isinstance(total, Tensor)
        return sum(loss for loss, _ in found) / len(found), total


class UniversalGCG(SuffixMethod):
    """One suffix optimised on ``optimised_on``; artifacts for these (variant ``seen``) and any other behaviour (``held out``)."""

    name = UNIVERSAL

    def __init__(
        self, run: RunFolder, sources: Sequence[LoadedModel], config: GCGConfig, seed: int, *,
        optimised_on: Sequence[Behaviour], save_every: int = 5,
    ) -> None:  # fmt: skip
        if config.draft:
            raise AttackPlaneError(
                "probe sampling serves one behaviour on one model",
                where=UNIVERSAL,
                got=f"draft {config.draft}",
                remedy="leave --draft out",
            )
        super().__init__(run, sources[0], config, seed)
        self.sources, self.optimised_on, self.save_every = sources, optimised_on, save_every
        # each model's slots and scored artifacts
        self._on = [Baselines(run, source, config, seed) for source in sources]
        for source in sources[1:]:
            if source.tokenizer.get_vocab() != self.loaded.tokenizer.get_vocab():
                raise AttackPlaneError(
                    "the source models have different vocabularies",
                    where=f"{self.loaded.spec} and {source.spec}",
                    got=f"{len(self.loaded.tokenizer)} and {len(source.tokenizer)} tokens",
                    remedy="a universal suffix is one list of tokens: choose checkpoints of one family",
                )
        self._suffix: GCGState | None = None

    def settings(self) -> dict[str, Any]:
        on = content_hash([(b.request, b.target_string) for b in self.optimised_on])
        return {**dataclasses.asdict(self.config), "optimised_on": on}

    def _source_hash(self) -> str:
        return content_hash([(source.spec, source.fingerprint) for source in self.sources])

    def artifact_id(self, behaviour: Behaviour, attack: str | None = None, variant: str | None = None) -> str:
        return content_hash([super().artifact_id(behaviour, attack, variant), self._source_hash()])

    def models(self) -> list[LoadedModel]:
        return list(self.sources)

    def keys(self, behaviour: Behaviour) -> list[tuple[str, str | None]]:
        seen = any(b.request == behaviour.request for b in self.optimised_on)
        return [(self.name, "seen" if seen else "held out")]

    def make(self, behaviour: Behaviour, bar: tqdm) -> Iterator[AttackArtifact]:
        state = self._suffix = self._suffix or self._optimise()
        artifacts, losses = [], {}
        for one in self._on:
            slot = one.slot(behaviour)
            artifact = one.searched_artifact(behaviour, slot, state)
            artifacts.append(artifact)
            losses[one.loaded.spec] = artifact.loss
        (_, variant), first = self.keys(behaviour)[0], artifacts[0]
        yield dataclasses.replace(
            first,
            artifact_id=self.artifact_id(behaviour, self.name, variant),
            attack=self.name,
            variant=variant,
            source_model=SEVERAL_SOURCES.join(source.spec for source in self.sources),
            loss=sum(a.loss or 0.0 for a in artifacts) / len(artifacts),
            token_fidelity=all(a.token_fidelity for a in artifacts),
            config_hash=content_hash(self.settings()),
            provenance={"losses": losses, "prompts_in_play": state.active, "prompts": len(self.optimised_on)},
        )

    def attack(
        self, behaviours: Sequence[Behaviour], *, on_failure: OnFailure | None = None
    ) -> list[AttackArtifact]:
        found = super().attack(behaviours, on_failure=on_failure)
        self.run.drop_state(self._state_name)
        return found

    @property
    def _state_name(self) -> str:
        return f"{UNIVERSAL}-{content_hash([self.settings(), self._source_hash(), self.seed])}"

    def _optimise(self) -> GCGState:
        slots = [[one.slot(behaviour) for one in self._on] for behaviour in self.optimised_on]

        def loss(source: LoadedModel, slot: SuffixSlot) -> TargetLoss:
            return TargetLoss(source, slot, mellowmax=self.config.mellowmax)

        objective = UniversalLoss([list(map(loss, self.sources, row)) for row in slots])
        name = self._state_name
        saved = self.run.load_state(name)
        state = GCGState(**saved) if saved else None
        with tqdm(total=self.config.num_steps, desc="universal suffix", unit="step", leave=None,
                  initial=state.step if state else 0) as bar:  # fmt: skip

            def on_step(now: GCGState) -> None:
                if now.step % self.save_every == 0 or now.step == self.config.num_steps:
                    self.run.save_state(name, now.to_row())
                bar.update(1)
                bar.set_postfix_str(f"{now.active} of {len(slots)} prompts, loss {now.losses[-1]:.3f}")

            return run_gcg(
                objective,  # type: ignore[arg-type]
                SharedSuffix([slot for row in slots for slot in row]),  # type: ignore[arg-type]
                self.config,
                self.allowed,
                seed=stream_seed(self.seed, UNIVERSAL),
                state=state,
                on_step=on_step,
            )
