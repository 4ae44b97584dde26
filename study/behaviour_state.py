"""The behaviour state of a checkpoint, from its row of ``evaluate``: SG's and RG's y-axes.

Success of attacks by kind, refusals by label (full and partial), outcome D, and what is left of the
model's abilities. Intervals are Wilson's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from core.rows import Row
from core.specs import short_spec
from study.coupling import Estimate, row_of

FAMILY = "behaviour"
SHOWN = ("plain", "fixed", "adaptive", "gcg")
OTHERS = ("degenerate", "kl", "perplexity")


def behaviour_state(row: Row | None, fingerprint: str, notes: list[str]) -> list[Row]:
    """Measures of one checkpoint; none, and a note, where it was not evaluated as it is now."""
    if row is None:
        return []
    if row["fingerprint"] != fingerprint:
        notes.append(
            f"{short_spec(row['model'])} has changed since it was evaluated: its behaviour is left "
            "out; evaluate it again"
        )
        return []
    return list(_measures(row))


def _measures(row: Row) -> Iterator[Row]:
    for kind in SHOWN:
        cell = row["robustness"].get(kind)
        if cell and cell["asr"] is not None:
            n = cell["behaviours"]
            yield _row(f"ASR {kind}", cell["asr"], cell["wilson"], n)
            if cell["corrected"] is not None:
                interval = cell["corrected_interval"]
                yield _row(f"ASR {kind}, corrected", cell["corrected"], interval, n)
    for name, cell in row["usability"].items():
        refused = 1 - cell["none"]
        yield _row(f"refused, {name}", refused, cell["refused_wilson"], cell["n"])
        yield _row(f"refused in full, {name}", cell["full"], cell["full_wilson"], cell["n"])
        if cell["d"] is not None:
            yield _row(f"D, {name}", cell["d"], None, cell["n"])
    if row.get("instructions") is not None:
        interval, n = row.get("instructions_wilson"), row.get("instructions_n")
        yield _row("instructions", row["instructions"], interval, n)
    for name in OTHERS:
        if row.get(name) is not None:
            yield _row(name, row[name], None, None)


def _row(name: str, value: float, interval: Sequence[float] | None, n: int | None) -> Row:
    ends = None if interval is None else (interval[0], interval[1])
    return row_of(FAMILY, name, Estimate(value, ends), "", n)
