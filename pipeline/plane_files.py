"""The plane as files: points, classes, separability, success, distances; each replaced whole."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
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
PARQUET_ROWS = 50_000
"""Rows of a group in a Parquet file."""


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


def as_parquet(
    names: Sequence[str], rows: Sequence[Any], value: Callable[[Any, str], Any]
) -> bytes:
    """A table of ``value(row, name)``. Columns are made a part of the rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def column(part: Sequence[Any], name: str) -> list[Any]:
        return [value(row, name) for row in part]

    schema = pa.schema([(name, pa.infer_type(column(rows, name))) for name in names])
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema) as writer:
        for start in range(0, max(1, len(rows)), PARQUET_ROWS):
            part = rows[start : start + PARQUET_ROWS]
            columns = [pa.array(column(part, f.name), f.type) for f in schema]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return buffer.getvalue()


def export(points: Sequence[PlanePoint], folder: Path, nulls: Nulls | None = None) -> list[Path]:
    """Write ``plane.csv``, ``.jsonl`` and ``.parquet`` and the tables of classes beside them."""
    names = [f.name for f in fields(PlanePoint)]
    panels = by_panel(points)
    write_atomically(folder / "plane.csv", csv_lines(p.to_row() for p in points))
    write_atomically(folder / "plane.parquet", as_parquet(names, points, getattr))
    return [
        folder / "plane.csv",
        write_rows(folder / PLANE, (p.to_row() for p in points)),
        folder / "plane.parquet",
        write_rows(folder / CLASSES, describe_classes(points, nulls)),
        write_rows(folder / SEPARABILITY, separabilities(points)),
        write_rows(folder / SUCCESS, (r for panel in panels for r in success_prediction(panel))),
        write_rows(folder / DISTANCES, (r for panel in panels for r in centroid_distances(panel))),
    ]
