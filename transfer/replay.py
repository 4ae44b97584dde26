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
COLDEST = 1e-3
NotSent = Callable[[AttackArtifact, Exception], None]


@dataclass(frozen=True)
class ReplayConfig:
    """How replies are made. Greedy by default; with a temperature sampled from ``seed``."""

    max_new_tokens: int | None = setting(
        None, "New tokens of a reply [default: 64, more for classes that ask for copying].", low=1
    )
    temperature: float = setting(0.0, "0: greedy.", low=0)
    seed: int = setting(0, "Random seed of the sampling.", low=0, high=LARGEST)
    replies: int = setting(1, "Replies to each prompt, sampled.", low=1)

    def __post_init__(self) -> None:
        check_settings(self, "replay")
        if 0 < self.temperature < COLDEST:
            raise AttackPlaneError(
                "a temperature that no float32 divides by",
                where="replay",
                got=self.temperature,
                remedy=f"give 0 for greedy replies, or at least {COLDEST}",
            )
        if self.replies > 1 and not self.temperature:
            raise AttackPlaneError(
                "several greedy replies would be one and the same",
                where="replay",
                got=f"replies {self.replies}, temperature 0",
                remedy="give a temperature above 0",
            )

    def of(self, attack: str) -> ReplayConfig:
        """The settings for prompts of one class, with the length of its replies."""
        if self.max_new_tokens is not None:
            return self
        return replace(self, max_new_tokens=reply_tokens_by_class().get(attack, REPLY_TOKENS))

    @property
    def of_one(self) -> Row:
        """What one reply depends on; how many there are is none of it."""
        return {name: value for name, value in asdict(self).items() if name != "replies"}


@dataclass(frozen=True)
class Sending:
    """One prompt on its way to one reply: the ``sample``-th of this prompt."""

    artifact: AttackArtifact
    sample: int = 0

    def replay_id(self, spec: str, fingerprint: str, config: ReplayConfig) -> str:
        """Stands for the reply: prompt, target model, settings and number."""
        about = [
            self.artifact.artifact_id,
            spec,
            fingerprint,
            config.of(self.artifact.attack).of_one,
        ]
        return content_hash([*about, self.sample] if self.sample else about)

    def seed(self, config: ReplayConfig) -> int:
        """Of the reply's own stream, so that a resumed run draws alike."""
        about = [config.seed, self.artifact.artifact_id]
        return int(content_hash([*about, self.sample] if self.sample else about, 12), 16)


def sendings(artifacts: Sequence[AttackArtifact], config: ReplayConfig) -> list[Sending]:
    """All replies that are wanted, the first of every prompt first."""
    return [Sending(a, sample) for sample in range(config.replies) for a in artifacts]


@dataclass(frozen=True)
class _Outgoing:
    """A prompt as it will be sent, and how its reply is made."""

    sending: Sending
    text: str
    certificate: Row
    config: ReplayConfig


def _outgoing(
    renderer: Renderer,
    sendings: Sequence[Sending],
    config: ReplayConfig,
    not_sent: NotSent | None,
) -> list[_Outgoing]:
    """Render every prompt, those with short replies and short prompts first.

    What the template refuses, and what is too long for the model, is told to ``not_sent``.
    """
    ready = []
    rendered: dict[str, tuple[str, Row] | None] = {}
    for sending in sendings:
        artifact = sending.artifact
        if artifact.artifact_id not in rendered:
            try:
                own = _rendered(renderer, artifact, config)
            except AttackPlaneError as error:
                if not_sent is None:
                    raise
                not_sent(artifact, error)
                own = None
            rendered[artifact.artifact_id] = own
        if sent := rendered[artifact.artifact_id]:
            ready.append(_Outgoing(sending, *sent, config.of(artifact.attack)))
    return sorted(ready, key=lambda item: (item.config.max_new_tokens or 0, len(item.text)))


def _rendered(
    renderer: Renderer, artifact: AttackArtifact, config: ReplayConfig
) -> tuple[str, Row]:
    """The text that is sent, and its certificate."""
    text = renderer.text(Conversation(artifact.prompt, system=artifact.system_prompt))
    new = config.of(artifact.attack).max_new_tokens or REPLY_TOKENS
    what = f"{artifact.attack} {artifact.behaviour_id} {artifact.artifact_id}"
    renderer.require_room(len(renderer.tokenise([text])[0]), new, what)
    try:
        return text, certificate(renderer, artifact)
    except AttackPlaneError as error:  # sent all the same, as the template makes of it
        return text, {"sent_as_meant": False, "fault": " ".join(str(error).split())}


def replay(
    loaded: LoadedModel,
    sendings: Sequence[Sending],
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
    for part in _batches(_outgoing(renderer, sendings, config, not_sent), batch_size):
        texts = [item.text for item in part]
        replies = complete(
            renderer,
            texts,
            max_new_tokens=part[0].config.max_new_tokens or REPLY_TOKENS,
            temperature=config.temperature,
            seed=[item.sending.seed(config) for item in part],
            batch_size=batch_size,
        )
        judged = judged_replies(judges, [item.sending for item in part], replies)
        once = list(dict.fromkeys(texts))  # the same for all replies to one prompt
        scores = refusal_scores(renderer, renderer.tokenise(once), batch_size=batch_size)
        leanings = dict(zip(once, scores, strict=True))
        yield [
            record_of(
                item.sending,
                (loaded.spec, loaded.fingerprint),
                config,
                reply,
                said,
                item.certificate,
                leanings[item.text],
            )
            for item, reply, said in zip(part, replies, judged, strict=True)
        ]


def _batches(items: Sequence[_Outgoing], size: int) -> Iterator[list[_Outgoing]]:
    """Batches of prompts whose replies are equally long."""
    for _, group in groupby(items, key=lambda item: item.config.max_new_tokens):
        same = list(group)
        for start in range(0, len(same), size):
            yield same[start : start + size]


def judged_replies(
    judges: Sequence[Judge], sendings: Sequence[Sending], replies: Sequence[str]
) -> list[Judgement]:
    """What the judges say of each reply."""
    exchanges = [
        Exchange(a.request, reply, a.target_string, a.prompt)
        for a, reply in zip((s.artifact for s in sendings), replies, strict=True)
    ]
    return judge_all(judges, exchanges) if exchanges else []


def record_of(
    sending: Sending,
    target: tuple[str, str],
    config: ReplayConfig,
    reply: str,
    judged: Judgement,
    sent: Row,
    leaning: RefusalScore | None = None,
) -> Replay:
    """A reply as it is kept; ``target`` is its spec and fingerprint, ``sent`` the certificate."""
    artifact, own = sending.artifact, config.of(sending.artifact.attack)
    return Replay(
        replay_id=sending.replay_id(*target, config),
        artifact_id=artifact.artifact_id,
        behaviour_id=artifact.behaviour_id,
        attack=artifact.attack,
        source_model=artifact.source_model,
        target_model=target[0],
        reply=reply,
        judgements=judged.scores,
        jailbroken=judged.jailbroken,
        config_hash=content_hash(own.of_one),
        certificate=sent,
        outcome=judged.outcome,
        d=leaning.d if leaning else None,
        log_odds=leaning.log_odds if leaning else None,
        sample=sending.sample,
    )
