"""What an attack gives: one adversarial prompt with all that is known of it, and how it is scored.

A prompt of an attack on a source model is rendered and scored as a stranger would, by one plain
forward pass over the whole conversation. Whether the ids that the search scored are those of the
prompt's text (token fidelity) is part of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from core.conversation import Conversation
from core.records import NO_SOURCE, Behaviour
from core.rows import Row

if TYPE_CHECKING:  # a prompt that no model scores needs no torch
    from attacks.slot import SuffixSlot
    from core.prompt import Prompt, Renderer


@dataclass(frozen=True)
class AttackResult:
    """One adversarial prompt. Fields as in ``core.records.AttackArtifact``; losses in nats.

    ``loss`` is the mean negative log-likelihood of ``target_string`` per target token on
    ``source_model``; None for a prompt that no model's loss was computed for. ``loss_history``
    holds the losses that the search saw, index 0 before its first step.
    """

    attack: str
    source_model: str
    request: str
    prompt: str
    target_string: str | None
    suffix: str | None = None
    suffix_ids: list[int] | None = None
    loss: float | None = None
    loss_history: list[float] = field(default_factory=list)
    best_step: int | None = None
    token_fidelity: bool | None = None
    system_prompt: str | None = None
    faults: list[str] = field(default_factory=list)
    variant: str | None = None
    rendering: Row | None = None
    provenance: Row = field(default_factory=dict)
    snapshots: list[Row] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """``loss_history`` by its short name."""
        return self.loss_history

    def to_row(self) -> Row:
        """A plain dictionary, as JSON and pandas take it."""
        return asdict(self)


def rendering_of(renderer: Renderer, prompt: Prompt) -> Row:
    """What is kept of how a source model rendered a prompt, for the certificate of a replay."""
    return {
        "content_ids": list(prompt.ids[prompt.content.start : prompt.content.stop]),
        "vocabulary": renderer.vocabulary_hash,
        "template": renderer.template_hash,
    }


@dataclass(frozen=True)
class Search:
    """What a search says of the prompt that it returns.

    ``scored``: ids of prompt and target that it scored; None where it scored this very text.
    ``snapshots``: (step, prompt) of each prompt that was the best in its turn.
    """

    history: Sequence[float] = ()
    best_step: int = 0
    scored: tuple[int, ...] | None = None
    snapshots: Sequence[tuple[int, str]] = ()


def scored_result(
    renderer: Renderer,
    behaviour: Behaviour,
    attack: str,
    prompt: str,
    *,
    system: str | None = None,
    search: Search = Search(),
    suffix: str | None = None,
    suffix_ids: list[int] | None = None,
    variant: str | None = None,
    allow_trim: bool = False,
    provenance: Row | None = None,
) -> AttackResult:
    """Render a prompt on its source model and score it.

    Args:
        allow_trim: accept a template that removes white space around the content.
    """
    from attacks.likelihood import plain_loss

    conversation = Conversation.of_prompt(
        prompt, request=behaviour.request, suffix=suffix, system=system
    )
    rendered = renderer.render(conversation, behaviour.target_string, allow_trim=allow_trim)
    loss = plain_loss(renderer.loaded, rendered.ids, rendered.target_ids)
    whole = (*rendered.ids, *rendered.target_ids)
    return AttackResult(
        attack=attack,
        source_model=renderer.loaded.spec,
        request=behaviour.request,
        prompt=prompt,
        target_string=behaviour.target_string,
        suffix=suffix,
        suffix_ids=suffix_ids,
        loss=loss,
        loss_history=list(search.history) or [loss],
        best_step=search.best_step,
        token_fidelity=search.scored is None or whole == tuple(search.scored),
        system_prompt=system,
        variant=variant,
        rendering=rendering_of(renderer, rendered),
        provenance=provenance or {},
        snapshots=[{"step": step, "prompt": text} for step, text in search.snapshots],
    )


def prompt_result(
    behaviour: Behaviour,
    attack: str,
    prompt: str,
    *,
    variant: str | None = None,
    system: str | None = None,
    provenance: Row | None = None,
) -> AttackResult:
    """A prompt that no model's loss was computed for."""
    return AttackResult(
        attack=attack,
        source_model=NO_SOURCE,
        request=behaviour.request,
        prompt=prompt,
        target_string=behaviour.target_string,
        system_prompt=system,
        variant=variant,
        provenance=provenance or {},
    )


def suffix_result(
    slot: SuffixSlot,
    behaviour: Behaviour,
    attack: str,
    suffix_ids: list[int],
    *,
    system: str | None,
    search: Search = Search(),
    suffix: str | None = None,
    variant: str | None = None,
    allow_trim: bool = False,
) -> AttackResult:
    """A suffix in its slot, rendered and scored.

    ``suffix`` is its text where that is not the ids' own. Where ``search`` does not say which ids
    were scored, they are the slot's with this suffix.
    """
    text = slot.suffix_texts([suffix_ids])[0] if suffix is None else suffix
    if search.scored is None:
        whole = (*slot.before_ids, *suffix_ids, *slot.after_ids, *slot.target_ids)
        search = replace(search, scored=whole)
    return scored_result(
        slot.renderer,
        behaviour,
        attack,
        slot.content_with(text),
        system=system,
        search=search,
        suffix=text,
        suffix_ids=suffix_ids,
        variant=variant,
        allow_trim=allow_trim,
    )
