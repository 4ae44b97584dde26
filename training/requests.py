"""Requests to train on, and given replies: from the built-in set, from files, or from the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core.errors import AttackPlaneError
from core.records import HARMFUL, HARMLESS, LABELS, PSEUDO_HARMFUL, Behaviour, content_hash
from core.rows import Row
from core.text import is_text
from evaluation.behaviour_rows import read_csv, read_jsonl
from evaluation.behaviours import decoded, load_behaviours, open_hub_set

HUB_REPLIES = {"ultrachat": ("HuggingFaceH4/ultrachat_200k", None, "train_sft[:20000]")}
"""Hub sets of conversations: path, config and split. 500 updates of 16 see 8,000 of them."""


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
        pair = (request, reply)
        wrong = not all(isinstance(t, str) and t.strip() and is_text(t) for t in pair)
        if wrong or request in replies:
            raise AttackPlaneError(
                "not a request with its reply" if wrong else "a request stands there twice",
                where=f"{path}, row {number}",
                got=str(row)[:80],
                remedy="every row needs the texts request and reply, and every request one reply",
            )
        replies[str(request)] = str(reply)
    return replies
