"""Work side by side in threads, each with its share of the cores.

Within one batch everything but large matrix products makes poor use of a second core. Two batches
side by side fill it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    cores = torch.get_num_threads()
    share = max(1, cores // count)  # torch keeps one number for threads that it has not met yet
    try:
        with ThreadPoolExecutor(count, "lane", torch.set_num_threads, (share,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(cores)  # or threads that start later would have a share only


def side_by_side(works: Sequence[Callable[[], T]]) -> list[T]:
    """What each of ``works`` returns. No gradients."""
    with _threads(len(works)) as pool:
        return list(pool.map(torch.no_grad()(lambda work: work()), works))


def merged(streams: Sequence[Iterable[T]]) -> Generator[T]:
    """What several streams give, as it comes. No gradients.

    A stream that fails ends the others at their next item, and so does a caller that stops.
    """
    given: SimpleQueue[Any] = SimpleQueue()
    stopped = threading.Event()

    @torch.no_grad()
    def run(stream: Iterable[T]) -> None:
        for item in stream:
            given.put((item, None))
            if stopped.is_set():
                return

    def end(future: Future[None]) -> None:
        given.put((None, future))

    with _threads(len(streams)) as pool:
        try:
            for stream in streams:
                pool.submit(run, stream).add_done_callback(end)
            left = len(streams)
            while left:
                item, future = given.get()
                if future is None:
                    yield item
                    continue
                left -= 1
                try:
                    future.result()
                finally:
                    del future  # its error holds this frame, and so all that the streams hold
        finally:
            stopped.set()
