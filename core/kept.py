"""Results that took long, kept in a run folder under a hash of all they depend on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from typing_extensions import TypedDict

from core.models import ModelHandle
from core.records import content_hash
from core.store import RunFolder, sealed

REMEDY = "remove that line; what it held is measured anew"


class _Result(TypedDict):
    key: str
    value: Any


class Kept:
    """The results in one file of a run. Use within the run's lock."""

    def __init__(self, run: RunFolder, name: str) -> None:
        self._run, self._name = run, name
        self._known = {row["key"]: row["value"] for row in run.checked(name, _Result, REMEDY)}

    def get(self, what: str, model: ModelHandle, depends: Any, make: Callable[[], Any]) -> Any:
        """``make()`` as JSON, from the run where the same was made before."""
        key = content_hash([what, model.fingerprint, depends])
        if key not in self._known:
            start = time.monotonic()
            value = make()
            seconds = round(time.monotonic() - start, 1)
            row = {"key": key, "what": what, "model": model.spec, "seconds": seconds}
            row = sealed(row | {"value": value})
            self._run.append(self._name, row)
            self._known[key] = row["value"]  # as a later command will read it
        return self._known[key]
