"""Work side by side: all that is made arrives, faults too, and nothing goes on unseen."""

import gc
import itertools
import threading
import time
import weakref

import pytest
import torch

from core.threads import merged, side_by_side


@pytest.fixture(autouse=True)
def cores():
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    yield
    found = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start(), later.join()
    torch.set_num_threads(before)
    assert found == [5]  # threads that start later have all cores again


def about_me():
    return threading.current_thread().name, torch.get_num_threads(), torch.is_grad_enabled()


def test_each_work_has_its_share_of_the_cores_and_no_gradients():
    barrier = threading.Barrier(2, timeout=20)  # both run at once
    found = side_by_side([lambda: (barrier.wait(), about_me())[1] for _ in range(2)])
    assert len({name for name, *_ in found}) == 2
    assert [rest for _, *rest in found] == [[2, False]] * 2
    assert torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError):
        side_by_side([lambda: 1 / 0, lambda: 1])


def test_streams_arrive_whole_and_each_in_its_order():
    barrier = threading.Barrier(3, timeout=20)

    def stream(name):
        barrier.wait()
        for n in range(50):
            yield name, n, about_me()[1:]

    found = list(merged([stream(name) for name in "abc"]))
    assert len(found) == 150 and {about for *_, about in found} == {(1, False)}
    for name in "abc":
        assert [n for other, n, _ in found if other == name] == list(range(50))


@pytest.mark.parametrize("caller", ["stops", "fails"])
def test_what_fails_or_stops_ends_all(caller):
    class Held:
        """What a stream holds."""

    held = weakref.WeakSet()

    def endless():
        own = Held()
        held.add(own)
        for n in itertools.count():
            time.sleep(0.001)
            yield n, len(held)

    def failing():
        yield 0, 0
        raise RuntimeError("no memory")

    gc.disable()
    try:
        if caller == "fails":
            with pytest.raises(RuntimeError, match="no memory"):
                list(merged([endless(), failing()]))
        else:
            for _ in merged([endless(), endless()]):
                break
    finally:
        left = len(held)
        gc.enable()
    assert not [t for t in threading.enumerate() if t.name.startswith("lane")]
    assert not left  # nothing waits for the collector
