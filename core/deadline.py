"""A time limit for Python code that may never end, such as a stranger's chat template.

What runs in C, such as one huge multiplication of strings, is not stopped before it returns.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TooLong(Exception):
    """The code under ``at_most`` did not end in time."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise ``TooLong`` in this thread where what runs within takes longer."""
    thread, lock, over = threading.get_ident(), threading.Lock(), threading.Event()

    def stop() -> None:
        with lock:
            if not over.is_set():
                raised = ctypes.py_object(TooLong)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    except TooLong as error:
        raise TooLong(f"stopped after {seconds:g} seconds") from error
    finally:
        with lock:
            over.set()
        timer.cancel()
