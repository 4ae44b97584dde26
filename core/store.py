"""A run folder: a manifest, append-only JSON lines, small state files.

Every row is one line, flushed and synced to disk before the next is begun, so a killed run loses at
most the row in flight. A torn last line is dropped with a warning and its row is made anew. Row ids
are hashes of what the row was made from, so a repeated command does only what is missing. The
manifest keeps the settings of each stage; the same stage with other settings in the same folder is
refused, naming the difference.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

import jsonlines
from filelock import FileLock, Timeout

from core.errors import AttackPlaneError
from core.files import (
    MEND,
    clear_leftovers,
    each_row,
    mend_last_line,
    read_object,
    read_rows,
    refuse_link,
    write_atomically,
)
from core.manifest import environment_versions, read_manifest
from core.records import SCHEMA_VERSION, Behaviour, Record, content_hash
from core.rows import Row
from core.typed import checked_row

log = logging.getLogger(__name__)
Kind = TypeVar("Kind", bound=Record)

ATTACKS = "attacks.jsonl"
REPLAYS = "replays.jsonl"
BEHAVIOURS = "behaviours.jsonl"
PLANE = "plane.jsonl"
FAILURES = "failures.jsonl"
CLASSES = "plane_classes.jsonl"
SEAL = "seal"
"""The key of the hash of what else stands in an object."""


def sealed(row: Row) -> Row:
    """An object with a hash of itself, so that a change of what it holds is seen."""
    row = json.loads(json.dumps(row))  # tuples become lists, as they will be read
    return row | {SEAL: content_hash(row)}


def intact(row: Row) -> bool:
    """Whether a sealed object is what was written."""
    rest = {name: value for name, value in row.items() if name != SEAL}
    return row.get(SEAL) == content_hash(rest)


class RunFolder:
    """A run folder on disk. Use as a context manager to write: that takes the folder's lock.

    >>> with RunFolder("runs/x") as run:           # doctest: +SKIP
    ...     run.begin_stage("gcg", {"num_steps": 500}, {"embedded": "b179..."})
    ...     run.append("attacks.jsonl", artifact.to_row())
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = FileLock(str(self.path / ".lock"), timeout=0)
        self._mended: set[str] = set()

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """A folder that must already hold a run."""
        if not (Path(path) / "manifest.json").exists():
            raise AttackPlaneError(
                "no run here",
                where=path,
                got="no manifest.json",
                remedy="give the folder that an attack or the demo wrote, for example runs/demo",
            )
        return cls(path)

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            clear_leftovers(self.path)
        except Timeout as error:
            raise AttackPlaneError(
                "another process is writing to this run",
                where=self.path,
                remedy="wait for it, or use another run folder",
            ) from error
        except OSError as error:
            got = "a file" if self.path.is_file() else error
            raise AttackPlaneError(
                "cannot write a run there",
                where=self.path,
                got=got,
                remedy="name a folder that can be written, or one that does not exist yet",
            ) from error
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.release()

    # --- manifest ---------------------------------------------------------------------------------
    @property
    def manifest(self) -> Row:
        path = self.path / "manifest.json"
        if not path.exists():
            return {"schema_version": SCHEMA_VERSION, "stages": {}, "models": {}, "history": []}
        return read_manifest(path)

    def begin_stage(
        self,
        stage: str,
        settings: Row,
        models: dict[str, str],
        *,
        derived: bool = False,
        empty: Callable[[], bool] = lambda: False,
    ) -> str:
        """Record a stage's settings and the identities of its models; returns the settings' hash.

        Args:
            derived: what the stage writes is replaced whole each time, so its settings may change.
            empty: whether the run holds nothing yet that was made with its settings; then they may
                change too. Asked where they differ.

        Raises:
            AttackPlaneError: the folder holds the same stage with other settings, or another model
            under the same
                spec; the message names each difference.
        """
        settings = json.loads(json.dumps(settings))
        manifest = self.manifest
        before = manifest["stages"].get(stage)
        differences = []
        if before is not None and before != settings and not derived and not empty():
            for key in sorted(before | settings):
                if before.get(key) != settings.get(key):
                    differences.append(
                        f"{stage}.{key}: the run has {_short(before.get(key))}, "
                        f"this command {_short(settings.get(key))}"
                    )
        for spec, fingerprint in models.items():
            known = manifest["models"].get(spec, fingerprint)
            if known != fingerprint:
                differences.append(
                    f"model {spec}: other files or precision ({known} in the run, now "
                    f"{fingerprint})"
                )
        if differences:
            raise AttackPlaneError(
                "this run was made with another configuration",
                where=self.path,
                got="; ".join(differences),
                remedy="repeat the command with the run's settings, or choose another run folder",
            )
        environment = environment_versions()
        if not manifest["history"] or manifest["history"][-1] != environment:
            if manifest["history"]:
                log.warning("%s: continued with other versions than it was begun with", self.path)
            manifest["history"].append(environment)
        manifest["stages"][stage] = settings
        manifest["models"].update(models)
        write_atomically(self.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        return content_hash(settings)

    # --- rows -------------------------------------------------------------------------------------
    def rows(self, name: str) -> list[Row]:
        return read_rows(self.path / name, repair=self._lock.is_locked)

    def records(self, name: str, cls: type[Kind], id_of: Callable[[Kind], str]) -> list[Kind]:
        """The rows of a file as records; see ``each_record``."""
        return list(self.each_record(name, cls, id_of))

    def each_record(
        self, name: str, cls: type[Kind], id_of: Callable[[Kind], str]
    ) -> Iterator[Kind]:
        """The rows of a file as records, one after another.

        Raises:
            AttackPlaneError: a row that is none (its line is named), or two rows of one id.
        """
        seen: set[int] = set()  # hashes, since a million ids take twice the memory
        for line, row in self.each_row(name):
            where = f"{self.path / name}, line {line}"
            record = cls.from_row(row, where)
            own = id_of(record)
            if hash(own) in seen:
                earlier = ((n, id_of(cls.from_row(r, where))) for n, r in self.each_row(name))
                before = next(n for n, found in earlier if n == line or found == own)
                if before < line:
                    raise AttackPlaneError(
                        f"the same id as line {before}",
                        where=where,
                        got=own,
                        remedy="remove one of the two lines",
                    )
            seen.add(hash(own))
            yield record

    def each_id(self, name: str, key: str) -> Iterator[str]:
        """The id of each row, without holding the rows."""
        for line, row in self.each_row(name):
            yield id_in(row, key, f"{self.path / name}, line {line}")

    def each_row(self, name: str) -> Iterator[tuple[int, Row]]:
        """(line, row) of a file, one after another."""
        return each_row(self.path / name, repair=self._lock.is_locked)

    def lacks(self, name: str) -> bool:
        """Whether a file has no row."""
        return next(self.each_row(name), None) is None

    def checked(self, name: str, kind: Any, remedy: str) -> Iterator[Row]:
        """The rows of a file against a ``TypedDict``, and against their seals where they have one.

        Raises:
            AttackPlaneError: a row that does not fit, or was changed; its line is named.
        """
        for line, row in self.each_row(name):
            where = f"{self.path / name}, line {line}"
            if SEAL in row and not intact(row):
                what = "a row was changed after it was written"
                raise AttackPlaneError(what, where=where, remedy=remedy)
            yield checked_row(row, kind, where, remedy)

    @contextmanager
    def appending(self, name: str) -> Iterator[Callable[[Row], None]]:
        """Append many rows at once: synced to disk every thousand rows and at the end."""
        with self._at_end_of(name) as file:
            count = 0

            def add(row: Row) -> None:
                nonlocal count
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
                count += 1
                if count % 1000 == 0:
                    file.flush()
                    os.fsync(file.fileno())

            try:
                yield add
            finally:
                file.flush()
                os.fsync(file.fileno())
        if not count and (self.path / name).stat().st_size == 0:
            (self.path / name).unlink()

    def append(self, name: str, row: Row) -> None:
        """Append one row and sync it to disk."""
        with self._at_end_of(name) as file:
            with jsonlines.Writer(file, compact=True) as writer:
                writer.write(row)
            file.flush()
            os.fsync(file.fileno())

    def _at_end_of(self, name: str) -> TextIO:
        """The file, open at its end; before the first row a torn last line is cut."""
        path = self.path / name
        refuse_link(path)
        if name not in self._mended and path.exists():
            mend_last_line(path)
        self._mended.add(name)
        return open(path, "a", encoding="utf-8")

    def behaviours(self) -> dict[str, Behaviour]:
        """Behaviours that the run knows, by id."""
        found = self.records(BEHAVIOURS, Behaviour, lambda b: b.behaviour_id)
        return {b.behaviour_id: b for b in found}

    def note_behaviours(self, behaviours: Sequence[Behaviour]) -> None:
        """Keep behaviours with the run, each once.

        Raises:
            AttackPlaneError: an id that the run knows for another request, which results would be
            merged with.
        """
        known = self.behaviours()
        for behaviour in behaviours:
            before = known.get(behaviour.behaviour_id)
            if before is None:
                self.append(BEHAVIOURS, behaviour.to_row())
            elif (before.request, before.label) != (behaviour.request, behaviour.label):
                raise AttackPlaneError(
                    f"the run knows the behaviour id {behaviour.behaviour_id!r} for another "
                    "request",
                    where=self.path / BEHAVIOURS,
                    got=(
                        f"{behaviour.label} {behaviour.request!r}, in the run {before.label} "
                        f"{before.request!r}"
                    ),
                    remedy="use another run folder, or give the behaviours other ids",
                )

    # --- small states of work in progress ---------------------------------------------------------
    def _state_path(self, name: str) -> Path:
        return self.path / "state" / f"{name}.json"

    def save_state(self, name: str, state: Row) -> None:
        write_atomically(self._state_path(name), json.dumps(sealed(state)))

    def load_state(self, name: str) -> Row | None:
        path = self._state_path(name)
        if not path.exists():
            return None
        remedy = "remove the file; that piece of work begins anew"
        what = "the state of work in progress"
        state = read_object(path, what, remedy=remedy)
        if not intact(state):
            got = "changed after it was written, or of another version"
            raise AttackPlaneError(f"not {what}", where=path, got=got, remedy=remedy)
        return {name: value for name, value in state.items() if name != SEAL}

    def drop_state(self, name: str) -> None:
        self._state_path(name).unlink(missing_ok=True)


def id_in(row: Row, key: str, where: str) -> str:
    """The id of a row.

    Raises:
        AttackPlaneError: it has none.
    """
    name = row.get(key)
    if not isinstance(name, str) or not name:
        got = [*row] if key not in row else repr(name)
        raise AttackPlaneError(f"a row lacks its {key}", where=where, got=got, remedy=MEND)
    return name


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({content_hash(value, 8)})"
