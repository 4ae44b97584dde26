"""Checkpoints, which are targets like any other."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import AttackPlaneError
from core.generate import complete
from core.models import LoadedModel
from core.prompt import Conversation, Renderer
from core.records import HARMFUL
from evaluation.behaviours import DEMONSTRATION, load_behaviours
from evaluation.judges.reply_rules import is_refusal
from evaluation.refusals import refusal_replies
from training.sft import LOSSES, SFTConfig, train


@dataclass(frozen=True)
class TrainResult:
    """Checkpoint folders, and the losses (nats per reply token) step by step."""

    checkpoints: list[Path]
    losses: list[dict[str, float]]


def train_sft(
    spec: str, out: Path, config: SFTConfig, behaviours: str = DEMONSTRATION
) -> TrainResult:
    """Refusal fine-tuning on the training split of a behaviour set; checkpoints ``out/step-N``.

    Harmful requests are refused. Harmless ones, and the pseudo-harmful ones where there are any,
    get the base model's own replies.
    """
    rows = load_behaviours(behaviours, splits=["train"])
    harmful = [b for b in rows if b.label == HARMFUL]
    harmless = [b for b in rows if b.label != HARMFUL]
    if not harmful or not harmless:
        raise AttackPlaneError(
            "refusal training needs harmful and harmless requests",
            where=behaviours,
            got=f"{len(harmful)} harmful, {len(harmless)} others in the split train",
            remedy="give a set with both labels and a split train",
        )
    phrases = refusal_replies()
    refusals = [(b.request, phrases[i % len(phrases)]) for i, b in enumerate(harmful)]
    requests = [b.request for b in harmless]
    checkpoints = train(spec, refusals, requests, config, out, own_replies=own_replies)
    with open(out / LOSSES, newline="") as file:
        losses = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    return TrainResult(checkpoints, losses)


JUDGED_TOKENS = 32
"""Of a reply, enough to see whether it refuses."""
OPENING = "Sure, here is"
"""What an ordinary request is answered with in the model's name where the model itself refuses."""


def own_replies(
    loaded: LoadedModel, requests: Sequence[str], tokens: int
) -> list[tuple[str, bool]]:
    """The first ``tokens`` tokens of the base model's greedy replies; whether each ends there.

    A reply that refuses would teach to refuse what is harmless. Such a request gets what the model
    says after ``OPENING``; where that refuses too, the reply is empty, and the request left out.
    """
    replies = _greedy(loaded, requests, tokens, "", "base model's replies")
    refused = [i for i, reply in enumerate(replies) if is_refusal(reply)]
    again = _greedy(loaded, [requests[i] for i in refused], tokens, OPENING, "opened replies")
    for i, reply in zip(refused, again, strict=True):
        replies[i] = f"{OPENING} {reply}" if reply and not is_refusal(reply) else ""
    answers = []
    for reply, ids in zip(replies, Renderer(loaded).tokenise(replies), strict=True):
        learnt = loaded.tokenizer.decode(ids[:tokens]) if len(ids) > tokens else reply
        answers.append((learnt.strip(), len(ids) < tokens - 1))
    return answers


def _greedy(
    loaded: LoadedModel, requests: Sequence[str], tokens: int, opening: str, description: str
) -> list[str]:
    """Greedy replies, what follows ``opening``; at least ``JUDGED_TOKENS`` of each.

    Cut off early a refusal could not be told from an answer, so more is read than is learnt.
    """
    renderer = Renderer(loaded)
    texts = [renderer.text(Conversation.build(request)) + opening for request in requests]
    return complete(
        renderer,
        texts,
        max_new_tokens=max(tokens, JUDGED_TOKENS),
        batch_size=32,
        description=description,
    )
