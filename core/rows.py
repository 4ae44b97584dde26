"""The form of what stages write and exchange besides records."""

from typing import Any

Row = dict[str, Any]
"""One JSON object: strings, numbers, lists and objects by name."""
