"""The table of a training: what was logged at its checkpoints, and seconds of an update by part."""

from __future__ import annotations

from collections.abc import Sequence

from core.memory import PEAK
from core.text import aligned
from training.registry import TrainResult

HIDDEN = ("gradient_norm", "learning_rate")


def training_table(result: TrainResult, steps: Sequence[int]) -> str:
    """One row per saved update; then the mean seconds of an update by part."""
    rows = {int(row["step"]): row for row in result.losses}
    names = [k for k in dict.fromkeys(k for r in result.losses for k in r) if k not in HIDDEN]
    lines = [["update", *names[1:]]]
    for step in sorted({1, *steps} & set(rows)):
        values = [rows[step].get(name) for name in names[1:]]
        lines.append([str(step), *("-" if v is None else f"{v:.3f}" for v in values)])
    if not result.seconds:
        return aligned(lines)
    parts = {k for row in result.seconds for k in row} - {"step", PEAK}
    means = {p: sum(r.get(p, 0.0) for r in result.seconds) / len(result.seconds) for p in parts}
    ordered = sorted(parts - {"total"}, key=lambda p: -means[p])
    told = ", ".join(f"{p} {means[p]:.2f}" for p in ordered)
    peak = max(row.get(PEAK, 0) for row in result.seconds)
    return "\n".join(
        [
            aligned(lines),
            f"seconds of an update: {means['total']:.2f} ({told}); peak memory {peak:.0f} MiB",
        ]
    )
