"""Rows of a run folder as records, and what several stages ask of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

from annotated_types import Len
from typing_extensions import TypedDict

from core.files import write_atomically
from core.records import AttackArtifact, Replay
from core.rows import Row
from core.specs import parse_spec, require_weights
from core.store import ATTACKS, CLASSES, REPLAYS, RunFolder


def artifacts_of(run: RunFolder) -> list[AttackArtifact]:
    """The run's prompts.

    Raises:
        AttackPlaneError: a row that is none (its line is named), or two rows of one id.
    """
    return list(each_artifact(run))


def each_artifact(run: RunFolder) -> Iterator[AttackArtifact]:
    """The same one after another, for runs that are larger than the memory."""
    return run.each_record(ATTACKS, AttackArtifact, lambda a: a.artifact_id)


def replays_of(run: RunFolder) -> list[Replay]:
    """The run's replies.

    Raises:
        AttackPlaneError: a row that is none (its line is named), or two rows of one id.
    """
    return list(each_replay(run))


def first_replies(run: RunFolder) -> Iterator[Replay]:
    """One reply to each prompt: the first, where prompts have several."""
    return (r for r in each_replay(run) if r.sample == 0)


def each_replay(run: RunFolder) -> Iterator[Replay]:
    """The same one after another, for runs that are larger than the memory."""
    return run.each_record(REPLAYS, Replay, lambda r: r.replay_id)


def check_specs(specs: Sequence[str], *, served: bool = False) -> None:
    """Refuse a mistyped spec before hours of work on the others; served models only if allowed."""
    for spec in specs:
        parsed = parse_spec(spec)
        if not served:
            require_weights(parsed)


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    """Write JSON lines in place of an earlier file."""
    write_atomically(path, (json.dumps(row) + "\n" for row in rows))
    return path


Pair = Annotated[list[float], Len(2, 2)]
ClassRow = TypedDict(
    "ClassRow",
    {
        "target": str,
        "frame": str,
        "class": str,
        "kind": str,
        "n": int,
        "judged": int,
        "jailbroken": int,
        "centroid": Pair,
        "displacement": Pair | None,
        "displacement_interval": Annotated[list[Pair], Len(2, 2)] | None,
        "null_random": Pair | None,
        "null_permuted": Pair | None,
    },
)
"""What is printed of a class; the rows hold more."""


def classes_of(folder: Path) -> list[Row]:
    """The rows of ``plane_classes.jsonl``; none where there is no such file.

    Raises:
        AttackPlaneError: a row that is none.
    """
    return list(RunFolder(folder).checked(CLASSES, ClassRow, "make the plane anew, with plane"))
