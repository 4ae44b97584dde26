"""The plane as files: points, classes, separability, success, distances; each replaced whole."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

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


def as_csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_parquet(rows: Sequence[Row]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), buffer)
    return buffer.getvalue()


def export(points: Sequence[PlanePoint], folder: Path, nulls: Nulls | None = None) -> list[Path]:
    """Write ``plane.csv``, ``.jsonl`` and ``.parquet`` and the tables of classes beside them."""
    rows = [p.to_row() for p in points]
    panels = by_panel(points)
    write_atomically(folder / "plane.csv", as_csv(rows))
    write_atomically(folder / "plane.parquet", as_parquet(rows))
    return [
        folder / "plane.csv",
        write_rows(folder / PLANE, rows),
        folder / "plane.parquet",
        write_rows(folder / CLASSES, describe_classes(points, nulls)),
        write_rows(folder / SEPARABILITY, separabilities(points)),
        write_rows(folder / SUCCESS, (r for panel in panels for r in success_prediction(panel))),
        write_rows(folder / DISTANCES, (r for panel in panels for r in centroid_distances(panel))),
    ]
