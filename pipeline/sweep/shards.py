"""A sweep in parts that know nothing of each other, such as the tasks of a cluster's job array.

``sweep CONFIG --shard i/n`` does the cells whose ids fall to the i-th of n shards, in a run folder
of its own: their prompts, and the replies to them. A cell's id is a hash of all that it depends on,
so shards are disjoint and together whole, whoever computes them. ``merge`` joins the folders
(``pipeline/merge.py``). The same sweep without a shard then does what is for all cells together:
plain requests of imported prompts, directions, plane, matrix.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from core.errors import AttackPlaneError
from core.files import read_object, write_atomically
from core.records import content_hash

FILE = "shard.json"


class Holds(Protocol):
    """A choice of cells by their ids."""

    def holds(self, cell: str) -> bool: ...


@dataclass(frozen=True)
class Shard:
    """The ``number``-th, from 1, of ``of`` shards."""

    number: int
    of: int

    def holds(self, cell: str) -> bool:
        """Whether the cell of this id falls to this shard."""
        return int(content_hash(cell, 8), 16) % self.of == self.number - 1

    def folder(self, run: str) -> str:
        """The run folder of this shard."""
        return f"{run.rstrip('/')}-shard-{self.number}-of-{self.of}"

    def mark(self, folder: Path) -> None:
        """Write into a run folder which shard it is."""
        write_atomically(folder / FILE, json.dumps(asdict(self)) + "\n")


def parse_shard(text: str) -> Shard:
    """``2/7`` is the second of seven.

    Raises:
        AttackPlaneError: anything else.
    """
    number, slash, of = text.partition("/")
    whole = number.isdecimal() and of.isdecimal() and len(text) < 14
    if slash and whole and 1 <= int(number) <= int(of) < 10**6:
        return Shard(int(number), int(of))
    raise AttackPlaneError(
        "not a shard",
        where="--shard",
        got=text[:60],
        remedy="write i/n with i from 1 to n, such as 2/7, and n below a million",
    )


def shard_of(folder: Path) -> Shard | None:
    """Which shard a run folder is; None for a whole run."""
    if not (folder / FILE).exists():
        return None
    row = read_object(folder / FILE, "the mark of a shard")
    try:
        return parse_shard(f"{row['number']}/{row['of']}")
    except KeyError as error:
        raise AttackPlaneError("not the mark of a shard", where=folder / FILE, got=row) from error
