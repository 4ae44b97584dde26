"""Our own refusals, which training, carriers and the response side share."""

from __future__ import annotations

from pathlib import Path


def refusal_replies() -> list[str]:
    """Whole refusals, a few sentences each."""
    path = Path(__file__).parent / "data" / "refusals.txt"
    return path.read_text(encoding="utf-8").strip().splitlines()


def refusal_openings(n: int) -> list[str]:
    """The first sentences of the first ``n`` refusals."""
    return [line.partition(".")[0] + "." for line in refusal_replies()[:n]]
