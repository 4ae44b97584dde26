"""The one error that a user sees: what went wrong, where, what was found, what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AttackPlaneError(Exception):
    """A fault that the user can act on. The command line prints it without a traceback."""

    def __init__(
        self, what: str, *, where: object = None, got: object = None, remedy: str | None = None
    ) -> None:
        self.what, self.where, self.got, self.remedy = what, where, got, remedy
        told = (("where:  ", where), ("got:    ", got), ("remedy: ", remedy))
        lines = [f"  {name}{value}" for name, value in told if value is not None]
        super().__init__("\n".join([what, *lines]))

    def at(self, place: object) -> AttackPlaneError:
        """The same fault with the file, line or table in which it stands."""
        where = place if self.where is None else f"{place} ({self.where})"
        return type(self)(self.what, where=where, got=self.got, remedy=self.remedy)


class NothingToMeasure(AttackPlaneError):
    """The model or the run lacks what was to be measured. A claim about it is held back."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy that names the closest known word, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
