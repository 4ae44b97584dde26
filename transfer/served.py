"""Frozen prompts on a served model: replies and verdicts, without what only weights can tell.

Outcome D, the refusal log-odds and, in the certificate, what the server does not say are None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from core.generate import BATCH
from core.models import LoadedModel
from core.records import AttackArtifact, Replay, content_hash
from core.rows import Row
from core.served import Answer, Question, Server
from evaluation.judges import Judge
from transfer.replay import (
    REPLY_TOKENS,
    NotSent,
    ReplayConfig,
    Sending,
    judged_replies,
    record_of,
    replay,
)

SEEDS = 2**31
"""Servers take a seed of 32 bits."""


def replay_served(
    server: Server,
    sendings: Sequence[Sending],
    judges: Sequence[Judge],
    config: ReplayConfig,
    *,
    not_sent: NotSent | None = None,
) -> Iterator[list[Replay]]:
    """Replies to all prompts as they come; see ``transfer/replay.py``."""
    target = server.spec, server.fingerprint
    for answers in server.ask_all(_question(sending, config) for sending in sendings):
        answered: list[tuple[Sending, Answer]] = []
        for number, answer in answers:
            if isinstance(answer, Answer):
                answered.append((sendings[number], answer))
            elif not_sent is None:
                raise answer
            else:
                not_sent(sendings[number].artifact, answer)
        sent = [sending for sending, _ in answered]
        judged = judged_replies(judges, sent, [answer.text for _, answer in answered])
        yield [
            record_of(
                sending,
                target,
                config,
                answer.text,
                said,
                served_certificate(sending.artifact, answer),
            )
            for (sending, answer), said in zip(answered, judged, strict=True)
        ]


def replies_of(
    target: LoadedModel | Server,
    sendings: Sequence[Sending],
    judges: Sequence[Judge],
    config: ReplayConfig,
    *,
    batch_size: int = BATCH,
    not_sent: NotSent | None = None,
) -> Iterator[list[Replay]]:
    """Replies of a model that is here, or of a served one."""
    if isinstance(target, Server):
        return replay_served(target, sendings, judges, config, not_sent=not_sent)
    return replay(target, sendings, judges, config, batch_size=batch_size, not_sent=not_sent)


def _question(sending: Sending, config: ReplayConfig) -> Question:
    artifact = sending.artifact
    own = config.of(artifact.attack)
    system = [("system", artifact.system_prompt)] if artifact.system_prompt else []
    return Question(
        [*system, ("user", artifact.prompt)],
        own.max_new_tokens or REPLY_TOKENS,
        own.temperature,
        sending.seed(config) % SEEDS,
    )


def served_certificate(artifact: AttackArtifact, answer: Answer) -> Row:
    """The certificate of one prompt on a served model (``transfer/certificate.py``).

    What the server's template and tokenizer make of the content is not known, but where it gave the
    prompt's token ids: the source's ids of the content, found in them, say that it was sent as
    meant.
    """
    own = (artifact.rendering or {}).get("content_ids")
    ids = answer.prompt_ids
    same = True if own and ids and _holds(ids, own) else None
    return {
        "sent_as_meant": same,
        "verbatim": same,
        "same_ids": False if artifact.token_fidelity is False else same,
        "same_vocabulary": None,
        "same_template": None,
        "content_tokens": None,
        "source_content_tokens": len(own) if own else None,
        "prompt_tokens": len(ids) if ids else answer.prompt_tokens,
        "prompt_hash": None,
        "template_hash": None,
        "system_prompt_hash": content_hash(artifact.system_prompt)
        if artifact.system_prompt
        else None,
        "ids_sent": ids is not None,
        "served": {
            "model": answer.served_by,
            "finish": answer.finish,
            "prompt_tokens": answer.prompt_tokens,
            "reply_tokens": answer.reply_tokens,
            "cost": answer.cost,
        },
    }


def _holds(ids: Sequence[int], part: Sequence[int]) -> bool:
    """Whether ``part`` stands in ``ids`` as it is."""
    size = len(part)
    return any(list(ids[at : at + size]) == list(part) for at in range(len(ids) - size + 1))
