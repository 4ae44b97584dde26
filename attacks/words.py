"""The sentences and words of a prompt, which AutoDAN's two levels work on.

These are plain functions of a text and a random generator. A prompt template holds the marker
``{request}`` once. The marker is never split, swapped or lost.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from core.errors import AttackPlaneError
from core.files import MOST, json_once, require_regular
from core.text import is_text

MARKER = "{request}"
WORD = re.compile(r"[A-Za-z]+(?:-[A-Za-z]+)*")
PARTS = re.compile(r"(\{request\})|([A-Za-z]+(?:-[A-Za-z]+)*)")
DATA = Path(__file__).parent / "data"
STOP_WORDS = frozenset(
    re.findall(
        "[a-z]+",
        "a about an and any are as at be been but by can do does down for from had has have he "
        "her here his how i if in into is "
        "it its me my no nor of off on once or our out over own she so some such than that the "
        "their them then there these they "
        "this those through to too under until up very was we were what when where which while "
        "who whom why will with you your",
    )
)


@cache
def synonyms() -> dict[str, tuple[str, ...]]:
    """Lower-case word -> the other words of its groups in ``data/synonyms.txt``."""
    groups: dict[str, list[str]] = {}
    for line in (DATA / "synonyms.txt").read_text(encoding="utf-8").splitlines():
        group = [] if line.startswith("#") else line.split()
        for word in group:
            known = groups.setdefault(word, [])
            known += [other for other in group if other != word and other not in known]
    return {word: tuple(others) for word, others in groups.items()}


def read_seeds(path: Path | None = None) -> dict[str, str]:
    """Seed prompts by name: our own, or those of a file of JSON lines ``{"name", "text"}``.

    ``[REPLACE]`` is read as the marker.

    Raises:
        AttackPlaneError: a line is no such object, a name comes twice, or a text has no marker. The
            error names the line.
    """
    path = path or DATA / "seeds.jsonl"
    texts: dict[str, str] = {}
    require_regular(path, MOST)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise AttackPlaneError("cannot read the seeds", where=path, got=error) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json_once(line)
            name, text = row["name"], row["text"].replace("[REPLACE]", MARKER)
            if not isinstance(name, str) or not is_text(name, text):
                raise TypeError("name and text are no Unicode text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            fault: object = f"{type(error).__name__}: {error}"
        else:
            fault = f"the name {name!r} again" if name in texts else None
            if text.count(MARKER) != 1:
                fault = f"{text.count(MARKER)} times {MARKER}"
        if fault:
            raise AttackPlaneError(
                "not a seed",
                where=f"{path}, line {number}",
                got=fault,
                remedy=(
                    f'each line is {{"name": ..., "text": ...}} and the text holds {MARKER} once'
                ),
            )
        texts[name] = text.strip()
    if not texts:
        raise AttackPlaneError("no seeds", where=path)
    return texts


def sentences(text: str) -> list[str]:
    """Sentences, each with the white space before it, so that joining them gives the text."""
    return [s for s in re.split(r"(?<=[.!?:])(?=\s)", text) if s]


def with_one_marker(text: str) -> str:
    """The text with its first marker only, or with one added at the end."""
    head, marker, rest = text.partition(MARKER)
    return (
        head + marker + rest.replace(MARKER, "") if marker else f"{text.rstrip()}\n\n{MARKER}"
    ).strip()


def crossover(first: str, second: str, points: int, rng: random.Random) -> tuple[str, str]:
    """Multi-point crossover of sentences [AutoDAN, algorithm 7].

    Between the cut points, coin flips decide whether the two texts swap their sentences.
    """
    a, b = sentences(first), sentences(second)
    most = min(len(a), len(b)) - 1
    cuts = sorted(rng.sample(range(1, most + 1), min(points, most))) if most > 0 else []
    children: tuple[list[str], list[str]] = ([], [])
    for start, stop in zip([0, *cuts], [*cuts, None], strict=True):
        parts = [a[start:stop], b[start:stop]]
        if rng.random() < 0.5:
            parts.reverse()
        for child, part in zip(children, parts, strict=True):
            child += part
    return with_one_marker("".join(children[0])), with_one_marker("".join(children[1]))


def like(word: str, other: str) -> str:
    """``other``, written in upper or lower case as ``word`` is."""
    if word.isupper() and len(word) > 1:
        return other.upper()
    return other.capitalize() if word[:1].isupper() else other


def paraphrase(text: str, rng: random.Random, share: float = 0.25) -> str:
    """Replaces about ``share`` of the words that have synonyms: mutation without a second model."""

    def swap(match: re.Match[str]) -> str:
        others = synonyms().get(match.group().lower(), ())
        if (
            match.group(1)
            or not others
            or match.group().lower() in STOP_WORDS
            or rng.random() >= share
        ):
            return match.group()
        return like(match.group(), rng.choice(others))

    return PARTS.sub(swap, text)


def update_dictionary(
    dictionary: dict[str, float], texts: Sequence[str], scores: Sequence[float], top: int | None
) -> dict[str, float]:
    """AutoDAN's momentum dictionary, best word first.

    A word's score is the mean over the texts that hold it, averaged with its old score.
    """
    scores_of: dict[str, list[float]] = {}
    for text, score in zip(texts, scores, strict=True):
        words = {w.lower() for w in WORD.findall(text.replace(MARKER, " "))} - STOP_WORDS
        for word in sorted(words):
            scores_of.setdefault(word, []).append(score)
    merged = dict(dictionary)
    for word, values in scores_of.items():
        mean = sum(values) / len(values)
        merged[word] = (merged[word] + mean) / 2 if word in merged else mean
    return dict(sorted(merged.items(), key=lambda item: -item[1])[:top])


def swap_words(
    text: str, dictionary: dict[str, float], rng: random.Random, *, probability: float, most: int
) -> str:
    """AutoDAN's word level: up to ``most`` words a paragraph are replaced by synonyms, or kept.

    A roulette decides. The candidates are the word itself and its synonyms. A candidate's weight is
    its score in the dictionary less the lowest score among the candidates. With ``probability`` a
    candidate that the dictionary does not know gets that lowest score, so that words known to be
    good are preferred. Otherwise it gets 0. Scores are negative losses, so 0 is above all of them,
    and new words are tried. Equal scores change nothing. This is how the authors' code does it.
    """
    lowest = min(dictionary.values(), default=0.0)
    paragraphs = []
    for paragraph in text.split("\n\n"):
        swaps = 0

        def swap(match: re.Match[str]) -> str:
            nonlocal swaps
            word = match.group().lower()
            others = synonyms().get(word, ())
            if match.group(1) or swaps >= most or not others or word in STOP_WORDS:
                return match.group()
            unknown = lowest if rng.random() < probability else 0.0
            candidates = (word, *others)
            scores = [dictionary.get(candidate, unknown) for candidate in candidates]
            weights = [score - min(scores) for score in scores]
            if not any(weights):
                return match.group()
            swaps += 1
            return like(match.group(), rng.choices(candidates, weights)[0])

        paragraphs.append(PARTS.sub(swap, paragraph))
    return "\n\n".join(paragraphs)
