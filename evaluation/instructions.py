"""Verifiable instructions: 120 short tasks of our own, each with an answer that a rule can check.

Copying, formats, counting, simple arithmetic and short facts, easy enough for a small model. A
score is the share of replies that pass. It says whether a model can still do as it is told, and
nothing about how well it writes.

    contains   one of the texts stands in the reply, as whole words
    equals     the reply is one of the texts, whatever its case, quotes and last full stop
    starts, ends, all          the reply begins or ends with a text, or holds all of them
    upper, lower               every letter is of this case
    bullets, numbered          exactly so many items of that form
    json       the reply parses to this object
    sequence   its numbers are these, in this order
    number     the last number in its first sentence that has one is this
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "data" / "instructions.jsonl"
PROSE = Path(__file__).parent / "data" / "prose.txt"
NEEDS_END = ("equals", "ends", "bullets", "numbered", "json", "sequence")
NAMES = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
WORDS = {name: number for number, name in enumerate(NAMES)}


@dataclass(frozen=True)
class Instruction:
    """One task. ``kind`` is copy, format, count, arithmetic or fact."""

    id: str
    kind: str
    instruction: str
    check: str
    value: Any

    def passed(self, reply: str, *, cut: bool = False) -> bool:
        """Whether a reply passes. One that was cut off fails where its end matters."""
        if cut and self.check in NEEDS_END:
            return False
        return CHECKS[self.check](reply.strip(), self.value)


@cache
def instructions() -> tuple[Instruction, ...]:
    lines = FILE.read_text(encoding="utf-8").splitlines()
    return tuple(Instruction(**json.loads(line)) for line in lines)


@cache
def paragraphs() -> tuple[str, ...]:
    """Everyday prose of our own, for perplexity."""
    return tuple(PROSE.read_text(encoding="utf-8").strip().split("\n\n"))


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip("\"'.!*` ")


def _holds(reply: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(_plain(text))}(?!\w)", _plain(reply)) is not None


def _letters(reply: str) -> str:
    return "".join(c for c in reply if c.isalpha())


def _items(reply: str, pattern: str) -> int:
    return sum(bool(re.match(pattern, line.strip())) for line in reply.splitlines())


def _parsed(reply: str, value: Any) -> bool:
    try:
        return bool(json.loads(re.sub(r"^```(?:json)?|```$", "", reply).strip()) == value)
    except ValueError:
        return False


def _numbers(text: str) -> list[int]:
    found = re.findall(r"\d+|[a-z]+", text.lower().replace(",", " "))
    return [int(t) if t.isdigit() else WORDS[t] for t in found if t.isdigit() or t in WORDS]


def _answer(reply: str, value: int) -> bool:
    for sentence in re.split(r"(?<=[.!?])\s|\n", reply):
        if numbers := _numbers(sentence):
            return numbers[-1] == value
    return False


CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "contains": lambda reply, value: any(_holds(reply, text) for text in value),
    "equals": lambda reply, value: _plain(reply) in map(_plain, value),
    "starts": lambda reply, value: any(_plain(reply).startswith(_plain(t)) for t in value),
    "ends": lambda reply, value: any(_plain(reply).endswith(_plain(t)) for t in value),
    "all": lambda reply, value: all(_holds(reply, text) for text in value),
    "upper": lambda reply, _: len(_letters(reply)) > 4 and _letters(reply).isupper(),
    "lower": lambda reply, _: len(_letters(reply)) > 4 and _letters(reply).islower(),
    "bullets": lambda reply, value: _items(reply, r"[-\u2013*\u2022]\s*\w") == value,
    "numbered": lambda reply, value: _items(reply, r"\d+[.)]\s*\S") == value,
    "json": _parsed,
    "sequence": lambda reply, value: _numbers(reply) == value,
    "number": _answer,
}
