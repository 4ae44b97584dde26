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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core.errors import AttackPlaneError
from core.generate import complete
from core.models import LoadedModel
from core.prompt import Conversation, Renderer
from core.records import (
    HARMFUL,
    HARMLESS,
    LABELS,
    PSEUDO_HARMFUL,
    Behaviour,
    content_hash,
)
from core.rows import Row
from core.store import RunFolder
from evaluation.behaviour_rows import read_csv, read_jsonl
from evaluation.behaviours import decoded, load_behaviours, open_hub_set
from evaluation.judges.reply_rules import is_refusal
from evaluation.refusals import refusal_replies
from training.examples import Example, make_example

log = logging.getLogger(__name__)

REPLIES = "replies.jsonl"
HUB_REPLIES = {"ultrachat": ("HuggingFaceH4/ultrachat_200k", None, "train_sft[:20000]")}
"""Hub sets of conversations: path, config and split. 500 updates of 16 see 8,000 of them."""
JUDGED_TOKENS = 32
"""Of a reply, enough to see whether it refuses."""
OPENING = "Sure, here is"
"""What an ordinary request is answered with in the model's name where the model itself refuses."""


@dataclass(frozen=True)
class Requests:
    """Requests to train on, by label.

    Attributes:
        replies: those of a file, by request.
        validation: requests of the split validation, on which thresholds are chosen.
    """

    harmful: tuple[Behaviour, ...] = ()
    harmless: tuple[Behaviour, ...] = ()
    pseudo_harmful: tuple[Behaviour, ...] = ()
    replies: Mapping[str, str] = field(default_factory=dict)
    validation: tuple[Behaviour, ...] = ()

    def settings(self, needs: Sequence[str], validates: bool = False) -> Row:
        """What of it belongs to a training's settings."""
        row: Row = {}
        for label in LABELS:
            if label in needs:
                own = [[b.request, b.target_string] for b in getattr(self, label)]
                row[label] = {"count": len(own), "hash": content_hash(own)}
        if validates:
            row["validation"] = content_hash([b.request for b in self.validation])
        if self.replies:
            row["replies"] = content_hash(sorted(self.replies.items()))
        return row

    def texts(self, needs: Sequence[str], validates: bool = False) -> list[str]:
        """The requests themselves."""
        chosen = [label for label in LABELS if label in needs]
        trained = [b.request for label in chosen for b in getattr(self, label)]
        return trained + [b.request for b in self.validation if validates]


def requests_of(
    behaviours: str, needs: Sequence[str], replies: str | None = None, *, where: str = "train"
) -> Requests:
    """The training split of a behaviour set, or of a file (all of it where it has no splits).

    Args:
        needs: the labels that the arm trains on; the set must have harmful and ordinary ones where
            they are needed.
        replies: a CSV or JSON lines file with ``request`` and ``reply``, or one of
            ``HUB_REPLIES``. Its requests take the place of the set's harmless and pseudo-harmful
            ones.
    """
    rows = load_behaviours(behaviours)
    validation = tuple(b for b in rows if b.split == "validation" and b.label in needs)
    rows = [b for b in rows if b.split == "train"] if any(b.split for b in rows) else rows
    chosen = {name: [b for b in rows if b.label == name] for name in needs}
    given: dict[str, str] = {}
    if replies:
        given = hub_replies(replies) if replies in HUB_REPLIES else read_replies(Path(replies))
    if given:
        chosen[HARMLESS] = [
            Behaviour(f"reply-{n}", request, None, "reply", HARMLESS, str(replies))
            for n, request in enumerate(given, start=1)
        ]
        chosen[PSEUDO_HARMFUL] = []
    lacking = [name for name in (HARMFUL, HARMLESS) if name in needs and not chosen[name]]
    if HARMLESS in lacking and chosen.get(PSEUDO_HARMFUL):
        lacking.remove(HARMLESS)
    if lacking:
        counts = ", ".join(f"{len(b)} {name}" for name, b in chosen.items())
        raise AttackPlaneError(
            f"this training needs {' and '.join(lacking)} requests",
            where=f"{where}, {behaviours}",
            got=counts,
            remedy="give a set with those labels and, if it has splits, a split train",
        )
    harmful, harmless, pseudo = (tuple(chosen.get(name, ())) for name in LABELS)
    return Requests(harmful, harmless, pseudo, given, validation)


def hub_replies(name: str) -> dict[str, str]:
    """First request -> first reply of the conversations of a hub set, each request once.

    Raises:
        AttackPlaneError: the package ``datasets`` is missing, or the set cannot be loaded.
    """
    table = open_hub_set(name, *HUB_REPLIES[name])
    replies: dict[str, str] = {}
    for row in table:
        turns = [turn["content"].strip() for turn in row["messages"][:2]]
        if len(turns) == 2 and all(turns):
            replies.setdefault(*turns)
    return replies


def read_replies(path: Path) -> dict[str, str]:
    """Request -> reply of a file.

    Raises:
        AttackPlaneError: another kind of file, a row without request or reply, a request twice.
    """
    reader = read_csv if path.suffix == ".csv" else read_jsonl
    rows = reader(decoded(path), path) if path.is_file() else []
    if not rows:
        raise AttackPlaneError(
            "cannot read the replies",
            where=path,
            got="no rows" if path.is_file() else "no such file",
            remedy="a CSV or JSON lines file",
        )
    replies: dict[str, str] = {}
    for number, (_, row) in enumerate(rows, start=1):
        request, reply = row.get("request"), row.get("reply")
        wrong = not all(isinstance(t, str) and t.strip() for t in (request, reply))
        if wrong or request in replies:
            raise AttackPlaneError(
                "not a request with its reply" if wrong else "a request stands there twice",
                where=f"{path}, row {number}",
                got=str(row)[:80],
                remedy="every row needs the texts request and reply, and every request one reply",
            )
        replies[str(request)] = str(reply)
    return replies


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

    def ordinary(self, *labels: str) -> list[Example]:
        """Harmless and pseudo-harmful requests with ordinary replies."""
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
        return fitting

    def _fitting(self, rows: Sequence[Example]) -> list[Example]:
        return [row.cut(self._longest) for row in rows if row.reply_start < self._longest]

    def opened(self) -> list[Example]:
        """Ordinary requests, and what the base says after the opening of harmful continuations.

        Without them an arm takes that opening for the mark of harm. Refusals are left out."""
        asked = (*self.requests.harmless, *self.requests.pseudo_harmful)
        chosen = [b.request for b in asked if b.request not in self.requests.replies]
        made = self._made("opened", chosen, [OPENING] * len(chosen))
        rows = [
            make_example(self.renderer, request, reply, ended=ended)
            for request, (reply, ended) in zip(chosen, made, strict=True)
            if _complies(reply, OPENING)
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
        for i, (b, opening, (reply, ended)) in enumerate(zip(chosen, openings, made, strict=True)):
            if _complies(reply, opening):
                examples[i] = self.example(b.request, reply, ended=ended)
        if refused := len(chosen) - len(examples):
            log.warning("%d of %d continuations refuse: left out", refused, len(chosen))
        return examples

    def _made(
        self, kind: str, requests: Sequence[str], openings: Sequence[str] = ()
    ) -> list[tuple[str, bool]]:
        """Replies of the base, from the folder where it has them."""
        key = content_hash([kind, list(requests), list(openings), self._tokens])
        kept = [row for row in self._folder.rows(REPLIES) if row["key"] == key]
        if not kept and requests:
            if openings:
                made = continued(self.base, requests, openings, self._tokens)
            else:
                made = own_replies(self.base, requests, self._tokens)
            replies = [[reply, ended] for reply, ended in made]
            kept = [{"key": key, "kind": kind, "requests": list(requests), "replies": replies}]
            self._folder.append(REPLIES, kept[0])
        return [(reply, ended) for reply, ended in kept[0]["replies"]] if kept else []


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
    """Each opening and the first ``tokens`` tokens of what the model says after it."""
    replies = _greedy(loaded, requests, openings, tokens, "continuations")
    return [
        (f"{opening} {reply}".strip(), ended)
        for opening, (reply, ended) in zip(openings, _cut(loaded, replies, tokens), strict=True)
    ]


def _complies(reply: str, opening: str) -> bool:
    return not is_refusal(reply) and not is_refusal(reply.removeprefix(opening))


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
