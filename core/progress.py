"""Progress of long work: a bar on the terminal, or a function of the caller's.

Work says how far it is through ``bar``. The command line draws what it says. Under ``reporting``,
which the Python API uses, a function is told instead, or nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

OnProgress = Callable[[str, int, int], None]
"""Told (what, done, total) after each piece of work, for example ("replies", 3, 16)."""
_told: ContextVar[OnProgress | None] = ContextVar("told", default=None)


def bar(total: int, what: str, unit: str, **options: Any) -> tqdm:
    """A progress bar to ``update``, with tqdm's further options. Use as a context manager.

    Where standard error is no terminal nothing is drawn.
    """
    tell = _told.get()
    if tell is None:
        quiet: dict[str, Any] = {"leave": False, "disable": None}
        return tqdm(total=total, desc=what, unit=unit, **{**quiet, **options})
    return _Told(tell, total, what, options.get("initial", 0))


class _Told(tqdm):
    """Draws nothing, and tells a function."""

    def __init__(self, tell: OnProgress, total: int, what: str, done: int) -> None:
        super().__init__(total=total, initial=done, disable=True)
        self.tell, self.what, self.total, self.n = tell, what, total, done

    def update(self, n: float | None = 1) -> bool | None:
        self.n += int(n or 0)
        self.tell(self.what, self.n, self.total)
        return None


@contextmanager
def reporting(tell: OnProgress | None) -> Iterator[None]:
    """While open, no bars are drawn; ``tell`` is told instead."""
    token = _told.set(tell or (lambda what, done, total: None))
    try:
        yield
    finally:
        _told.reset(token)
