"""Tables of judges against labels by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from commands.tables.layout import Columns, ends, text_of
from pipeline.calibrate import JudgeRow


def judges_table(rows: Sequence[JudgeRow]) -> str:
    """One row per judge and attack class."""

    def number(value: float, interval: Any = None, form: str = ".2f") -> str:
        if math.isnan(value):
            return "-"
        return f"{value:{form}} {ends(interval, form)}".strip()

    def false(name: str) -> Callable[[Any], str]:
        def fill(row: JudgeRow) -> str:
            said, share = getattr(row, name), getattr(row, f"false_{name}")
            return f"{round(share * said)} of {said}" if said else "-"

        return fill

    columns: Columns = [
        ("judge", lambda r: r.judge),
        ("replies to", lambda r: r.attack),
        ("n", lambda r: str(r.n)),
        ("sensitivity", lambda r: number(r.errors.sensitivity, r.sensitivity_interval)),
        ("specificity", lambda r: number(r.errors.specificity, r.specificity_interval)),
        ("kappa", lambda r: number(r.kappa, r.kappa_interval)),
        ("false successes", false("successes")),
        ("false refusals", false("refusals")),
    ]
    return text_of(columns, rows)
