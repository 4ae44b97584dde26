"""Suffix attacks on a source model: GCG, the reference engine nanogcg, and the baselines of both.

A behaviour in progress is saved every ``save_every`` steps and goes on from there after a crash, with the same result as a
run never stopped (the reference engine starts that behaviour anew).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from attacks.baselines import baseline_suffixes
from attacks.candidates import allowed_tokens
from attacks.gcg import GCGConfig, GCGState, run_gcg
from attacks.likelihood import ROUNDING, plain_loss
from attacks.method import SourceMethod, stream_seed
from attacks.objective import TargetLoss
from attacks.reference import OPTIONS, Reference, faults_of, reference, scored_ids
from attacks.slot import SuffixSlot, default_slot
from core.errors import AttackPlaneError
from core.models import LoadedModel, load
from core.records import (
    INITIAL_SUFFIX,
    PLAIN,
    RANDOM_SUFFIX,
    AttackArtifact,
    Behaviour,
    content_hash,
    nearest,
)
from core.store import RunFolder

log = logging.getLogger(__name__)
GCG = "gcg"
NANOGCG = "nanogcg"
OURS_ALONE = (
    *("stop_loss", "momentum", "screen", "merge", "draft"),
    *("buffer", "mellowmax", "final_width", "final_n_replace"),
)
"""Settings that nanogcg does not have, or has otherwise."""
BASELINE_SETTINGS = ("suffix_length", "init_suffix", "placement", "system_prompt", "ascii_only")


def draft_model(source: LoadedModel, spec: str) -> LoadedModel:
    """The draft model of probe sampling, which must read the source's ids.

    Raises:
        AttackPlaneError: another vocabulary.
    """
    draft = load(spec, source.device)
    if draft.tokenizer.get_vocab() != source.tokenizer.get_vocab():
        raise AttackPlaneError(
            "the draft model has another vocabulary than the source",
            where=f"draft {spec}",
            got=f"{len(draft.tokenizer)} tokens, source {len(source.tokenizer)}",
            remedy="choose a smaller model of the source's own family",
        )
    return draft


class SuffixMethod(SourceMethod):
    """A suffix after the request, of ``config``'s length and placement."""

    def __init__(self, run: RunFolder, loaded: LoadedModel, config: GCGConfig, seed: int) -> None:
        super().__init__(run, loaded, seed)
        self.config = config
        vocabulary = loaded.embedding_table.shape[0]
        self.allowed = allowed_tokens(loaded.tokenizer, vocabulary, ascii_only=config.ascii_only)

    def slot(self, behaviour: Behaviour) -> SuffixSlot:
        assert behaviour.target_string is not None
        return default_slot(
            self.renderer,
            behaviour.request,
            behaviour.target_string,
            length=self.config.suffix_length,
            placement=self.config.placement,
            system=self.config.system_prompt,
            suffix=self.config.init_suffix,
        )

    def suffix_artifact(
        self,
        behaviour: Behaviour,
        slot: SuffixSlot,
        suffix_ids: list[int],
        *,
        attack: str | None = None,
        suffix: str | None = None,
        scored: tuple[int, ...] | None = None,
        history: list[float] | None = None,
        best_step: int = 0,
        bests: Sequence[tuple[int, list[int]]] = (),
        allow_trim: bool = False,
    ) -> AttackArtifact:
        """``suffix`` is its text where that is not the ids' own, ``scored`` what was scored where not the slot's ids; ``bests``
        are (step, suffix) of the snapshots."""
        texts = slot.suffix_texts([ids for _, ids in bests]) if bests else []
        suffix = slot.suffix_texts([suffix_ids])[0] if suffix is None else suffix
        return self.scored_artifact(
            behaviour,
            slot.content_before + suffix + slot.content_after,
            attack=attack,
            system=self.config.system_prompt,
            suffix=suffix,
            suffix_ids=suffix_ids,
            scored=scored or (*slot.before_ids, *suffix_ids, *slot.after_ids, *slot.target_ids),
            history=history,
            best_step=best_step,
            snapshots=[
                {"step": step, "prompt": slot.content_before + text + slot.content_after}
                for (step, _), text in zip(bests, texts, strict=True)
            ],
            allow_trim=allow_trim,
        )

    def searched_artifact(self, behaviour: Behaviour, slot: SuffixSlot, state: GCGState) -> AttackArtifact:
        """The best suffix of a search, with its losses and snapshots."""
        return self.suffix_artifact(
            behaviour,
            slot,
            state.best_ids,
            history=state.losses,
            best_step=state.best_step,
            bests=state.bests,
        )


class Baselines(SuffixMethod):
    """The plain request, the initial suffix and a random one."""

    name = "baselines"

    def __init__(
        self, run: RunFolder, loaded: LoadedModel, config: GCGConfig, seed: int, *,
        names: Sequence[str] = (PLAIN, INITIAL_SUFFIX, RANDOM_SUFFIX),
    ) -> None:  # fmt: skip
        super().__init__(run, loaded, config, seed)
        self.names = names

        if self.names == (PLAIN,):
            self.name = PLAIN

    def settings(self) -> dict[str, Any]:
        return self._settings_of(self.names[-1])

    def _settings_of(self, name: str) -> dict[str, Any]:
        """The plain request depends on the system prompt alone, whatever suffixes stand beside it."""
        values = dataclasses.asdict(self.config)
        return {key: values[key] for key in (("system_prompt",) if name == PLAIN else BASELINE_SETTINGS)}

    def artifact_id(self, behaviour: Behaviour, attack: str | None = None, variant: str | None = None) -> str:
        about = [
            attack,
            behaviour.request,
            behaviour.target_string,
            self.loaded.spec,
            self.loaded.fingerprint,
        ]
        return content_hash([*about, self._settings_of(attack or self.name), self.seed])

    def keys(self, behaviour: Behaviour) -> list[tuple[str, str | None]]:
        return [(name, None) for name in self.names]

    def make(self, behaviour: Behaviour, bar: tqdm) -> Iterator[AttackArtifact]:
        slot = self.slot(behaviour)
        generator = torch.Generator().manual_seed(
            stream_seed(self.seed, behaviour.behaviour_id, "random suffix")
        )
        for name, suffix_ids in baseline_suffixes(slot, self.allowed, generator, self.names):
            if suffix_ids is None:
                yield self.scored_artifact(
                    behaviour, behaviour.request, attack=name, system=self.config.system_prompt
                )
            else:
                yield self.suffix_artifact(behaviour, slot, suffix_ids, attack=name)


class GCGMethod(SuffixMethod):
    """Greedy Coordinate Gradient, a suffix a behaviour."""

    name = GCG
    unit = "step"

    def __init__(
        self, run: RunFolder, loaded: LoadedModel, config: GCGConfig, seed: int, *, save_every: int = 5,
        draft: LoadedModel | None = None,
    ) -> None:  # fmt: skip
        super().__init__(run, loaded, config, seed)
        self.save_every = save_every
        self.draft = draft or (draft_model(loaded, config.draft) if config.draft else None)
        self.steps = config.num_steps

    def settings(self) -> dict[str, Any]:
        values = dataclasses.asdict(self.config)
        if self.draft:
            values["draft"] = [self.draft.spec, self.draft.fingerprint]
        return values

    def models(self) -> list[LoadedModel]:
        return [self.loaded, *([self.draft] if self.draft else [])]

    def make(self, behaviour: Behaviour, bar: tqdm) -> Iterator[AttackArtifact]:
        slot = self.slot(behaviour)
        name = self.artifact_id(behaviour)
        saved = self.run.load_state(name)
        state = GCGState(**saved) if saved else None
        if state:
            bar.update(state.step)

        def on_step(now: GCGState) -> None:
            if now.step % self.save_every == 0:
                self.run.save_state(name, now.to_row())
            bar.update(1)
            bar.set_postfix_str(
                f"{behaviour.behaviour_id} loss {now.losses[-1]:.3f} best {now.best_loss:.3f}"
            )

        mellowmax = self.config.mellowmax
        state = run_gcg(
            TargetLoss(self.loaded, slot, mellowmax=mellowmax),
            slot,
            self.config,
            self.allowed,
            seed=stream_seed(self.seed, behaviour.behaviour_id, GCG),
            state=state,
            draft=TargetLoss(self.draft, slot, mellowmax=mellowmax) if self.draft else None,
            on_step=on_step,
        )
        artifact = self.searched_artifact(behaviour, slot, state)
        assert artifact.loss is not None
        if not mellowmax and not abs(artifact.loss - state.best_loss) <= ROUNDING[self.loaded.dtype]:
            log.warning(
                "%s: the search saw loss %.4f, a plain pass gives %.4f on %s; please report this",
                *(behaviour.behaviour_id, state.best_loss, artifact.loss, self.loaded.spec),
            )
        yield artifact


class NanoGCGMethod(SuffixMethod):
    """The published package in its own environment. ``options`` are further fields of its GCGConfig."""

    name = NANOGCG
    unit = "step"

    def __init__(
        self, run: RunFolder, loaded: LoadedModel, config: GCGConfig, seed: int, *,
        options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(run, loaded, config, seed)
        self.options = dict(options or {})
        self.steps = config.num_steps
        for name in OURS_ALONE:
            if getattr(config, name):
                raise AttackPlaneError(
                    f"nanogcg has no {name}",
                    where="engine",
                    got=getattr(config, name),
                    remedy="leave it out",
                )
        for name in self.options:
            if name not in OPTIONS:
                raise AttackPlaneError(
                    f"unknown option {name!r}", where="engine nanogcg", remedy=nearest(name, list(OPTIONS))
                )

    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config) | {"engine_options": self.options}

    @contextmanager
    def opened(self) -> Iterator[None]:
        with reference(self.loaded) as self._engine:
            yield

    _engine: Reference

    def make(self, behaviour: Behaviour, bar: tqdm) -> Iterator[AttackArtifact]:
        slot, config = self.slot(behaviour), self.config
        kept: list[list[int]] = []

        def on_step(step: dict[str, Any]) -> None:
            kept.append(step["kept"])
            bar.update(1)
            bar.set_postfix_str(f"{behaviour.behaviour_id} loss {step['loss']:.3f}")

        options = {
            "num_steps": config.num_steps, "search_width": config.search_width, "topk": config.topk,
            "n_replace": config.n_replace, "allow_non_ascii": not config.ascii_only,
            "early_stop": config.stop_on_match, "seed": stream_seed(self.seed, behaviour.behaviour_id, NANOGCG) % 2**32,
            **self.options,
        }  # fmt: skip
        result = self._engine.run(slot, options, system=config.system_prompt, on_step=on_step)
        best = result["losses"].index(min(result["losses"]))
        initial = plain_loss(
            self.loaded, (*slot.before_ids, *slot.initial_ids, *slot.after_ids), slot.target_ids
        )
        scored = scored_ids(result, kept[best])
        artifact = self.suffix_artifact(
            behaviour,
            slot,
            kept[best],
            suffix=result["best_string"],
            scored=scored,
            history=[initial, *result["losses"]],
            best_step=best + 1,
            allow_trim=True,  # nanogcg does not care whether the template trims its suffix
        )
        tolerance = ROUNDING[self.loaded.dtype]
        faults = faults_of(self._engine, result, scored, bool(artifact.token_fidelity), options, tolerance)
        for fault in faults:
            log.warning("%s: %s", behaviour.behaviour_id, fault)
        yield dataclasses.replace(artifact, faults=faults)
