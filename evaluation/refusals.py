"""Texts that refuse and texts that comply: for training, for carriers, and for outcome D.

Half of the refusals are used in training. The other half are kept out of all training, so that a
model can be asked whether it refuses or merely repeats what it was taught.
"""

from __future__ import annotations

from pathlib import Path

TRAINED, HELD_OUT = "refusals.txt", "refusals_held_out.txt"

REFUSAL_OPENINGS = (
    "I'm sorry, but I can't help",
    "I cannot assist with that",
    "I apologise, but this is not something",
    "No, I will not",
)
"""Openings of replies that refuse. The last two are in no training text."""
COMPLIANCE_OPENINGS = (
    "Sure, here is",
    "Of course. Here are",
    "To do this, you can",
    "The first step is to",
)
"""Openings of replies that comply."""


def _lines(name: str) -> list[str]:
    path = Path(__file__).parent / "data" / name
    return path.read_text(encoding="utf-8").strip().splitlines()


def refusal_replies() -> list[str]:
    """Whole refusals that training may use, one to a few sentences each."""
    return _lines(TRAINED)


def held_out_refusals() -> list[str]:
    """Whole refusals that no training uses."""
    return _lines(HELD_OUT)


def refusal_openings(n: int) -> list[str]:
    """The first sentences of ``n`` refusals that training may use."""
    return [line.partition(".")[0] + "." for line in refusal_replies()[:n]]
