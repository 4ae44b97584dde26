"""Types of option values: numbers that are finite and of this world, paths that are not empty."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from core.files import fault_of_path
from core.settings import LARGEST, MOST

SEED_RANGE = click.IntRange(0, LARGEST)


class Count(click.IntRange):
    """A whole number within bounds; where none is stated above, it is at most ``MOST``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if self.max is None and number > MOST:
            self.fail(f"{value} is more than {MOST:,}.", param, ctx)
        return number


def count(low: int = 1) -> Count:
    """A whole number from ``low`` on."""
    return Count(low)


class Finite(click.FloatRange):
    """A number that is neither nan nor infinite, within bounds if there are any."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class FilePath(click.Path):
    """A path; an empty text is none, though Python takes it for the working directory."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value).strip():
            self.fail("an empty path.", param, ctx)
        if fault := fault_of_path(Path(value)):
            self.fail(f"no disk takes this path: {': '.join(fault)}", param, ctx)
        return super().convert(value, param, ctx)
