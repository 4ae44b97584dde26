"""Rows of a run folder as records, and what several stages ask of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from core.errors import AttackPlaneError
from core.files import write_atomically
from core.records import AttackArtifact, Record, Replay
from core.rows import Row
from core.specs import parse_spec
from core.store import ATTACKS, REPLAYS, RunFolder

Kind = TypeVar("Kind", bound=Record)


def artifacts_of(run: RunFolder) -> list[AttackArtifact]:
    """The run's prompts.

    Raises:
        AttackPlaneError: a row that is none (its line is named), or two rows of one id.
    """
    return _records(run, ATTACKS, AttackArtifact, lambda a: a.artifact_id)


def replays_of(run: RunFolder) -> list[Replay]:
    """The run's replies.

    Raises:
        AttackPlaneError: a row that is none (its line is named), or two rows of one id.
    """
    return _records(run, REPLAYS, Replay, lambda r: r.replay_id)


def _records(
    run: RunFolder, name: str, cls: type[Kind], id_of: Callable[[Kind], str]
) -> list[Kind]:
    records, lines = [], dict[str, int]()
    for line, row in enumerate(run.rows(name), start=1):
        where = f"{run.path / name}, line {line}"
        record = cls.from_row(row, where)
        before = lines.setdefault(id_of(record), line)
        if before != line:
            raise AttackPlaneError(
                f"the same id as line {before}",
                where=where,
                got=id_of(record),
                remedy="remove one of the two lines",
            )
        records.append(record)
    return records


def check_specs(specs: Sequence[str]) -> None:
    """Refuse a mistyped spec before hours of work on the others."""
    for spec in specs:
        parse_spec(spec)


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    """Write JSON lines in place of an earlier file."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path
