"""The one error that a user sees: what went wrong, where, what was found, what to do about it."""


class AttackPlaneError(Exception):
    """A fault that the user can act on. The command line prints it without a traceback."""

    def __init__(
        self, what: str, *, where: object = None, got: object = None, remedy: str | None = None
    ) -> None:
        parts = [what]
        if where is not None:
            parts.append(f"  where:  {where}")
        if got is not None:
            parts.append(f"  got:    {got}")
        if remedy is not None:
            parts.append(f"  remedy: {remedy}")
        super().__init__("\n".join(parts))
        self.what = what


class NothingToMeasure(AttackPlaneError):
    """The model or the run lacks what was to be measured. A claim about it is held back."""
