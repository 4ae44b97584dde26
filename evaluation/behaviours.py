"""Behaviour sets: the built-in demonstration set, files, and public sets of the hub by name.

Built in (``demonstration``): 240 pairs of a harmful and a harmless request in twelve everyday
categories. The two of a pair have the same form, the same last token and nearly the same length, so
that the form of a request does not give its label away (a test holds this). Beside them stand 120
pseudo-harmful requests, which are safe but have alarming words. Pairs are split into train,
validation and test. ``demonstration-v1`` is the smaller set of earlier runs.

Files may be CSV, JSON, JSONL or TXT; columns are recognised by the names that public sets use.
Nothing is dropped in silence: a file with faults is refused with every fault's line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import AttackPlaneError, nearest
from core.files import require_regular
from core.records import HARMFUL, HARMLESS, LABELS, SPLITS, Behaviour
from core.rows import Row
from evaluation.behaviour_rows import (
    read_csv,
    read_json,
    read_jsonl,
    read_txt,
    to_behaviours,
)

DEMONSTRATION = "demonstration"
BUILT_IN = {DEMONSTRATION: "demonstration-v2", "demonstration-v1": DEMONSTRATION}
"""Built-in sets, and what the settings of a run call them: those of earlier versions say
``demonstration`` and mean version 1."""
CONTRAST_SPLITS = ("train", "validation")
"""Splits of the demonstration set that directions are estimated on,"""
HELD_OUT_SPLITS = ("test",)
"""and those that everything else is measured on."""


@dataclass(frozen=True)
class Reading:
    """How files of behaviours are read: the label of rows without one, and duplicates."""

    label_of_file: str | None = None
    merge_duplicates: bool = False


AS_IT_IS = Reading()
READING: ContextVar[Reading] = ContextVar("READING", default=AS_IT_IS)
"""Set by ``reading_files`` and by the options of the command line."""


@contextmanager
def reading_files(
    label_of_file: str | None = None, *, merge_duplicates: bool = False
) -> Iterator[None]:
    """While open, files of behaviours are read so too; what is not given stays as it is."""
    known = READING.get()
    label = label_of_file or known.label_of_file
    token = READING.set(Reading(label, merge_duplicates or known.merge_duplicates))
    try:
        yield
    finally:
        READING.reset(token)


@dataclass(frozen=True)
class HubSet:
    """Where a public set lies on the hub and how its rows are labelled."""

    path: str
    split: str
    config: str | None = None
    label: str | Callable[[Row], str] = "harmful"


def _xstest_label(row: Row) -> str:
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
    label_of_file: str | None = None,
) -> list[Behaviour]:
    """Behaviours of a built-in set, a file, or a hub set by name.

    ``label`` and ``splits`` keep only rows with that label or one of those splits.
    ``label_of_file`` is the label of rows of a file that says none; None: that of
    ``reading_files``, and without any the file must say it.

    Raises:
        AttackPlaneError: unknown source; duplicate or empty rows, wrong columns, broken encoding
        (all lines named);
            a choice that leaves no row.
    """
    reading = READING.get()
    label_of_file = label_of_file or reading.label_of_file
    for name in filter(None, (label, label_of_file)):
        if name not in LABELS:
            raise AttackPlaneError("unknown label", got=name, remedy=nearest(name, list(LABELS)))
    for name in splits:
        if name not in SPLITS:
            raise AttackPlaneError("unknown split", got=name, remedy=nearest(name, list(SPLITS)))
    if source in BUILT_IN:
        path = Path(__file__).parent / "data" / f"{source}.csv"
        rows = read_file(path, None, benchmark=source)
    elif source.lower() in HUB_SETS:
        rows = read_hub(source.lower())
    elif Path(source).exists():
        rows = read_file(Path(source), label_of_file, merge_duplicates=reading.merge_duplicates)
    else:
        raise AttackPlaneError(
            "no such behaviour set",
            where="behaviours",
            got=source,
            remedy=(
                f"a CSV, JSON, JSONL or TXT file, or one of {', '.join([*BUILT_IN, *HUB_SETS])}"
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
            remedy="leave label or split out, or add such a column to the file",
        )
    return kept


def recorded_name(source: str) -> str:
    """What the settings of a run call a set."""
    return BUILT_IN.get(source, source)


def to_attack(source: str, label: str, splits: Sequence[str] | None) -> list[Behaviour]:
    """``load_behaviours`` as commands and sweeps ask for it.

    The label ``any`` stands for every label. Without splits (None) the demonstration set gives its
    test split, since checkpoints and directions are made from the others.
    """
    if splits is None:
        splits = HELD_OUT_SPLITS if source in BUILT_IN else ()
    return load_behaviours(source, label=None if label == "any" else label, splits=splits)


def load_held_out(source: str) -> list[Behaviour]:
    """The split test of a set that has one, else all of it."""
    rows = load_behaviours(source)
    return [b for b in rows if b.split in HELD_OUT_SPLITS] or rows


def counterparts(behaviours: Sequence[Behaviour]) -> dict[str, Behaviour]:
    """Id of a harmful behaviour -> the harmless one that is matched with it."""
    harmless = {b.pair_id: b for b in behaviours if b.label == HARMLESS and b.pair_id}
    return {
        b.behaviour_id: harmless[b.pair_id]
        for b in behaviours
        if b.label == HARMFUL and b.pair_id and b.pair_id in harmless
    }


def spread(behaviours: Sequence[Behaviour], limit: int | None) -> list[Behaviour]:
    """At most ``limit`` behaviours, taken from the categories in turn; their order is kept."""
    if limit is None or limit >= len(behaviours):
        return list(behaviours)
    turns: dict[str, int] = {}
    ranked = []
    for index, behaviour in enumerate(behaviours):
        turn = turns.get(behaviour.category, 0)
        turns[behaviour.category] = turn + 1
        ranked.append((turn, index))
    return [behaviours[index] for index in sorted(index for _, index in sorted(ranked)[:limit])]


def read_file(
    path: Path, label: str | None, *, benchmark: str | None = None, merge_duplicates: bool = False
) -> list[Behaviour]:
    """Behaviours of one file, by its ending; ``label``: of rows without one."""
    if path.is_dir():
        raise AttackPlaneError(
            "a folder, no behaviours file", where=path, remedy="name a .csv, .json, .jsonl or .txt"
        )
    readers = {".csv": read_csv, ".json": read_json, ".jsonl": read_jsonl, ".txt": read_txt}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise AttackPlaneError(
            "unknown kind of behaviours file",
            where=path,
            got=path.suffix or "no ending",
            remedy=f"use one of {', '.join(readers)}",
        )
    return to_behaviours(
        reader(decoded(path), path),
        where=path,
        benchmark=benchmark or path.stem,
        label=label,
        merge_duplicates=merge_duplicates,
        unit="row" if reader is read_json else "line",
    )


def decoded(path: Path) -> str:
    """The text of a file.

    Raises:
        AttackPlaneError: it is not UTF-8; the line is named.
    """
    require_regular(path)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise AttackPlaneError(
            "the file is not UTF-8",
            where=f"{path}, line {line}",
            got=f"byte 0x{error.object[error.start]:02x}",
            remedy="save it as UTF-8",
        ) from error


def open_hub_set(name: str, path: str, config: str | None, split: str) -> Any:
    """A split of a set of the hub, row by row.

    Raises:
        AttackPlaneError: the package ``datasets`` is missing, or the set cannot be loaded.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise AttackPlaneError(
            f"the hub set {name!r} needs the package datasets",
            remedy="pip install 'attack-plane[hub-sets]'",
        ) from error
    try:
        return load_dataset(path, config, split=split)
    except Exception as error:  # datasets raises errors of many libraries
        raise AttackPlaneError(
            "cannot load the hub set",
            where=f"{name} ({path})",
            got=str(error).strip().splitlines()[0],
            remedy="check the network and, for a gated set, your access token; or give a file",
        ) from error


def read_hub(name: str) -> list[Behaviour]:
    """Behaviours of a public set, through the package ``datasets`` (extra ``hub-sets``)."""
    known = HUB_SETS[name]
    table = open_hub_set(name, known.path, known.config, known.split)
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
