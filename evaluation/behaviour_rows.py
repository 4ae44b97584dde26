"""Rows of behaviour files: CSV, JSON, JSONL and TXT as (line, row) pairs, and rows as behaviours.

Columns are recognised by the names that public sets use. Every fault is collected with its line.
"""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core.errors import AttackPlaneError
from core.files import json_once, refuse_twice
from core.records import (
    HARMFUL,
    HARMLESS,
    LABELS,
    PSEUDO_HARMFUL,
    SPLITS,
    Behaviour,
    content_hash,
)
from core.rows import Row
from core.text import is_text

REQUEST_COLUMNS = (
    *("request", "goal", "behavior", "behaviour", "prompt"),
    *("instruction", "forbidden_prompt", "query", "question"),
)
TARGET_COLUMNS = ("target", "target_string", "target_str")
ID_COLUMNS = ("behaviour_id", "behaviorid", "behavior_id", "id")
CATEGORY_COLUMNS = ("category", "semanticcategory", "type")
PAIR_COLUMNS = ("pair_id", "pair")

XSTEST = {"type", "label", "focus", "note"}
HEADERS = (
    (frozenset({"goal", "target", "behavior", "category", "source"}), HARMFUL),
    (frozenset({"goal", "behavior", "category", "source"}), HARMLESS),
    (frozenset({"behavior", "functionalcategory", "semanticcategory", "behaviorid"}), HARMFUL),
)
"""Headers of JailbreakBench's two files and of HarmBench's, with the label of their rows."""
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)")
"""What no request holds: a lone carriage return is the line end of another age, say."""
log = logging.getLogger(__name__)

Numbered = list[tuple[int, Row]]


def read_csv(text: str, path: Path) -> Numbered:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: Numbered = []
    try:
        refuse_twice(reader.fieldnames, path)
        for row in reader:
            # the reader stands at the row's last line; line breaks inside quotes lie before it
            breaks = sum(value.count("\n") for value in row.values() if isinstance(value, str))
            line = reader.line_num - breaks
            if None in row:
                raise AttackPlaneError(
                    "a row has more fields than the header",
                    where=f"{path}, line {line}",
                    got=row[None],
                    remedy="put fields that hold commas in double quotes",
                )
            rows.append((line, row))
    except csv.Error as error:
        raise AttackPlaneError(
            "not a CSV file", where=f"{path}, line {reader.line_num}", got=error
        ) from error
    return rows


def read_json(text: str, path: Path) -> Numbered:
    try:
        content = json_once(text)
    except ValueError as error:
        raise AttackPlaneError("not a JSON file", where=path, got=error) from error
    if isinstance(content, dict) and len(content) == 1:
        content = next(iter(content.values()))
    if not isinstance(content, list):
        raise AttackPlaneError(
            "expected a list of objects or of strings, or an object with one such list in it",
            where=path,
            got=text[:80],
        )
    return [
        (number, row if isinstance(row, dict) else {"request": row})
        for number, row in enumerate(content, start=1)
    ]


def read_jsonl(text: str, path: Path) -> Numbered:
    rows: Numbered = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json_once(line)
            except ValueError as error:
                raise AttackPlaneError(
                    "a line is not JSON", where=f"{path}, line {number}", got=error
                ) from error
            rows.append((number, row if isinstance(row, dict) else {"request": row}))
    return rows


def read_txt(text: str, path: Path) -> Numbered:
    return [
        (n, {"request": line}) for n, line in enumerate(text.split("\n"), start=1) if line.strip()
    ]


# --- rows to behaviours ---------------------------------------------------------------------------
def _column(row: Row, names: Sequence[str]) -> str | None:
    """The row's own name of the first recognised column."""
    lowered = {str(key).strip().lower(): key for key in row}
    return next((lowered[name] for name in names if name in lowered), None)


def to_behaviours(
    rows: Numbered,
    *,
    where: object,
    benchmark: str,
    label: str | None,
    merge_duplicates: bool = False,
    unit: str = "line",
) -> list[Behaviour]:
    """Turn numbered rows into behaviours; every fault is collected and named with its line.

    Args:
        label: of rows that have none; None: the set must say it.
    """
    if not rows:
        raise AttackPlaneError("no rows", where=where, remedy="the file is empty")
    request_column = _column(rows[0][1], REQUEST_COLUMNS)
    if request_column is None:
        raise AttackPlaneError(
            "no column with the requests",
            where=f"{where}, {unit} {rows[0][0]}",
            got=f"columns {', '.join(map(str, rows[0][1]))}",
            remedy=f"name it one of {', '.join(REQUEST_COLUMNS)}",
        )
    columns = {str(key).strip().lower() for key in rows[0][1]}
    label = label or _label_by_header(columns)
    if label is None and "label" not in columns:
        raise AttackPlaneError(
            "nothing says whether these requests are harmful",
            where=where,
            got=f"columns {', '.join(map(str, rows[0][1]))}",
            remedy=f"say it with --label-of-file ({', '.join(LABELS)}), or add a column label",
        )
    if "label" not in columns:
        log.info("%s: its rows say no label and are taken as %s", where, label)
    safe = PSEUDO_HARMFUL if columns >= XSTEST else HARMLESS
    reader = _Rows(request_column, benchmark, label, safe, merge_duplicates, unit)
    behaviours = [b for line, row in rows if (b := reader.read(line, row)) is not None]
    if reader.merged:
        told = "; ".join(reader.merged[:10]) + ("; ..." if len(reader.merged) > 10 else "")
        log.warning("%s: %d duplicates are merged: %s", where, len(reader.merged), told)
    if faults := reader.faults:
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise AttackPlaneError(
            f"{len(faults)} of {len(rows)} rows have faults",
            where=where,
            got="; ".join(faults[:10]) + more,
            remedy="mend or remove them (--merge-duplicates takes of two rows the first); nothing "
            "was loaded",
        )
    return behaviours


def _label_by_header(columns: set[str]) -> str | None:
    """The label of a public set's rows, which its header tells."""
    return next((label for known, label in HEADERS if columns >= known), None)


def _value(row: Row, names: Sequence[str]) -> str | None:
    """The text of the first recognised column; None where it is absent or empty."""
    column = _column(row, names)
    value = row[column] if column is not None else None
    return str(value).strip() or None if value is not None else None


@dataclass
class _Rows:
    """Reads rows one by one, and collects what is wrong with them."""

    request_column: str
    benchmark: str
    label: str | None
    safe: str
    merge_duplicates: bool
    unit: str
    merged: list[str] = field(default_factory=list)
    """Rows that were left out, and what they repeat."""
    faults: list[str] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)
    """Where each request stood."""
    ids: dict[str, int] = field(default_factory=dict)

    def fault(self, line: int, what: str) -> None:
        self.faults.append(f"{self.unit} {line}: {what}")

    def read(self, line: int, row: Row) -> Behaviour | None:
        """The behaviour of a row; None for a fault, or a duplicate that is merged."""
        request = row.get(self.request_column)
        if not isinstance(request, str) or not request.strip():
            empty = request is None or isinstance(request, str)
            self.fault(line, "empty request" if empty else f"{request!r} is no text")
            return None
        request = request.strip()
        if not is_text(request, _value(row, TARGET_COLUMNS), _value(row, ID_COLUMNS)):
            self.fault(line, "half of a surrogate pair, which is no Unicode text")
            return None
        if found := CONTROL.search(request + (_value(row, TARGET_COLUMNS) or "")):
            self.fault(line, f"a control character, {found[0]!r}, in the text")
            return None
        if request in self.lines:
            same = f"the same request as {self.unit} {self.lines[request]}"
            if self.merge_duplicates:
                self.merged.append(f"{self.unit} {line}: {same}")
            else:
                self.fault(line, same)
            return None
        self.lines[request] = line
        label, split = _value(row, ("label",)) or self.label, _value(row, ("split",))
        label = {"safe": self.safe, "unsafe": HARMFUL}.get(label or "", label)
        if label not in LABELS:
            self.fault(line, f"label {label!r} is none of {', '.join(LABELS)}")
            return None
        if split is not None and split not in SPLITS:
            self.fault(line, f"split {split!r} is none of {', '.join(SPLITS)}")
            return None
        target = _value(row, TARGET_COLUMNS)
        own = _value(row, ID_COLUMNS) or content_hash([self.benchmark, request, target], 12)
        if own in self.ids:
            self.fault(line, f"the same id {own!r} as {self.unit} {self.ids[own]}")
            return None
        self.ids[own] = line
        return Behaviour(
            behaviour_id=own,
            request=request,
            target_string=target,
            category=_value(row, CATEGORY_COLUMNS) or "none",
            label=label,
            benchmark=self.benchmark,
            split=split,
            pair_id=_value(row, PAIR_COLUMNS),
        )
