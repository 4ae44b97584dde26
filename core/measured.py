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
from pathlib import Path
from typing import Any

import torch

from core.embedded import cache_folder
from core.errors import AttackPlaneError
from core.files import read_object, write_atomically
from core.records import content_hash
from core.rows import Row

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
    known = _kept(kind, key)
    if known is None:
        with torch.random.fork_rng(devices=[]):  # a run draws the same, whether it measured or not
            new, plain = measure()
        known = _kept(kind, key)  # of a process that was sooner
    if known is None:
        known = new <= share * plain
        _keep(kind, key, {"new": new, "plain": plain, "gains": known})
    return known


def _path(kind: str, key: str) -> Path:
    return cache_folder() / kind / f"{key}.json"


def _kept(kind: str, key: str) -> bool | None:
    try:
        return bool(read_object(_path(kind, key), "a measured speed")["gains"])
    except (AttackPlaneError, KeyError, OSError, RuntimeError):  # there is none, or it is broken
        return None


def _keep(kind: str, key: str, found: Row) -> None:
    try:
        _path(kind, key).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_path(kind, key), json.dumps(found) + "\n")
    except (AttackPlaneError, OSError, RuntimeError) as error:
        log.warning("cannot keep which way is faster here: %s", error)
