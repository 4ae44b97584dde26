"""The plane as files: points, classes, separability, success, distances; each replaced whole."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from core.files import write_atomically
from core.readings import PlanePoint
from core.rows import Row
from core.store import CLASSES, PLANE
from geometry.classes import describe_classes
from geometry.plane import Nulls
from geometry.prediction import centroid_distances, success_prediction
from geometry.separability import separabilities
from pipeline.runs import write_rows

SEPARABILITY = "plane_separability.jsonl"
SUCCESS = "plane_success.jsonl"
DISTANCES = "plane_distances.jsonl"


def by_panel(points: Sequence[PlanePoint]) -> list[list[PlanePoint]]:
    """The points of each target and frame."""
    panels: dict[tuple[str, str], list[PlanePoint]] = {}
    for p in points:
        panels.setdefault((p.target, p.frame), []).append(p)
    return list(panels.values())


def csv_lines(rows: Iterable[Row]) -> Iterator[str]:
    """A header, and a line for each row."""
    text = io.StringIO()
    writer = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(text, fieldnames=list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
        yield text.getvalue()
        text.seek(0)
        text.truncate()


def as_parquet(columns: Mapping[str, Iterable[Any]]) -> bytes:
    """A table of these columns, which are read one after another."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    table = pa.table({name: pa.array(list(values)) for name, values in columns.items()})
    pq.write_table(table, buffer)
    return buffer.getvalue()


def export(points: Sequence[PlanePoint], folder: Path, nulls: Nulls | None = None) -> list[Path]:
    """Write ``plane.csv``, ``.jsonl`` and ``.parquet`` and the tables of classes beside them."""
    names = [f.name for f in fields(PlanePoint)]
    panels = by_panel(points)
    write_atomically(folder / "plane.csv", csv_lines(p.to_row() for p in points))
    columns = {name: map(attrgetter(name), points) for name in names}
    write_atomically(folder / "plane.parquet", as_parquet(columns))
    return [
        folder / "plane.csv",
        write_rows(folder / PLANE, (p.to_row() for p in points)),
        folder / "plane.parquet",
        write_rows(folder / CLASSES, describe_classes(points, nulls)),
        write_rows(folder / SEPARABILITY, separabilities(points)),
        write_rows(folder / SUCCESS, (r for panel in panels for r in success_prediction(panel))),
        write_rows(folder / DISTANCES, (r for panel in panels for r in centroid_distances(panel))),
    ]
