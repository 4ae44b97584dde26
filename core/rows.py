"""The form of what stages write and exchange besides records."""

import math
from typing import Any, TypeGuard

Row = dict[str, Any]
"""One JSON object: strings, numbers, lists and objects by name."""


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a value of a JSON file is a number that a float holds."""
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False
