"""Behaviour sets: the built-in demonstration set, files, and public sets of the hub by name.

Built in (``demonstration``): 64 harmful requests with target strings in eight everyday categories,
64 harmless ones matched in topic and form, 32 pseudo-harmful ones (safe, but with alarming words),
each with a fixed split. Files may be CSV, JSON, JSONL or TXT; columns are recognised by the names
that public sets use. Nothing is dropped in silence: a file with faults is refused with every
fault's line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import AttackPlaneError
from core.records import LABELS, SPLITS, Behaviour, content_hash, nearest

DEMONSTRATION = "demonstration"
REQUEST_COLUMNS = (
    *("request", "goal", "behavior", "behaviour", "prompt"),
    *("instruction", "forbidden_prompt", "query", "question"),
)
TARGET_COLUMNS = ("target", "target_string", "target_str")
ID_COLUMNS = ("behaviour_id", "behaviorid", "behavior_id", "id")
CATEGORY_COLUMNS = ("category", "semanticcategory", "type")


@dataclass(frozen=True)
class HubSet:
    """Where a public set lies on the hub and how its rows are labelled."""

    path: str
    split: str
    config: str | None = None
    label: str | Callable[[dict[str, Any]], str] = "harmful"


def _xstest_label(row: dict[str, Any]) -> str:
    return (
        "harmful"
        if str(row.get("label", row.get("type", ""))).startswith(("unsafe", "contrast"))
        else "pseudo_harmful"
    )


HUB_SETS = {
    "advbench": HubSet("walledai/AdvBench", "train"),
    "harmbench": HubSet("walledai/HarmBench", "train", "standard"),
    "jailbreakbench": HubSet("JailbreakBench/JBB-Behaviors", "harmful", "behaviors"),
    "jailbreakbench-benign": HubSet(
        "JailbreakBench/JBB-Behaviors", "benign", "behaviors", label="harmless"
    ),
    "xstest": HubSet("walledai/XSTest", "test", label=_xstest_label),
    "strongreject": HubSet("walledai/StrongREJECT", "train"),
    "alpaca": HubSet("tatsu-lab/alpaca", "train", label="harmless"),
}


def load_behaviours(
    source: str = DEMONSTRATION,
    *,
    label: str | None = None,
    splits: Sequence[str] = (),
    default_label: str = "harmful",
) -> list[Behaviour]:
    """Behaviours of a built-in set, a file, or a hub set by name.

    ``label`` and ``splits`` keep only rows with that label or one of those splits; rows of a file
    without a label column get ``default_label``.

    Raises:
        AttackPlaneError: unknown source; duplicate or empty rows, wrong columns, broken encoding
        (all lines named);
            a choice that leaves no row.
    """
    for name in filter(None, (label, default_label)):
        if name not in LABELS:
            raise AttackPlaneError("unknown label", got=name, remedy=nearest(name, list(LABELS)))
    for name in splits:
        if name not in SPLITS:
            raise AttackPlaneError("unknown split", got=name, remedy=nearest(name, list(SPLITS)))
    if source == DEMONSTRATION:
        path = Path(__file__).parent / "data" / "demonstration.csv"
        rows = read_file(path, default_label, benchmark=DEMONSTRATION)
    elif source.lower() in HUB_SETS:
        rows = read_hub(source.lower())
    elif Path(source).is_file():
        rows = read_file(Path(source), default_label)
    else:
        raise AttackPlaneError(
            "no such behaviour set",
            where="behaviours",
            got=source,
            remedy=(
                f"a CSV, JSON, JSONL or TXT file, {DEMONSTRATION}, or one of {', '.join(HUB_SETS)}"
            ),
        )
    kept = [
        row for row in rows if label in (None, row.label) and (not splits or row.split in splits)
    ]
    if not kept:
        raise AttackPlaneError(
            "no behaviour is left by this choice",
            where=source,
            got=f"label {label or 'any'}, split {', '.join(splits) or 'any'} of {len(rows)} rows",
            remedy="leave --label or --split out, or add such a column to the file",
        )
    return kept


def to_attack(source: str, label: str, splits: Sequence[str] | None) -> list[Behaviour]:
    """``load_behaviours`` as commands and sweeps ask for it: label ``any`` is every label, and
    without splits (None) the demonstration set gives its test split, since the others are what
    checkpoints and directions are made from."""
    if splits is None:
        splits = ("test",) if source == DEMONSTRATION else ()
    return load_behaviours(source, label=None if label == "any" else label, splits=splits)


def read_file(path: Path, default_label: str, *, benchmark: str | None = None) -> list[Behaviour]:
    """Behaviours of one file, by its ending."""
    readers = {".csv": _csv, ".json": _json, ".jsonl": _jsonl, ".txt": _txt}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise AttackPlaneError(
            "unknown kind of behaviours file",
            where=path,
            got=path.suffix or "no ending",
            remedy=f"use one of {', '.join(readers)}",
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise AttackPlaneError(
            "the file is not UTF-8",
            where=f"{path}, line {line}",
            got=f"byte 0x{error.object[error.start]:02x}",
            remedy="save it as UTF-8",
        ) from error
    return to_behaviours(
        reader(text, path),
        where=path,
        benchmark=benchmark or path.stem,
        label=default_label,
        unit="row" if reader is _json else "line",
    )


def read_hub(name: str) -> list[Behaviour]:
    """Behaviours of a public set, through the package ``datasets`` (extra ``hub-sets``)."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise AttackPlaneError(
            f"the hub set {name!r} needs the package datasets",
            remedy="pip install 'attack-plane[hub-sets]'",
        ) from error
    known = HUB_SETS[name]
    try:
        table = load_dataset(known.path, known.config, split=known.split)
    except Exception as error:  # datasets raises errors of many libraries
        raise AttackPlaneError(
            "cannot load the hub set",
            where=f"{name} ({known.path})",
            got=str(error).strip().splitlines()[0],
            remedy="check the network and, for a gated set, your access token; or give a file",
        ) from error
    numbered = [(index, dict(row)) for index, row in enumerate(table, start=1)]
    # Alpaca's instructions may speak of an input that stands beside them
    numbered = [
        (
            i,
            {**row, "instruction": f"{row['instruction']}\n\n{row['input']}"}
            if "instruction" in row and row.get("input")
            else row,
        )
        for i, row in numbered
    ]
    label = known.label
    if callable(label):
        numbered = [(i, {**row, "label": label(row)}) for i, row in numbered]
    else:
        numbered = [(i, {k: v for k, v in row.items() if k != "label"}) for i, row in numbered]
    return to_behaviours(
        numbered,
        where=name,
        benchmark=name,
        label=label if isinstance(label, str) else "harmful",
        merge_duplicates=True,
        unit="row",
    )


# --- readers: (line, row) pairs -------------------------------------------------------------------
Numbered = list[tuple[int, dict[str, Any]]]


def _csv(text: str, path: Path) -> Numbered:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: Numbered = []
    try:
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


def _json(text: str, path: Path) -> Numbered:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise AttackPlaneError("not a JSON file", where=path, got=error) from error
    if isinstance(content, dict) and len(content) == 1:
        content = next(iter(content.values()))
    if not isinstance(content, list):
        raise AttackPlaneError(
            "expected a list of objects or of strings", where=path, got=type(content).__name__
        )
    return [
        (number, row if isinstance(row, dict) else {"request": row})
        for number, row in enumerate(content, start=1)
    ]


def _jsonl(text: str, path: Path) -> Numbered:
    rows: Numbered = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise AttackPlaneError(
                    "a line is not JSON", where=f"{path}, line {number}", got=error
                ) from error
            rows.append((number, row if isinstance(row, dict) else {"request": row}))
    return rows


def _txt(text: str, path: Path) -> Numbered:
    return [
        (n, {"request": line}) for n, line in enumerate(text.split("\n"), start=1) if line.strip()
    ]


# --- rows to behaviours ---------------------------------------------------------------------------
def _column(row: dict[str, Any], names: Sequence[str]) -> str | None:
    """The row's own name of the first recognised column."""
    lowered = {str(key).strip().lower(): key for key in row}
    return next((lowered[name] for name in names if name in lowered), None)


def to_behaviours(
    rows: Numbered,
    *,
    where: object,
    benchmark: str,
    label: str,
    merge_duplicates: bool = False,
    unit: str = "line",
) -> list[Behaviour]:
    """Turn numbered rows into behaviours; every fault is collected and named with its line."""
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
    behaviours: list[Behaviour] = []
    faults: list[str] = []
    lines: dict[str, int] = {}
    ids: dict[str, int] = {}
    for line, row in rows:

        def value(names: Sequence[str], row: dict[str, Any] = row) -> str | None:
            column = _column(row, names)
            found = row[column] if column is not None else None
            return str(found).strip() or None if found is not None else None

        request = row.get(request_column)
        if not isinstance(request, str) or not request.strip():
            faults.append(f"{unit} {line}: empty request")
            continue
        request = request.strip()
        if request in lines:
            if not merge_duplicates:
                faults.append(f"{unit} {line}: the same request as {unit} {lines[request]}")
            continue
        lines[request] = line
        own_label, split = value(("label",)) or label, value(("split",))
        own_label = {"safe": "harmless", "unsafe": "harmful"}.get(own_label, own_label)
        if own_label not in LABELS:
            faults.append(f"{unit} {line}: label {own_label!r} is none of {', '.join(LABELS)}")
            continue
        if split is not None and split not in SPLITS:
            faults.append(f"{unit} {line}: split {split!r} is none of {', '.join(SPLITS)}")
            continue
        target = value(TARGET_COLUMNS)
        behaviour_id = value(ID_COLUMNS) or content_hash([benchmark, request, target], 12)
        if behaviour_id in ids:
            faults.append(
                f"{unit} {line}: the same id {behaviour_id!r} as {unit} {ids[behaviour_id]}"
            )
            continue
        ids[behaviour_id] = line
        behaviours.append(
            Behaviour(
                behaviour_id=behaviour_id,
                request=request,
                target_string=target,
                category=value(CATEGORY_COLUMNS) or "none",
                label=own_label,
                benchmark=benchmark,
                split=split,
            )
        )
    if faults:
        shown = "; ".join(faults[:10]) + (
            f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        )
        raise AttackPlaneError(
            f"{len(faults)} of {len(rows)} rows have faults",
            where=where,
            got=shown,
            remedy="mend or remove them; nothing was loaded",
        )
    return behaviours
