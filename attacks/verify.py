"""Check an artifact as a stranger would: render it, score it, compare with what it claims."""

from __future__ import annotations

from dataclasses import dataclass

from attacks.likelihood import plain_loss
from core.errors import AttackPlaneError
from core.prompt import Conversation, Renderer
from core.records import AttackArtifact


@dataclass(frozen=True)
class Verification:
    """What the check of one artifact gave.

    ``fault`` is None where it holds. Losses are nats per target token.
    """

    artifact_id: str
    recorded: float | None
    measured: float | None
    fault: str | None


def verify_artifact(
    renderer: Renderer, artifact: AttackArtifact, *, tolerance: float = 1e-3
) -> Verification:
    """Check token fidelity and loss of one artifact on its source model, by a plain forward
    pass."""
    conversation = Conversation.of_prompt(
        artifact.prompt,
        request=artifact.request,
        suffix=artifact.suffix,
        system=artifact.system_prompt,
    )
    try:
        # whole prompts may carry outer white space that the template removes; suffixes may not
        prompt = renderer.render(
            conversation, artifact.target_string, allow_trim=artifact.suffix_ids is None
        )
    except AttackPlaneError as error:
        return Verification(artifact.artifact_id, artifact.loss, None, str(error))
    faults = []
    if artifact.suffix_ids is not None:
        span = prompt.suffix
        got = list(prompt.ids[span.start : span.stop]) if span else None
        if got != artifact.suffix_ids:
            faults.append("the suffix, tokenised again in its prompt, gives other ids")
    if artifact.token_fidelity is False:
        faults.append("recorded without token fidelity")
    measured = None
    if artifact.loss is not None and artifact.target_string is not None:
        measured = plain_loss(renderer.loaded, prompt.ids, prompt.target_ids)
        if not abs(measured - artifact.loss) <= tolerance:
            faults.append(f"loss {measured:.6f}, recorded {artifact.loss:.6f}")
    return Verification(artifact.artifact_id, artifact.loss, measured, "; ".join(faults) or None)
