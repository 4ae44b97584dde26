"""What a reader of another tool's file gives: prompts, and rejected rows with place and reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import AttackPlaneError
from core.files import json_once
from core.rows import Row

DEEPEST = 100
"""Levels of a JSON document; no prompt of another tool lies deeper than six."""


def texts(value: object) -> list[str]:
    """A list of texts.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"no list of texts: {str(value)[:60]}")
    return value


@dataclass(frozen=True)
class Foreign:
    """One prompt of another tool.

    ``place`` is a line, or an item of a JSON document. ``said`` is what the tool said of the
    prompt.
    """

    place: str
    prompt: str
    request: str | None = None
    behaviour_id: str | None = None
    target_string: str | None = None
    category: str = ""
    attack: str | None = None
    model: str | None = None
    system: str | None = None
    suffix: str | None = None
    loss: float | None = None
    losses: list[float] = field(default_factory=list)
    best_step: int | None = None
    prompt_ids: list[int] | None = None
    variant: str | None = None
    faults: list[str] = field(default_factory=list)
    said: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Reject:
    """A row that gives no artifact: where and why.

    ``kind`` is ``bad`` (malformed) or ``no_prompt`` (the tool found none).
    """

    place: str
    reason: str
    kind: str = "bad"


Found = Iterator[Foreign | Reject]


@dataclass(frozen=True)
class Hints:
    """What a file does not say and the user does.

    ``request`` is the prompt that nanogcg's string belongs to. ``columns``: field -> the file's own
    name for it, in tables.
    """

    request: str | None = None
    model: str | None = None
    attack: str | None = None
    target_string: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


def check_encoding(path: Path) -> None:
    """Refuse a file that is not UTF-8 from its first bytes on."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise AttackPlaneError(
            "the file is UTF-16",
            where=path,
            got=f"it begins with {start[:2]!r}",
            remedy="save it as UTF-8",
        )


def json_lines(path: Path) -> Iterator[tuple[str, Row | Reject]]:
    """(place, object or reject) of each line that is not empty, one line in memory at a time."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            place = f"line {number}"
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if not raw.strip():
                continue
            try:
                row = json_once(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                bad = error.object[error.start]
                yield (
                    place,
                    Reject(place, f"not UTF-8: byte 0x{bad:02x} at byte {error.start} of the line"),
                )
                continue
            except ValueError as error:
                yield place, Reject(place, f"not JSON: {error}")
                continue
            yield (
                place,
                row
                if isinstance(row, dict)
                else Reject(place, f"a {type(row).__name__}, not an object"),
            )


def _not_too_deep(events: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """These events of a JSON document. Each level keeps its whole path in memory."""
    import ijson

    depth = 0
    for event in events:
        depth += event[0].startswith("start_") - event[0].startswith("end_")
        if depth > DEEPEST:
            raise ijson.JSONError(f"more than {DEEPEST} levels deep")
        yield event


def json_items(path: Path, prefix: str, *, pairs: bool = False) -> Iterator[tuple[str, Any]]:
    """(place, value or reject) of each item of a JSON document under ``prefix``, streamed; with
    ``pairs`` (key, value) items.

    A document that breaks off is read up to there; what follows is one reject.
    """
    import ijson

    number = 0
    with open(path, "rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":
            file.seek(0)
        read = ijson.kvitems if pairs else ijson.items
        events = _not_too_deep(ijson.basic_parse(file, use_float=True))
        try:
            for number, item in enumerate(read(ijson.parse(events), prefix), start=1):
                yield f"item {number}", item
        except (ijson.JSONError, UnicodeDecodeError) as error:
            place = f"after item {number}"
            yield (
                place,
                Reject(place, f"the rest cannot be read: {' '.join(str(error).split())[:120]}"),
            )
