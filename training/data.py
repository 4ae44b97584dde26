"""What is trained on: requests with replies that the base model writes itself.

    harmful         with a refusal of the built-in list; some arms also take a *continuation*, the
                    base's own reply after the affirmative target
    harmless and    with the base's own greedy reply, so that the tuning moves nothing but what it
    pseudo-harmful  is meant to; or with the replies of a file

Continuations are made at training time, stay in the training's folder (``replies.jsonl``), and are
printed nowhere.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from typing_extensions import TypedDict

from core.errors import AttackPlaneError
from core.generate import complete
from core.models import LoadedModel
from core.prompt import Conversation, Renderer
from core.records import HARMLESS, PSEUDO_HARMFUL, content_hash
from core.store import RunFolder, sealed
from evaluation.judges.reply_rules import is_refusal
from evaluation.refusals import refusal_replies
from training.examples import Example, make_example
from training.requests import Requests

log = logging.getLogger(__name__)

REPLIES = "replies.jsonl"
JUDGED_TOKENS = 32
"""Of a reply, enough to see whether it refuses."""
OPENING = "Sure, here is"
"""What an ordinary request is answered with in the model's name where the model itself refuses."""


class _Made(TypedDict):
    key: str
    replies: list[Any]


class Texts:
    """The examples of one training; what the base must write is made once and kept.

    Args:
        folder: where the replies are kept; a resumed training finds them there.
        reply_tokens: new tokens of each.
        max_tokens: of a whole sequence.
    """

    def __init__(
        self,
        base: LoadedModel,
        requests: Requests,
        folder: RunFolder,
        *,
        reply_tokens: int,
        max_tokens: int,
    ) -> None:
        self.base, self.requests, self._folder = base, requests, folder
        self._tokens, self._longest = reply_tokens, max_tokens
        self.renderer = Renderer(base)

    def example(self, request: str, reply: str, *, ended: bool = True) -> Example:
        """One sequence, cut to the longest allowed.

        Raises:
            AttackPlaneError: nothing is left of the reply.
        """
        whole = make_example(self.renderer, request, reply, ended=ended)
        if whole.reply_start >= self._longest:
            raise AttackPlaneError(
                "a prompt leaves no room for its reply",
                where=f"train, {request[:60]!r}",
                got=f"{whole.reply_start} tokens of prompt, at most {self._longest} in all",
                remedy="raise --max-tokens, or leave the request out",
            )
        return whole.cut(self._longest)

    def refusals(self) -> list[Example]:
        """Harmful requests, each with one of the refusals in turn."""
        phrases = refusal_replies()
        return [
            self.example(b.request, phrases[i % len(phrases)])
            for i, b in enumerate(self.requests.harmful)
        ]

    def pairs(self) -> tuple[list[Example], list[Example]]:
        """(refusals, continuations) of the same harmful requests."""
        kept = self._continued()
        refusals = self.refusals()
        return [refusals[i] for i in kept], list(kept.values())

    def ordinary(self, *labels: str, opened: bool = False) -> list[Example]:
        """Harmless and pseudo-harmful requests with ordinary replies.

        Args:
            labels: which of the two classes; both if none is named.
            opened: add each request once more, with a reply that begins with ``OPENING``. Harmful
                continuations begin so, and ordinary replies of the base hardly ever do: an arm
                that contrasts the two would take the opening for the mark of harm.
        """
        asked = labels or (HARMLESS, PSEUDO_HARMFUL)
        chosen = [b.request for label in asked for b in getattr(self.requests, label)]
        given = self.requests.replies
        own = iter(self._made("ordinary", [r for r in chosen if r not in given]))
        answers = [(given[r], True) if r in given else next(own) for r in chosen]
        answered = [
            make_example(self.renderer, request, reply, ended=ended)
            for request, (reply, ended) in zip(chosen, answers, strict=True)
            if reply
        ]
        fitting = self._fitting(answered)
        if empty := len(chosen) - len(answered):
            log.warning("%d of %d ordinary requests got no answer: left out", empty, len(chosen))
        if long := len(answered) - len(fitting):
            log.warning("%d of %d ordinary requests are too long: left out", long, len(chosen))
        return fitting + (self._opened(chosen) if opened else [])

    def _fitting(self, rows: Sequence[Example]) -> list[Example]:
        return [row.cut(self._longest) for row in rows if row.reply_start < self._longest]

    def _opened(self, requests: Sequence[str]) -> list[Example]:
        """Requests with what the base says after ``OPENING``; refusals are left out."""
        chosen = [r for r in requests if r not in self.requests.replies]
        made = self._made("opened", chosen, [OPENING] * len(chosen))
        rows = [
            make_example(self.renderer, request, reply, ended=ended)
            for request, (reply, ended) in zip(chosen, made, strict=True)
            if reply
        ]
        return self._fitting(rows)

    def continuations(self) -> list[Example]:
        """Harmful requests that the base complies with: the target and what it says after it."""
        return list(self._continued().values())

    def _continued(self) -> dict[int, Example]:
        """Continuations by the number of their harmful request."""
        chosen = self.requests.harmful
        openings = [b.target_string or OPENING for b in chosen]
        made = self._made("continuation", [b.request for b in chosen], openings)
        examples = {}
        for i, (b, (reply, ended)) in enumerate(zip(chosen, made, strict=True)):
            if reply:
                examples[i] = self.example(b.request, reply, ended=ended)
        if refused := len(chosen) - len(examples):
            log.warning("%d of %d continuations refuse: left out", refused, len(chosen))
        return examples

    def _made(
        self, kind: str, requests: Sequence[str], openings: Sequence[str] = ()
    ) -> list[tuple[str, bool]]:
        """Replies of the base, from the folder where it has them."""
        key = content_hash([kind, list(requests), list(openings), self._tokens])
        remedy = "remove that line; its replies are made anew"
        there = self._folder.checked(REPLIES, _Made, remedy)
        kept = [row for row in there if row["key"] == key]
        if not kept and requests:
            if openings:
                made = continued(self.base, requests, openings, self._tokens)
            else:
                made = own_replies(self.base, requests, self._tokens)
            replies = [[reply, ended] for reply, ended in made]
            kept = [{"key": key, "kind": kind, "requests": list(requests), "replies": replies}]
            self._folder.append(REPLIES, sealed(kept[0]))
        return [(reply, ended) for reply, ended in kept[0]["replies"]] if kept else []


def texts_of(base: LoadedModel, requests: Requests, folder: RunFolder, config: Any) -> Texts:
    """The texts of a training with these settings."""
    return Texts(
        base,
        requests,
        folder,
        reply_tokens=config.reply_tokens,
        max_tokens=config.max_tokens,
    )


def own_replies(
    loaded: LoadedModel, requests: Sequence[str], tokens: int
) -> list[tuple[str, bool]]:
    """The first ``tokens`` tokens of the base model's greedy replies; whether each ends there.

    A reply that refuses would teach to refuse what is harmless. Such a request gets what the model
    says after ``OPENING``; where that refuses too, the reply is empty, and the request left out.
    """
    replies = _greedy(loaded, requests, [""] * len(requests), tokens, "base model's replies")
    refused = [i for i, reply in enumerate(replies) if is_refusal(reply)]
    chosen = [requests[i] for i in refused]
    again = _greedy(loaded, chosen, [OPENING] * len(chosen), tokens, "opened replies")
    for i, reply in zip(refused, again, strict=True):
        replies[i] = f"{OPENING} {reply}" if reply and not is_refusal(reply) else ""
    return _cut(loaded, replies, tokens)


def continued(
    loaded: LoadedModel, requests: Sequence[str], openings: Sequence[str], tokens: int
) -> list[tuple[str, bool]]:
    """Each opening and the first ``tokens`` tokens of what the model says after it.

    A reply that refuses, within ``JUDGED_TOKENS`` too, is empty.
    """
    replies = _greedy(loaded, requests, openings, tokens, "continuations")
    learnt = _cut(loaded, replies, tokens)
    return [
        (f"{opening} {start}".strip() if _complies(reply, opening) else "", ended)
        for opening, reply, (start, ended) in zip(openings, replies, learnt, strict=True)
    ]


def _complies(reply: str, opening: str) -> bool:
    """Whether neither what follows an opening nor the two together refuse."""
    return not is_refusal(reply) and not is_refusal(f"{opening} {reply}")


def _cut(loaded: LoadedModel, replies: Sequence[str], tokens: int) -> list[tuple[str, bool]]:
    answers = []
    for reply, ids in zip(replies, Renderer(loaded).tokenise(replies), strict=True):
        learnt = loaded.tokenizer.decode(ids[:tokens]) if len(ids) > tokens else reply
        answers.append((learnt.strip(), len(ids) < tokens - 1))
    return answers


def _greedy(
    loaded: LoadedModel,
    requests: Sequence[str],
    openings: Sequence[str],
    tokens: int,
    description: str,
) -> list[str]:
    """Greedy replies, what follows each opening; at least ``JUDGED_TOKENS`` of each.

    Cut off early a refusal could not be told from an answer, so more is read than is learnt.
    """
    renderer = Renderer(loaded)
    texts = [
        renderer.text(Conversation.build(request)) + opening
        for request, opening in zip(requests, openings, strict=True)
    ]
    tokens = max(tokens, JUDGED_TOKENS)
    return complete(renderer, texts, max_new_tokens=tokens, description=description)
