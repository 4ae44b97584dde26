"""Files: written whole or not at all, never through a link; JSON lines read row by row."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from core.errors import AttackPlaneError
from core.rows import Row

log = logging.getLogger(__name__)

ANEW = "delete it; the same command makes it anew"
LONGEST = 255
"""Bytes of one part of a path."""
MOST = 64 * 2**20
"""Bytes of a JSON object, or of one line: a larger one is no settings file and no row."""
csv.field_size_limit(MOST)  # prompts are longer than the module's own limit
MEND = "mend or remove that line; what a command made, the same command makes anew"


def json_once(text: str) -> Any:
    """JSON of a user's file, in which no object says a key twice.

    Raises:
        ValueError: no JSON, a key that stands twice, or brackets that are nested too deeply.
    """

    def once(pairs: list[tuple[str, Any]]) -> Row:
        row = dict(pairs)
        if len(row) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {twice!r} stands twice in one object")
        return row

    return json_of(text, object_pairs_hook=once)


def json_of(text: str | bytes, **options: Any) -> Any:
    """JSON.

    Raises:
        ValueError: it is none, or too deep for Python's reader.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def refuse_twice(names: Sequence[str] | None, where: object) -> None:
    """Refuse a header that says a column twice: only one of the two would be read."""
    twice = {name for name in names or () if (names or ()).count(name) > 1}
    if twice:
        raise AttackPlaneError(
            "two columns of one name", where=where, got=", ".join(sorted(map(str, twice)))
        )


def require_regular(path: Path, most: int | None = None) -> None:
    """Only files are read: a pipe may never end, and a device never does.

    Args:
        most: bytes that it may have.

    Raises:
        AttackPlaneError: it is something else, is not there, or is too large.
    """
    if not path.exists():
        leads = "a symbolic link that leads to no file" if path.is_symlink() else None
        remedy = "name a file that is there"
        raise AttackPlaneError("no such file", where=path, got=leads, remedy=remedy)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        raise AttackPlaneError(
            "cannot read the file", where=path, got=kind, remedy="name a file on disk"
        )
    if most is not None and path.stat().st_size > most:
        raise AttackPlaneError(
            "the file is too large",
            where=path,
            got=f"{path.stat().st_size / 2**20:.0f} MiB, at most {most / 2**20:.0f}",
        )


def fault_of_path(path: Path) -> tuple[str, str] | None:
    """Why no disk takes a path, and the part of it that is at fault; None: one may."""
    if "\0" in str(path):
        return "no path holds a NUL", repr(str(path))[:100]
    for part in path.parts:
        if (size := len(part.encode())) > LONGEST:
            return (
                "a part of the path is too long",
                f"{size} bytes, at most {LONGEST}: {part[:40]}...",
            )
    return None


def require_possible(path: Path) -> None:
    """Refuse a path of a new folder that no disk takes, before hours of work are done for it.

    Raises:
        AttackPlaneError: a NUL in it, a part that is too long, or a file where a folder must be.
    """
    remedy = "name a folder that can be made"
    if fault := fault_of_path(path):
        raise AttackPlaneError(fault[0], got=fault[1], remedy=remedy)
    there = next((p for p in (path, *path.parents) if p.exists()), None)
    if there is not None and not there.is_dir():
        raise AttackPlaneError("a file is in the way", where=path, got=there, remedy=remedy)


def refuse_link(path: Path) -> None:
    """What is written must be the file that is named, not another one that it points to.

    Raises:
        AttackPlaneError: it is a symbolic link.
    """
    if path.is_symlink():
        raise AttackPlaneError(
            "a symbolic link stands where a file would be written",
            where=path,
            got=f"it points to {path.readlink()}",
            remedy="remove the link, or choose another folder; nothing was written",
        )


def write_atomically(path: Path, content: str | bytes | Iterable[str]) -> None:
    """Write ``path`` so that a reader finds the old content or the new, never a part of it.

    ``content`` may come in pieces, which are not held.

    Raises:
        AttackPlaneError: it is a symbolic link, or cannot be written.
    """
    refuse_link(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            for part in [content] if isinstance(content, str | bytes) else content:
                file.write(part.encode() if isinstance(part, str) else part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise AttackPlaneError("cannot write the file", where=path, got=error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_new(path: Path, content: str | bytes, *, apart_from: Path, force: bool) -> None:
    """Write a file that the user named.

    Args:
        apart_from: a run folder, which it must not lie in.
        force: whether a file that is there may be replaced.

    Raises:
        AttackPlaneError: it lies in the run, it is there already, or it is a symbolic link.
    """
    if path.resolve().is_relative_to(apart_from.resolve()):
        raise AttackPlaneError(
            "that file would lie in the run that is read",
            where=path,
            remedy="name a file outside of the run folder; nothing was written",
        )
    require_possible(path.parent)
    other = path.exists() and not path.is_file()
    if other or (path.exists() and not force):
        raise AttackPlaneError(
            "there is something of that name already",
            where=path,
            got="no plain file" if other else None,
            remedy="choose another name" + ("" if other else ", or give --force"),
        )
    write_atomically(path, content)


def read_object(path: Path, what: str, *, remedy: str | None = None) -> Row:
    """The JSON object of a file.

    Args:
        what: it should be, for the message.

    Raises:
        AttackPlaneError: no such file, or no JSON object.
    """
    require_regular(path, MOST)
    try:
        values = json_of(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AttackPlaneError(f"not {what}", where=path, got=error, remedy=remedy) from error
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise AttackPlaneError(f"not {what}", where=path, got=f"a {kind}, no object", remedy=remedy)
    return values


def read_rows(path: Path, *, repair: bool = False) -> list[Row]:
    """All rows of a JSON lines file; see ``each_row``."""
    return [row for _, row in each_row(path, repair=repair)]


def each_row(path: Path, *, repair: bool = False) -> Iterator[tuple[int, Row]]:
    """(line, row) of a JSON lines file, one after another; nothing if it does not exist.

    A last line without its newline that is no JSON is torn (the process died while writing it): it
    is left out with a warning and, with ``repair``, cut from the file. A bad line anywhere else is
    an error.
    """
    if not path.exists():
        return
    require_regular(path)
    if repair:
        mend_last_line(path)
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST + 1), b""), start=1):
            if len(line) > MOST:
                raise AttackPlaneError(
                    "a line is too long",
                    where=f"{path}, line {number}",
                    got=f"more than {MOST / 2**20:.0f} MiB",
                    remedy=MEND,
                )
            if not line.endswith(b"\n") and not is_row(line):
                _warn_of_torn(path, line)
            elif line.strip():
                yield number, row_of_line(line, f"{path}, line {number}")


def row_of_line(line: bytes, where: str) -> Row:
    try:
        row = json_of(line)
    except ValueError as error:
        raise AttackPlaneError(
            "a line is not JSON",
            where=where,
            got=f"{line[:80]!r} ({error})",
            remedy=MEND,
        ) from error
    if not isinstance(row, dict):
        raise AttackPlaneError(
            "a line is not a JSON object",
            where=where,
            got=repr(line[:80]),
            remedy=MEND,
        )
    return row


def is_row(line: bytes) -> bool:
    try:
        row_of_line(line, "")
    except AttackPlaneError:
        return False
    return True


def _warn_of_torn(path: Path, line: bytes) -> None:
    log.warning("%s: dropped a torn last line of %d bytes; its row is redone", path, len(line))


def mend_last_line(path: Path) -> None:
    """Cut a torn last line, or give a whole one its newline; reads only the file's end."""
    refuse_link(path)
    with open(path, "r+b") as file:
        size = start = file.seek(0, os.SEEK_END)
        end = b""
        while start and b"\n" not in end:
            start = max(0, start - 65536)
            file.seek(start)
            end = file.read(size - start)
        whole = start + end.rfind(b"\n") + 1
        last = end[whole - start :]
        if not last:
            return
        if is_row(last):
            file.write(b"\n")
        else:
            _warn_of_torn(path, last)
            file.truncate(whole)
        file.flush()
        os.fsync(file.fileno())


def clear_leftovers(folder: Path) -> None:
    """Remove what writes that were killed have left in a folder and in its states."""
    for path in [*folder.glob(".*.tmp"), *folder.glob("state/.*.tmp")]:
        process = path.suffixes[-2].removeprefix(".") if len(path.suffixes) > 1 else ""
        if process.isdigit() and not Path("/proc", process).exists() and not path.is_symlink():
            path.unlink(missing_ok=True)
