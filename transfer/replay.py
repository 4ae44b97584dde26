"""Send frozen prompts, verbatim, to a target model; give the replies and what the judges say.

1. Each prompt is rendered by the target's own chat template, with its own system prompt.
2. Prompts are batched by length; replies are greedy, or sampled from a stream of their own.
3. Every judge scores every reply; the first judge decides.
4. A certificate says what was sent (``certificate.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from core.errors import AttackPlaneError
from core.generate import complete
from core.models import LoadedModel
from core.prompt import Conversation, Renderer
from core.records import AttackArtifact, Replay, content_hash
from core.rows import Row
from core.settings import check_settings, setting
from evaluation.judges import Exchange, Judge, judge_all
from transfer.certificate import certificate

NotSent = Callable[[AttackArtifact, Exception], None]


@dataclass(frozen=True)
class ReplayConfig:
    """How replies are made. Greedy by default; with a temperature sampled from ``seed``."""

    max_new_tokens: int = setting(64, "New tokens of a reply.", low=1)
    temperature: float = setting(0.0, "0: greedy.", low=0)
    seed: int = setting(0, "Random seed of the sampling.")

    def __post_init__(self) -> None:
        check_settings(self, "replay")


def replay_id(artifact: AttackArtifact, spec: str, fingerprint: str, config: ReplayConfig) -> str:
    """Stands for one reply: prompt, target model and settings."""
    return content_hash([artifact.artifact_id, spec, fingerprint, asdict(config)])


@dataclass(frozen=True)
class _Outgoing:
    """A prompt as it will be sent."""

    artifact: AttackArtifact
    text: str
    certificate: Row


def _outgoing(
    renderer: Renderer, artifacts: Sequence[AttackArtifact], not_sent: NotSent | None
) -> list[_Outgoing]:
    """Render every prompt, shortest first; what the template refuses is told to ``not_sent``."""
    ready = []
    for artifact in artifacts:
        try:
            text = renderer.text(Conversation(artifact.prompt, system=artifact.system_prompt))
        except AttackPlaneError as error:
            if not_sent is None:
                raise
            not_sent(artifact, error)
            continue
        try:
            sent = certificate(renderer, artifact)
        except AttackPlaneError as error:  # sent all the same, as the template makes of it
            sent = {"sent_as_meant": False, "fault": " ".join(str(error).split())}
        ready.append(_Outgoing(artifact, text, sent))
    return sorted(ready, key=lambda item: len(item.text))


def replay(
    loaded: LoadedModel,
    artifacts: Sequence[AttackArtifact],
    judges: Sequence[Judge],
    config: ReplayConfig,
    *,
    batch_size: int = 16,
    not_sent: NotSent | None = None,
) -> Iterator[list[Replay]]:
    """Replies to all prompts, batch by batch as they are made.

    With ``not_sent`` a prompt that the target's template refuses is told to it and the others go
    on; without it the refusal is raised.
    """
    renderer = Renderer(loaded)
    ready = _outgoing(renderer, artifacts, not_sent)
    if config.temperature > 0:  # each from a stream of its own, so that a resumed run draws alike
        batch_size = 1
    for start in range(0, len(ready), batch_size):
        part = ready[start : start + batch_size]
        replies = complete(
            renderer,
            [item.text for item in part],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=int(content_hash([config.seed, part[0].artifact.artifact_id], 12), 16),
            batch_size=batch_size,
        )
        exchanges = [
            Exchange(item.artifact.request, reply, item.artifact.target_string)
            for item, reply in zip(part, replies, strict=True)
        ]
        verdicts = judge_all(judges, exchanges)
        yield [
            _record(loaded, config, item, reply, scores, jailbroken)
            for item, reply, (scores, jailbroken) in zip(part, replies, verdicts, strict=True)
        ]


def _record(
    loaded: LoadedModel,
    config: ReplayConfig,
    item: _Outgoing,
    reply: str,
    scores: dict[str, float | None],
    jailbroken: bool | None,
) -> Replay:
    artifact = item.artifact
    return Replay(
        replay_id=replay_id(artifact, loaded.spec, loaded.fingerprint, config),
        artifact_id=artifact.artifact_id,
        behaviour_id=artifact.behaviour_id,
        attack=artifact.attack,
        source_model=artifact.source_model,
        target_model=loaded.spec,
        reply=reply,
        judgements=scores,
        jailbroken=jailbroken,
        config_hash=content_hash(asdict(config)),
        certificate=item.certificate,
    )
