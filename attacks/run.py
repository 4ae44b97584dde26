"""Attack a list of behaviours on one source model and save each artifact as soon as it is made.

Rows already in the run folder are not made again; a behaviour in progress is saved every ``save_every`` steps and goes
on from there after a crash, with the same result as a run never stopped. Each behaviour has a random stream of its
own, so neither the order nor the choice of behaviours changes a result.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from attacks.baselines import baseline_suffixes
from attacks.candidates import allowed_tokens
from attacks.gcg import GCGConfig, GCGState, run_gcg
from attacks.objective import TargetLoss, plain_loss
from attacks.slot import SuffixSlot, default_slot
from core.errors import AttackPlaneError
from core.models import LoadedModel
from core.prompt import Conversation, Renderer
from core.records import BASELINES, AttackArtifact, Behaviour, content_hash
from core.store import ATTACKS, RunFolder

log = logging.getLogger(__name__)
GCG = "gcg"
ROUNDING = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""By how much (nats per token) batched, cached scoring may differ from one plain pass before we say so."""
BASELINE_SETTINGS = ("suffix_length", "init_suffix", "placement", "system_prompt", "ascii_only")


def stream_seed(seed: int, *names: str) -> int:
    """A seed for one named random stream."""
    return int(content_hash([seed, *names], 15), 16)


@dataclasses.dataclass(frozen=True)
class Attacker:
    """One source model and one configuration, over any number of behaviours."""

    run: RunFolder
    loaded: LoadedModel
    config: GCGConfig
    seed: int
    save_every: int = 5

    def attack(self, behaviours: Sequence[Behaviour], *, baselines: bool = True) -> list[AttackArtifact]:
        """Artifacts of all behaviours, those of earlier runs included; in the order baselines, GCG.

        Raises:
            AttackPlaneError: a behaviour without a target string.
        """
        lacking = [b.behaviour_id for b in behaviours if not b.target_string]
        if lacking:
            raise AttackPlaneError(
                "GCG needs a target string for every behaviour",
                where=f"{len(lacking)} behaviours, first {lacking[0]}",
                remedy="add a column target ('Sure, here is ...') to the behaviours file",
            )
        done = {row["artifact_id"]: row for row in self.run.rows(ATTACKS)}
        self.run.note_behaviours(behaviours)
        renderer = Renderer(self.loaded)
        allowed = allowed_tokens(
            self.loaded.tokenizer,
            self.loaded.embedding_table.shape[0],
            ascii_only=self.config.ascii_only,
        )
        wanted: list[str] = []
        if baselines:
            for behaviour in behaviours:
                ids = [self.artifact_id(name, behaviour) for name in BASELINES]
                wanted += ids
                if not all(i in done for i in ids):
                    for artifact in self._baselines(renderer, behaviour, allowed):
                        if artifact.artifact_id not in done:
                            self._keep(artifact, done)
        missing = [b for b in behaviours if self.artifact_id(GCG, b) not in done]
        for behaviour in behaviours:
            if behaviour not in missing:  # a state left by a crash right after its artifact was saved
                self.run.drop_state(self.artifact_id(GCG, behaviour))
        wanted += [self.artifact_id(GCG, b) for b in behaviours]
        total = len(behaviours) * self.config.num_steps
        bar = tqdm(total=total, desc="gcg", unit="step", disable=not missing)
        bar.update((len(behaviours) - len(missing)) * self.config.num_steps)
        with bar:
            for behaviour in missing:
                self._keep(self._gcg(renderer, behaviour, allowed, bar), done)
                self.run.drop_state(self.artifact_id(GCG, behaviour))
        return [AttackArtifact.from_row(done[i]) for i in wanted]

    # --- ids ------------------------------------------------------------------------------------------------------
    def settings(self, attack: str) -> dict[str, Any]:
        """What an artifact of this attack depends on, besides behaviour, model and seed."""
        values = dataclasses.asdict(self.config)
        return values if attack == GCG else {key: values[key] for key in BASELINE_SETTINGS}

    def artifact_id(self, attack: str, behaviour: Behaviour) -> str:
        model = (self.loaded.spec, self.loaded.fingerprint)
        about = (behaviour.request, behaviour.target_string)
        return content_hash([attack, *about, *model, self.settings(attack), self.seed])

    def _keep(self, artifact: AttackArtifact, done: dict[str, dict[str, Any]]) -> None:
        row = artifact.to_row()
        self.run.append(ATTACKS, row)
        done[artifact.artifact_id] = row

    # --- making one -----------------------------------------------------------------------------------------------
    def _slot(self, renderer: Renderer, behaviour: Behaviour) -> SuffixSlot:
        assert behaviour.target_string is not None
        return default_slot(
            renderer,
            behaviour.request,
            behaviour.target_string,
            length=self.config.suffix_length,
            placement=self.config.placement,
            system=self.config.system_prompt,
            suffix=self.config.init_suffix,
        )

    def _baselines(
        self, renderer: Renderer, behaviour: Behaviour, allowed: torch.Tensor
    ) -> list[AttackArtifact]:
        slot = self._slot(renderer, behaviour)
        generator = torch.Generator().manual_seed(
            stream_seed(self.seed, behaviour.behaviour_id, "random suffix")
        )
        return [
            self._artifact(renderer, name, behaviour, slot, suffix_ids)
            for name, suffix_ids in baseline_suffixes(slot, allowed, generator)
        ]

    def _gcg(
        self, renderer: Renderer, behaviour: Behaviour, allowed: torch.Tensor, bar: tqdm
    ) -> AttackArtifact:
        slot = self._slot(renderer, behaviour)
        name = self.artifact_id(GCG, behaviour)
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

        state = run_gcg(
            TargetLoss(self.loaded, slot),
            slot,
            self.config,
            allowed,
            seed=stream_seed(self.seed, behaviour.behaviour_id, GCG),
            state=state,
            on_step=on_step,
        )
        bar.update(self.config.num_steps - state.step)
        return self._artifact(renderer, GCG, behaviour, slot, state.best_ids, state)

    def _artifact(
        self,
        renderer: Renderer,
        attack: str,
        behaviour: Behaviour,
        slot: SuffixSlot,
        suffix_ids: list[int] | None,
        state: GCGState | None = None,
    ) -> AttackArtifact:
        system = self.config.system_prompt
        if suffix_ids is None:
            suffix, prompt = None, behaviour.request
            rendered = renderer.render(Conversation.build(prompt, system=system), behaviour.target_string)
            expected = (*rendered.ids, *rendered.target_ids)
        else:
            suffix, prompt = slot.suffix_texts([suffix_ids])[0], slot.content(suffix_ids)
            rendered = renderer.render(Conversation(prompt, system=system), behaviour.target_string)
            expected = (*slot.before_ids, *suffix_ids, *slot.after_ids, *slot.target_ids)
        loss = plain_loss(self.loaded, rendered.ids, rendered.target_ids)
        if state and not abs(loss - state.best_loss) <= ROUNDING[self.loaded.dtype]:
            log.warning(
                "%s: the search saw loss %.4f, a plain pass gives %.4f on %s; please report this",
                *(behaviour.behaviour_id, state.best_loss, loss, self.loaded.spec),
            )
        return AttackArtifact(
            artifact_id=self.artifact_id(attack, behaviour),
            behaviour_id=behaviour.behaviour_id,
            attack=attack,
            source_model=self.loaded.spec,
            request=behaviour.request,
            prompt=prompt,
            suffix=suffix,
            suffix_ids=suffix_ids,
            target_string=behaviour.target_string,
            loss=loss,
            loss_history=state.losses if state else [loss],
            best_step=state.best_step if state else 0,
            seed=self.seed,
            config_hash=content_hash(self.settings(attack)),
            token_fidelity=(*rendered.ids, *rendered.target_ids) == tuple(expected),
            system_prompt=system,
        )
