"""Settings of a method: fields of a frozen dataclass that carry their own help text and bounds.

    @dataclass(frozen=True)
    class GCGConfig:
        num_steps: int = setting(500, "Optimiser steps.", flag="--steps", low=0)

The command line makes its options from them, sweeps check their tables with them, and the config
checks itself with ``check_settings(self)`` when it is made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from core.errors import AttackPlaneError, nearest
from core.rows import Row

MOST, LARGEST = 10**9, 2**63 - 1
"""No count is larger, where no bound is stated; no whole number is (seeds)."""
HELP, FLAG, LOW, HIGH, BELOW, CHOICES = "help", "flag", "low", "high", "below", "choices"


def setting(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    low: float | None = None,
    high: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A field with its help text.

    Args:
        flag: the option's name on the command line, where it is not the field's. low, high:
            bounds that belong to the range. below: a bound that does not. choices: for strings.
    """
    metadata: Row = {
        HELP: help,
        FLAG: flag,
        LOW: low,
        HIGH: high,
        BELOW: below,
        CHOICES: tuple(choices),
    }
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, however it is given."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def check_settings(config: Any, where: str) -> None:
    """Check every field against its bounds.

    Raises:
        AttackPlaneError: a value of a wrong type, not finite, out of bounds or no known choice.
    """
    for field in dataclasses.fields(config):
        if HELP in field.metadata:
            fault = _fault(getattr(config, field.name), default_of(field), field.metadata)
            if fault:
                raise AttackPlaneError(
                    f"{field.name} {fault}", where=where, got=repr(getattr(config, field.name))
                )


def _fault(value: Any, default: Any, metadata: Mapping[str, Any]) -> str | None:
    if value is None:
        return "must be given" if default is not None else None
    choices = metadata[CHOICES]
    if choices:
        unknown = [v for v in (value if isinstance(value, tuple) else (value,)) if v not in choices]
        return f"is not known; {nearest(str(unknown[0]), list(choices))}" if unknown else None
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "must be true or false"
    number = isinstance(default, (int, float)) or any(
        metadata[bound] is not None for bound in (LOW, HIGH, BELOW)
    )
    if not number:
        wrong = isinstance(default, str) and not isinstance(value, str)
        return "must be a text" if wrong else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "must be a number"
    if isinstance(default, int) and not isinstance(value, int):
        return "must be a whole number"
    return _out_of_bounds(value, metadata)


def _out_of_bounds(value: float, metadata: Mapping[str, Any]) -> str | None:
    if not math.isfinite(value):
        return "must be finite"
    low, high, below = (metadata[bound] for bound in (LOW, HIGH, BELOW))
    if low is not None and value < low:
        return f"must be {low:g} or more"
    if high is None and isinstance(value, int):
        high = MOST if low is not None else LARGEST
    if high is not None and value > high:
        return f"must be {high:,} or less" if isinstance(high, int) else f"must be {high:g} or less"
    return f"must be below {below:g}" if below is not None and value >= below else None
