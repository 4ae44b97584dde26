"""Readers of plain tables with a prompt column: JSON lines and CSV."""

from __future__ import annotations

import csv
from pathlib import Path

from core.rows import Row
from interchange.foreign import Foreign, Found, Hints, Reject, json_lines


def text_of(row: Row, *names: str) -> str | None:
    """The first of these fields that holds text; case does not matter."""
    lower = {str(key).lower().strip(): value for key, value in row.items()}
    return next((v for name in names if isinstance(v := lower.get(name), str) and v.strip()), None)


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


def _plain_row(place: str, row: Row) -> Foreign | Reject:
    prompt = text_of(row, "prompt", "jailbreak_prompt", "attack_prompt", "adversarial_prompt")
    if prompt is None:
        return Reject(place, f"no text under prompt (columns: {', '.join(map(str, row))[:80]})")
    fields: Row = {field: text_of(row, *names) for field, names in COLUMNS.items()}
    fields["category"] = fields["category"] or ""
    if fields["suffix"] and fields["suffix"] not in prompt:
        fields["suffix"] = None
    return Foreign(place, prompt, **fields)


def jsonl(path: Path, hints: Hints) -> Found:
    """JSON lines with a field ``prompt``; request, behaviour_id, target, attack, model, system and
    suffix if they are there."""
    for place, row in json_lines(path):
        yield row if isinstance(row, Reject) else _plain_row(place, row)


def csv_file(path: Path, hints: Hints) -> Found:
    """CSV with a column ``prompt`` and the other columns of ``jsonl``."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, strict=True)
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
                yield _plain_row(place, row)
