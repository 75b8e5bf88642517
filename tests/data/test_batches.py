import json
from itertools import islice

import numpy as np
import pytest

from jdecouple import data


def assert_one_line(error):
    assert "\n" not in str(error.value)


def numbered(count):
    """A split whose image i holds the number i."""
    images = np.arange(count, dtype=np.float32).reshape(count, 1, 1, 1)
    return data.from_arrays(images, np.zeros(count, int), num_classes=2)


def rows(batch):
    return batch["x"].ravel().astype(int).tolist()


class TestTrainBatches:
    def test_an_epoch_holds_each_example_once(self):
        batches = data.train_batches(numbered(20), 5, seed=0)
        epochs = [[i for _ in range(4) for i in rows(next(batches))] for _ in range(3)]
        for epoch in epochs:
            assert sorted(epoch) == list(range(20))
        assert epochs[0] != epochs[1] != epochs[2]

    def test_the_rest_of_an_epoch_is_dropped(self):
        split = numbered(11)
        assert data.steps_per_epoch(split, 4) == 2
        batches = data.train_batches(split, 4, seed=0)
        epoch = rows(next(batches)) + rows(next(batches))
        assert len(set(epoch)) == 8

    def test_deterministic_by_seed(self):
        read = [
            [rows(b) for b in islice(data.train_batches(numbered(30), 7, seed=seed), 9)]
            for seed in (1, 1, 2)
        ]
        assert read[0] == read[1] != read[2]

    @pytest.mark.parametrize("taken", [0, 1, 3, 4, 9])
    def test_resumes_from_its_state(self, taken):
        split = numbered(33)
        batches = data.train_batches(split, 8, seed=3)
        for _ in range(taken):
            next(batches)
        state = json.loads(json.dumps(batches.get_state()))
        expected = [rows(next(batches)) for _ in range(10)]
        resumed = data.train_batches(split, 8, seed=3)
        next(resumed)
        resumed.set_state(state)
        assert [rows(next(resumed)) for _ in range(10)] == expected
        started = data.train_batches(split, 8, seed=3, start=taken)
        assert [rows(next(started)) for _ in range(10)] == expected

    @pytest.mark.parametrize("batch_size", [0, -1, 11, 2.0, True])
    def test_bad_batch_size(self, batch_size):
        with pytest.raises(ValueError, match="batch_size is") as error:
            data.train_batches(numbered(10), batch_size, seed=0)
        assert_one_line(error)

    def test_bad_start(self):
        with pytest.raises(ValueError, match="start is -1"):
            data.train_batches(numbered(10), 2, seed=0, start=-1)


class TestEvaluationBatches:
    def test_in_order_with_a_ragged_end(self):
        read = [rows(batch) for batch in data.evaluation_batches(numbered(7), 3)]
        assert read == [[0, 1, 2], [3, 4, 5], [6]]

    def test_batch_larger_than_the_split(self):
        assert [rows(b) for b in data.evaluation_batches(numbered(2), 5)] == [[0, 1]]

    def test_empty_split(self):
        empty = data.load("digits", validation=0).validation
        with pytest.raises(ValueError, match="validation split is empty"):
            data.evaluation_batches(empty, 3)


class Recorded:
    """A split that notes what is read of it."""

    def __init__(self, count):
        self._split = numbered(count)
        self.name = "recorded"
        self.read = []

    def __len__(self):
        return len(self._split)

    def gather(self, indices):
        self.read += list(map(int, indices))
        return self._split.gather(indices)


class TestShare:
    @pytest.mark.parametrize("share", [[0, 1, 2, 3], [1, 4], [7], []])
    def test_reads_its_positions_alone(self, share):
        split, share = Recorded(24), np.array(share, int)
        part = data.train_batches(split, 8, seed=2, share=share, threads=1)
        wanted = set()
        for whole in islice(data.train_batches(numbered(24), 8, seed=2), 3):
            own = next(part)
            assert own["x"].shape == whole["x"].shape
            assert own["label"].dtype == whole["label"].dtype
            np.testing.assert_array_equal(own["x"][share], whole["x"][share], strict=True)
            assert not own["x"][np.setdiff1d(np.arange(8), share)].any()
            wanted |= set(whole["x"][share].ravel().astype(int))
        part.close()
        assert wanted <= set(split.read)
        assert len(split.read) % max(1, len(share)) == 0

    def test_evaluation(self):
        """The short batch is padded, and who reads a part of full ones needs it whole."""
        split = Recorded(10)
        batches = list(data.evaluation_batches(split, 4, share=np.array([2, 3])))
        assert [rows(batch) for batch in batches] == [[0, 0, 2, 3], [0, 0, 6, 7], [8, 9]]
        assert split.read == [2, 3, 6, 7, 8, 9]
        batches = list(data.evaluation_batches(split, 4, share=np.arange(0)))
        assert [rows(batch) for batch in batches] == [[0] * 4, [0] * 4, [0] * 2]
