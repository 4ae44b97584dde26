"""Readers of plain tables with a prompt column: JSON lines, JSON arrays and CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from core.errors import AttackPlaneError
from core.files import refuse_twice
from core.rows import Row
from core.text import is_text
from interchange.foreign import Foreign, Found, Hints, Reject, json_items, json_lines


def text_of(row: Row, *names: str) -> str | None:
    """The first of these fields that holds text; case does not matter."""
    lower = {str(key).lower().strip(): value for key, value in row.items()}
    return next((v for name in names if isinstance(v := lower.get(name), str) and v.strip()), None)


PROMPT = ("prompt", "jailbreak_prompt", "attack_prompt", "adversarial_prompt")
COLUMNS: dict[str, tuple[str, ...]] = {
    "request": ("request", "goal", "behavior", "behaviour", "query", "instruction"),
    "behaviour_id": ("behaviour_id", "behavior_id", "behaviorid", "id"),
    "target_string": ("target_string", "target", "target_str"),
    "category": ("category", "semanticcategory"),
    "attack": ("attack", "method"),
    "model": ("source_model", "model"),
    "system": ("system_prompt", "system"),
    "suffix": ("suffix",),
}
FIELDS = ("prompt", *COLUMNS)
"""What a column may be named for with ``--map``."""


def _plain_row(place: str, row: Row, columns: Mapping[str, str]) -> Foreign | Reject:
    def found(field: str, names: tuple[str, ...]) -> str | None:
        return text_of(row, *((columns[field].lower(),) if field in columns else names))

    prompt = found("prompt", PROMPT)
    if prompt is None:
        wanted = columns.get("prompt", "prompt")
        return Reject(place, f"no text under {wanted} (columns: {', '.join(map(str, row))[:80]})")
    fields: Row = {field: found(field, names) for field, names in COLUMNS.items()}
    request = fields["request"]
    if request and prompt != request and prompt in request and "prompt" not in columns:
        return Reject(
            place, "the prompt stands inside the request: say which is which with --map prompt=KEY"
        )
    fields["category"] = fields["category"] or ""
    if fields["suffix"] and fields["suffix"] not in prompt:
        fields["suffix"] = None
    return Foreign(place, prompt, **fields)


def jsonl(path: Path, hints: Hints) -> Found:
    """JSON lines with a field ``prompt``; request, behaviour_id, target, attack, model, system and
    suffix if they are there."""
    with open(path, "rb") as file:
        if file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
            raise AttackPlaneError(
                "a JSON array, no JSON lines", where=path, remedy="give --format json"
            )
    for place, row in json_lines(path):
        yield row if isinstance(row, Reject) else _plain_row(place, row, hints.columns)


def json_array(path: Path, hints: Hints) -> Found:
    """An array of objects with the fields of ``jsonl``."""
    for place, row in json_items(path, "item"):
        if isinstance(row, Reject):
            yield row
        elif isinstance(row, dict):
            yield _plain_row(place, row, hints.columns)
        else:
            yield Reject(place, f"a {type(row).__name__}, not an object")


def csv_file(path: Path, hints: Hints) -> Found:
    """CSV with a column ``prompt`` and the other columns of ``jsonl``."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            names = reader.fieldnames
        except csv.Error as error:
            yield Reject("line 1", f"not CSV: {error}")
            return
        if not is_text(*(names or ())):
            yield Reject("line 1", "not UTF-8")
            return
        refuse_twice(names, path)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Reject(f"line {reader.line_num}", f"not CSV: {error}")
                continue
            place = f"line {reader.line_num}"
            if None in row:
                yield Reject(
                    place, "more fields than the header; put fields with commas in double quotes"
                )
            elif any(0xDC80 <= ord(c) <= 0xDCFF for v in row.values() if v for c in v):
                yield Reject(place, "not UTF-8")
            else:
                yield _plain_row(place, row, hints.columns)
