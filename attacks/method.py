"""What all attacks share: cells of behaviours, artifacts saved as soon as they are made, resume.

A ``Method`` is one attack with its settings. For each behaviour it names the artifacts it would make; those already in the
run folder are not made again. Each behaviour has a random stream of its own, so neither the order nor the choice of
behaviours changes a result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from attacks.likelihood import plain_loss
from core.errors import AttackPlaneError
from core.models import LoadedModel
from core.prompt import Conversation, Prompt, Renderer
from core.records import NO_SOURCE, AttackArtifact, Behaviour, content_hash
from core.store import ATTACKS, RunFolder


@dataclass(frozen=True)
class SuccessTest:
    """Whether a reply to a behaviour counts as a success; ``judge`` is the test's name, which artifacts depend on."""

    judge: str
    decide: Callable[[Behaviour, str], bool]


OnFailure = Callable[[Behaviour, Exception], None]


def stream_seed(seed: int, *names: str) -> int:
    """A seed for one named random stream."""
    return int(content_hash([seed, *names], 15), 16)


class Method(ABC):
    """One attack with its settings, over any number of behaviours.

    Attributes:
        name: the attack's name in the artifacts, and the name of its stage in the run.
        steps, unit: progress units that one behaviour takes.
        needs_target: whether a behaviour without a target string is refused.
    """

    name: str
    steps = 1
    unit = "behaviour"
    needs_target = True

    def __init__(self, run: RunFolder, seed: int) -> None:
        self.run, self.seed = run, seed

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What an artifact depends on, besides behaviour, model and seed."""

    @abstractmethod
    def make(self, behaviour: Behaviour, bar: tqdm) -> Iterator[AttackArtifact]:
        """The artifacts of one behaviour, each as soon as it is made."""

    def keys(self, behaviour: Behaviour) -> list[tuple[str, str | None]]:
        """(attack, variant) of each artifact that ``make`` gives."""
        return [(self.name, None)]

    def models(self) -> list[LoadedModel]:
        """The models that an artifact depends on."""
        return []

    def opened(self) -> AbstractContextManager[None]:
        """Held open while artifacts are made."""
        return nullcontext()

    def artifact_id(self, behaviour: Behaviour, attack: str | None = None, variant: str | None = None) -> str:
        about = [attack or self.name, behaviour.request, behaviour.target_string]
        about += [part for model in self.models()[:1] for part in (model.spec, model.fingerprint)]
        return content_hash([*about, self.settings(), self.seed, *([variant] if variant else [])])

    def ids(self, behaviour: Behaviour) -> list[str]:
        return [self.artifact_id(behaviour, *key) for key in self.keys(behaviour)]

    def missing(
        self, behaviours: Sequence[Behaviour], done: Collection[str] | None = None
    ) -> list[Behaviour]:
        """Behaviours that lack an artifact. ``done``: ids that the run holds, where they have been read."""
        done = set(self.run.each(ATTACKS, "artifact_id")) if done is None else done
        return [b for b in behaviours if not all(i in done for i in self.ids(b))]

    def begin(self) -> None:
        """Write settings and models into the run's manifest; refuses other settings of the same attack."""
        models = {model.spec: model.fingerprint for model in self.models()}
        self.run.begin_stage(self.name, {**self.settings(), "seed": self.seed}, models)

    def attack(
        self, behaviours: Sequence[Behaviour], *, on_failure: OnFailure | None = None
    ) -> list[AttackArtifact]:
        """Artifacts of all behaviours, those of earlier runs included.

        With ``on_failure`` a behaviour that fails is told to it and the others go on.

        Raises:
            AttackPlaneError: a behaviour without a target string, where one is needed.
        """
        lacking = [b.behaviour_id for b in behaviours if self.needs_target and not b.target_string]
        if lacking:
            raise AttackPlaneError(
                f"{self.name} needs a target string for every behaviour",
                where=f"{len(lacking)} behaviours, first {lacking[0]}",
                remedy="add a column target ('Sure, here is ...') to the behaviours file",
            )
        self.run.note_behaviours(behaviours)
        done = {row["artifact_id"]: row for row in self.run.rows(ATTACKS)}
        missing = self.missing(behaviours, done)
        bar = tqdm(
            total=len(behaviours) * self.steps,
            desc=self.name,
            unit=self.unit,
            disable=not missing,
            leave=None,
            initial=(len(behaviours) - len(missing)) * self.steps,
        )
        with bar, self.opened() if missing else nullcontext():
            for behaviour in behaviours:
                if behaviour in missing:
                    start = bar.n
                    try:
                        for artifact in self.make(behaviour, bar):
                            if artifact.artifact_id not in done:
                                row = artifact.to_row()
                                self.run.append(ATTACKS, row)
                                done[artifact.artifact_id] = row
                    except Exception as error:
                        if on_failure is None:
                            raise
                        on_failure(behaviour, error)
                        continue
                    bar.update(start + self.steps - bar.n)  # a search may stop early
                for name in self.ids(behaviour):  # also left by a crash right after its artifact was saved
                    self.run.drop_state(name)
        wanted = [i for b in behaviours for i in self.ids(b)]
        return [AttackArtifact.from_row(done[i]) for i in wanted if i in done]

    def prompt_artifact(
        self, behaviour: Behaviour, prompt: str, *, variant: str | None = None, system: str | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> AttackArtifact:  # fmt: skip
        """A prompt that no model's loss was computed for."""
        return AttackArtifact(
            artifact_id=self.artifact_id(behaviour, self.name, variant),
            behaviour_id=behaviour.behaviour_id,
            attack=self.name,
            source_model=NO_SOURCE,
            request=behaviour.request,
            prompt=prompt,
            suffix=None,
            suffix_ids=None,
            target_string=behaviour.target_string,
            loss=None,
            loss_history=[],
            best_step=None,
            seed=self.seed,
            config_hash=content_hash(self.settings()),
            token_fidelity=None,
            system_prompt=system,
            variant=variant,
            provenance=provenance or {},
        )


def rendering(renderer: Renderer, prompt: Prompt) -> dict[str, Any]:
    """What an artifact keeps of how its source model rendered it, for the certificate of a replay."""
    return {
        "content_ids": list(prompt.ids[prompt.content.start : prompt.content.stop]),
        "vocabulary": renderer.vocabulary_hash,
        "template": renderer.template_hash,
    }


class SourceMethod(Method):
    """An attack on a source model, whose target loss is in every artifact."""

    def __init__(self, run: RunFolder, loaded: LoadedModel, seed: int) -> None:
        super().__init__(run, seed)
        self.loaded = loaded
        self.renderer = Renderer(loaded)

    def models(self) -> list[LoadedModel]:
        return [self.loaded]

    def scored_artifact(
        self,
        behaviour: Behaviour,
        prompt: str,
        *,
        attack: str | None = None,
        variant: str | None = None,
        system: str | None,
        suffix: str | None = None,
        suffix_ids: list[int] | None = None,
        scored: tuple[int, ...] | None = None,
        history: list[float] | None = None,
        best_step: int = 0,
        snapshots: list[dict[str, Any]] | None = None,
        allow_trim: bool = False,
        provenance: dict[str, Any] | None = None,
    ) -> AttackArtifact:
        """Render and score a prompt as a stranger would.

        Args:
            scored: ids of prompt and target that the search scored; None where it scored this very text.
            allow_trim: accept a template that removes white space around the content.
        """
        conversation = Conversation.of_prompt(prompt, request=behaviour.request, suffix=suffix, system=system)
        rendered = self.renderer.render(conversation, behaviour.target_string, allow_trim=allow_trim)
        loss = plain_loss(self.loaded, rendered.ids, rendered.target_ids)
        return AttackArtifact(
            artifact_id=self.artifact_id(behaviour, attack, variant),
            behaviour_id=behaviour.behaviour_id,
            attack=attack or self.name,
            source_model=self.loaded.spec,
            request=behaviour.request,
            prompt=prompt,
            suffix=suffix,
            suffix_ids=suffix_ids,
            target_string=behaviour.target_string,
            loss=loss,
            loss_history=history or [loss],
            best_step=best_step,
            seed=self.seed,
            config_hash=content_hash(self.settings()),
            token_fidelity=scored is None or (*rendered.ids, *rendered.target_ids) == tuple(scored),
            system_prompt=system,
            variant=variant,
            rendering=rendering(self.renderer, rendered),
            provenance=provenance or {},
            snapshots=snapshots or [],
        )
