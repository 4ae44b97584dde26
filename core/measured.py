"""Which of two ways is faster on this machine: measured once, and kept in the cache folder.

The same command shall work in the same way, whatever else the machine does at the time: sums that
are taken in another order differ in their last digits.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from core.embedded import cache_folder
from core.errors import AttackPlaneError
from core.files import read_object, write_atomically
from core.records import content_hash

log = logging.getLogger(__name__)


def seconds_of(work: Callable[[], Any], times: int) -> float:
    """Of the fastest call."""
    fastest = math.inf
    for _ in range(times):
        start = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def is_faster(
    kind: str, about: list[str], measure: Callable[[], tuple[float, float]], share: float
) -> bool:
    """Whether a new way takes at most ``share`` of the time of the plain one.

    Args:
        kind: what is measured: the name of its folder.
        about: what else the answer depends on, besides machine, threads and torch.
        measure: seconds of the new way and of the plain one.
    """
    machine = [platform.node(), torch.backends.cpu.get_cpu_capability()]
    key = content_hash([*about, *machine, str(torch.get_num_threads()), torch.__version__])
    path = cache_folder() / kind / f"{key}.json"
    try:
        return bool(read_object(path, "a measured speed")["gains"])
    except (AttackPlaneError, KeyError):
        new, plain = measure()
        found = {"new": new, "plain": plain, "gains": new <= share * plain}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(found) + "\n")
    except OSError as error:
        log.warning("cannot keep what was measured in %s (%s)", path, error)
    return bool(found["gains"])
