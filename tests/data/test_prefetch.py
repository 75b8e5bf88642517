import threading
import time

import numpy as np
import pytest

from jdecouple import data


class Counter:
    """An endless iterator whose state is the number of elements returned."""

    def __init__(self, fail_at=None, pause=0.0):
        self.count, self.fail_at, self.pause, self.closed = 0, fail_at, pause, False
        self.state = {"next_index": 0}

    def __next__(self):
        time.sleep(self.pause)
        if self.count == self.fail_at:
            raise ValueError(f"example {self.count} is broken")
        self.count += 1
        self.state["next_index"] = self.count
        return self.count - 1

    def get_state(self):
        return self.state  # the same dict each time: the prefetcher must not keep it

    def close(self):
        self.closed = True


def until(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.001)


def test_order_and_placement():
    with data.Prefetcher(iter(range(5)), lambda batch: batch * 10) as prefetcher:
        assert list(prefetcher) == [0, 10, 20, 30, 40]


def test_the_end_stays_the_end():
    with data.Prefetcher(iter(range(1)), lambda batch: batch) as prefetcher:
        assert next(prefetcher) == 0
        for _ in range(2):
            with pytest.raises(StopIteration):
                next(prefetcher)


def test_state_belongs_to_the_batch_returned_last():
    source = Counter()
    with data.Prefetcher(source, lambda batch: batch, depth=3) as prefetcher:
        until(lambda: source.count == 3)
        assert prefetcher.state == {"next_index": 0}
        for taken in range(1, 6):
            next(prefetcher)
            assert prefetcher.state == {"next_index": taken}
    assert prefetcher.state == {"next_index": 5}


def test_state_resumes_a_training_stream():
    images = np.arange(20, dtype=np.float32).reshape(20, 1, 1, 1)
    split = data.from_arrays(images, np.zeros(20, int), num_classes=2)
    stream = data.train_batches(split, 3, seed=0)
    with data.Prefetcher(stream, lambda batch: batch["x"].ravel().tolist()) as prefetcher:
        for _ in range(8):
            next(prefetcher)
        state = prefetcher.state
        expected = [next(prefetcher) for _ in range(5)]
    resumed = data.train_batches(split, 3, seed=0)
    resumed.set_state(state)
    assert [next(resumed)["x"].ravel().tolist() for _ in range(5)] == expected


def test_no_state_without_get_state():
    with data.Prefetcher(iter(range(3)), lambda batch: batch) as prefetcher:
        next(prefetcher)
        assert prefetcher.state is None


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_reads_no_further_than_depth(depth):
    source = Counter()
    with data.Prefetcher(source, lambda batch: batch, depth=depth) as prefetcher:
        until(lambda: source.count == depth)
        time.sleep(0.05)
        assert source.count == depth
        next(prefetcher)
        until(lambda: source.count == depth + 1)


def test_error_of_the_iterator_after_the_good_batches():
    with data.Prefetcher(Counter(fail_at=2), lambda batch: batch) as prefetcher:
        assert [next(prefetcher), next(prefetcher)] == [0, 1]
        for _ in range(2):
            with pytest.raises(ValueError, match="example 2 is broken"):
                next(prefetcher)
        assert prefetcher.state == {"next_index": 2}


def test_error_of_place():
    def place(batch):
        raise MemoryError(f"no room for {batch}")

    with (
        data.Prefetcher(Counter(), place) as prefetcher,
        pytest.raises(MemoryError, match="no room for 0"),
    ):
        next(prefetcher)


def test_close_while_the_thread_waits_for_room():
    source = Counter()
    prefetcher = data.Prefetcher(source, lambda batch: batch, depth=1)
    until(lambda: source.count == 1)
    began = time.monotonic()
    prefetcher.close()
    assert time.monotonic() - began < 30
    assert not prefetcher._thread.is_alive()
    assert source.closed
    prefetcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(prefetcher)


def test_close_frees_a_blocked_reader():
    gate = threading.Event()

    def place(batch):
        gate.wait(300)
        return batch

    prefetcher = data.Prefetcher(Counter(), place)
    outcome = []

    def read():
        try:
            next(prefetcher)
        except RuntimeError as error:
            outcome.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    prefetcher.close(timeout=0.01)
    reader.join(60)
    gate.set()
    assert outcome == ["the prefetcher is closed"]


def test_close_after_the_end_closes_the_iterator():
    source = Counter(fail_at=0)
    prefetcher = data.Prefetcher(source, lambda batch: batch)
    until(lambda: not prefetcher._thread.is_alive())
    prefetcher.close()
    assert source.closed


def test_waiting_is_measured():
    with data.Prefetcher(Counter(pause=0.05), lambda batch: batch) as prefetcher:
        began = time.monotonic()
        for _ in range(4):
            next(prefetcher)
        elapsed = time.monotonic() - began
        assert 0.15 < prefetcher.wait_seconds <= elapsed


def test_no_waiting_when_input_is_ahead():
    with data.Prefetcher(Counter(), lambda batch: batch) as prefetcher:
        for _ in range(5):
            until(lambda: len(prefetcher._ready) == 2)
            next(prefetcher)
        assert prefetcher.wait_seconds < 0.02


@pytest.mark.parametrize("depth", [0, -1])
def test_bad_depth(depth):
    with pytest.raises(ValueError, match="depth is"):
        data.Prefetcher(iter(()), lambda batch: batch, depth=depth)
