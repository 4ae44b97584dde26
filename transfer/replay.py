"""Send frozen prompts, verbatim, to a target model; give the replies and what the judges say.

1. Each prompt is rendered by the target's own chat template, with its own system prompt.
2. Prompts are batched by length; replies are greedy, or sampled from a stream of their own.
3. Every judge scores every reply; the first judge decides: refused, complied or neither.
4. Outcome D and the refusal log-odds are read from the prompt, before any reply
   (``evaluation/refusal_score.py``).
5. A certificate says what was sent (``certificate.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby

from attacks.registry import reply_tokens_by_class
from core.errors import AttackPlaneError
from core.generate import BATCH, complete
from core.models import LoadedModel
from core.prompt import Conversation, Renderer
from core.records import AttackArtifact, Replay, content_hash
from core.rows import Row
from core.settings import LARGEST, check_settings, setting
from evaluation.judges import Exchange, Judge, Judgement, judge_all
from evaluation.refusal_score import RefusalScore, refusal_scores
from transfer.certificate import certificate

REPLY_TOKENS = 64
"""New tokens of a reply, where the attack class asks for no more."""
NotSent = Callable[[AttackArtifact, Exception], None]


@dataclass(frozen=True)
class ReplayConfig:
    """How replies are made. Greedy by default; with a temperature sampled from ``seed``."""

    max_new_tokens: int | None = setting(
        None, "New tokens of a reply [default: 64, more for classes that ask for copying].", low=1
    )
    temperature: float = setting(0.0, "0: greedy.", low=0)
    seed: int = setting(0, "Random seed of the sampling.", low=0, high=LARGEST)

    def __post_init__(self) -> None:
        check_settings(self, "replay")

    def of(self, attack: str) -> ReplayConfig:
        """The settings for prompts of one class, with the length of its replies."""
        if self.max_new_tokens is not None:
            return self
        return replace(self, max_new_tokens=reply_tokens_by_class().get(attack, REPLY_TOKENS))


def replay_id(artifact: AttackArtifact, spec: str, fingerprint: str, config: ReplayConfig) -> str:
    """Stands for one reply: prompt, target model and settings."""
    settings = asdict(config.of(artifact.attack))
    return content_hash([artifact.artifact_id, spec, fingerprint, settings])


@dataclass(frozen=True)
class _Outgoing:
    """A prompt as it will be sent, and how its reply is made."""

    artifact: AttackArtifact
    text: str
    certificate: Row
    config: ReplayConfig


def _outgoing(
    renderer: Renderer,
    artifacts: Sequence[AttackArtifact],
    config: ReplayConfig,
    not_sent: NotSent | None,
) -> list[_Outgoing]:
    """Render every prompt, those with short replies and short prompts first.

    What the template refuses, and what is too long for the model, is told to ``not_sent``.
    """
    ready = []
    for artifact in artifacts:
        try:
            text = renderer.text(Conversation(artifact.prompt, system=artifact.system_prompt))
            new = config.of(artifact.attack).max_new_tokens or REPLY_TOKENS
            what = f"{artifact.attack} {artifact.behaviour_id} {artifact.artifact_id}"
            renderer.require_room(len(renderer.tokenise([text])[0]), new, what)
        except AttackPlaneError as error:
            if not_sent is None:
                raise
            not_sent(artifact, error)
            continue
        try:
            sent = certificate(renderer, artifact)
        except AttackPlaneError as error:  # sent all the same, as the template makes of it
            sent = {"sent_as_meant": False, "fault": " ".join(str(error).split())}
        ready.append(_Outgoing(artifact, text, sent, config.of(artifact.attack)))
    return sorted(ready, key=lambda item: (item.config.max_new_tokens or 0, len(item.text)))


def replay(
    loaded: LoadedModel,
    artifacts: Sequence[AttackArtifact],
    judges: Sequence[Judge],
    config: ReplayConfig,
    *,
    batch_size: int = BATCH,
    not_sent: NotSent | None = None,
) -> Iterator[list[Replay]]:
    """Replies to all prompts, batch by batch as they are made.

    With ``not_sent`` a prompt that the target's template refuses, or that does not fit into the
    model, is told to it and the others go on; without it the refusal is raised.
    """
    renderer = Renderer(loaded)
    ready = _outgoing(renderer, artifacts, config, not_sent)
    if config.temperature > 0:  # each from a stream of its own, so that a resumed run draws alike
        batch_size = 1
    for part in _batches(ready, batch_size):
        texts = [item.text for item in part]
        replies = complete(
            renderer,
            texts,
            max_new_tokens=part[0].config.max_new_tokens or REPLY_TOKENS,
            temperature=config.temperature,
            seed=int(content_hash([config.seed, part[0].artifact.artifact_id], 12), 16),
            batch_size=batch_size,
        )
        exchanges = [
            Exchange(a.request, reply, a.target_string, a.prompt)
            for a, reply in zip((item.artifact for item in part), replies, strict=True)
        ]
        judged = judge_all(judges, exchanges)
        leanings = refusal_scores(renderer, renderer.tokenise(texts), batch_size=batch_size)
        yield [_record(loaded, *row) for row in zip(part, replies, judged, leanings, strict=True)]


def _batches(items: Sequence[_Outgoing], size: int) -> Iterator[list[_Outgoing]]:
    """Batches of prompts whose replies are equally long."""
    for _, group in groupby(items, key=lambda item: item.config.max_new_tokens):
        same = list(group)
        for start in range(0, len(same), size):
            yield same[start : start + size]


def _record(
    loaded: LoadedModel,
    item: _Outgoing,
    reply: str,
    judged: Judgement,
    leaning: RefusalScore,
) -> Replay:
    artifact, config = item.artifact, item.config
    return Replay(
        replay_id=replay_id(artifact, loaded.spec, loaded.fingerprint, config),
        artifact_id=artifact.artifact_id,
        behaviour_id=artifact.behaviour_id,
        attack=artifact.attack,
        source_model=artifact.source_model,
        target_model=loaded.spec,
        reply=reply,
        judgements=judged.scores,
        jailbroken=judged.jailbroken,
        config_hash=content_hash(asdict(config)),
        certificate=item.certificate,
        outcome=judged.outcome,
        d=leaning.d,
        log_odds=leaning.log_odds,
    )
