import importlib.util
import json
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from tfds_writer import png, write_image_set

from jdecouple import data


def examples(count, shape=(6, 5, 3), num_classes=4, seed=0):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
    return images, [index % num_classes for index in range(count)]


def tiny_set(folder, name="tiny", *, sizes=None, num_classes=4, shape=(6, 5, 3), **options):
    """A small prepared set on disk; returns its images by split."""
    sizes = {"train": 40, "test": 12} if sizes is None else sizes
    arrays = {
        split: examples(count, shape, num_classes, seed)
        for seed, (split, count) in enumerate(sizes.items())
    }
    encoded = {split: ([png(i) for i in images], y) for split, (images, y) in arrays.items()}
    write_image_set(folder, name, encoded, num_classes=num_classes, shape=shape, **options)
    return arrays


def everything(split):
    return split.gather(np.arange(len(split)))


def assert_one_line(error):
    assert "\n" not in str(error.value)


class TestDigits:
    def test_shapes_and_range(self):
        digits = data.load("digits")
        batch = everything(digits.train)
        assert digits.image_shape == batch["x"].shape[1:] == (8, 8, 1)
        assert batch["x"].dtype == np.uint8
        assert batch["x"].max() == 255
        assert batch["label"].dtype == np.int32
        assert set(batch["label"]) == set(range(digits.num_classes))
        assert (len(digits.train), len(digits.validation), len(digits.test)) == (1294, 144, 359)

    def test_splits_are_disjoint_and_whole(self):
        digits = data.load("digits")
        rows = np.concatenate([s.indices for s in (digits.train, digits.validation, digits.test)])
        np.testing.assert_array_equal(np.sort(rows), np.arange(1797))

    def test_every_split_is_stratified(self):
        digits = data.load("digits")
        for split in (digits.train, digits.validation, digits.test):
            share = np.bincount(everything(split)["label"], minlength=10) / len(split)
            np.testing.assert_allclose(share, 0.1, atol=0.01)

    def test_splits_do_not_depend_on_the_seed(self):
        one, other = data.load("digits", seed=1), data.load("digits", seed=2)
        for name in ("train", "validation", "test"):
            np.testing.assert_array_equal(getattr(one, name).indices, getattr(other, name).indices)

    def test_statistics_normalise_the_training_images(self):
        digits = data.load("digits")
        pixels = data.load("digits").train.gather(np.arange(1000))["x"] / 255
        assert digits.mean[0] == pytest.approx(pixels.mean())
        assert digits.std[0] == pytest.approx(pixels.std())

    def test_image_size_enlarges(self):
        large = data.load("digits", image_size=32)
        assert large.image_shape == (32, 32, 1)
        small = everything(data.load("digits").test)["x"].mean()
        assert everything(large.test)["x"].mean() == pytest.approx(small, rel=0.05)


@pytest.mark.parametrize(("validation", "count"), [(0.5, 719), (100, 100), (0, 0), (0.0, 0)])
def test_validation_by_fraction_or_count(validation, count):
    digits = data.load("digits", validation=validation)
    assert len(digits.validation) == count
    assert len(digits.train) + count == 1438
    assert len(digits.test) == 359


@pytest.mark.parametrize("validation", [-1, 1.0, -0.1, 1438, True, "x", float("nan")])
def test_bad_validation(validation):
    with pytest.raises(ValueError, match="validation=") as error:
        data.load("digits", validation=validation)
    assert_one_line(error)


class TestSynthetic:
    def test_sizes(self):
        random = data.load(
            "synthetic", synthetic_size=100, image_size=12, channels=1, num_classes=7
        )
        assert random.image_shape == (12, 12, 1)
        assert (len(random.train), len(random.validation), len(random.test)) == (90, 10, 25)
        assert set(everything(random.train)["label"]) == set(range(7))

    def test_deterministic_by_seed(self):
        one, same, other = (data.load("synthetic", seed=seed, image_size=4) for seed in (3, 3, 4))
        np.testing.assert_array_equal(everything(one.train)["x"], everything(same.train)["x"])
        assert (everything(one.train)["x"] != everything(other.train)["x"]).any()
        assert (everything(one.test)["x"][:9] != everything(one.train)["x"][:9]).any()

    def test_memory_is_bounded(self):
        large = data.load("synthetic", synthetic_size=100_000, image_size=224)
        assert large.train.source._images.nbytes <= 64 << 20
        assert large.train.gather(np.array([89_999, 0]))["x"].shape == (2, 224, 224, 3)

    @pytest.mark.parametrize(
        "argument",
        [{"synthetic_size": 0}, {"image_size": -3}, {"channels": 2}, {"num_classes": 1}],
    )
    def test_bad_sizes(self, argument):
        with pytest.raises(ValueError, match=next(iter(argument))) as error:
            data.load("synthetic", **argument)
        assert_one_line(error)


class TestLabelNoise:
    def test_exact_count_and_uniform(self):
        overrides = data.symmetric_label_noise(10_000, 5, 0.4, seed=0)
        assert (overrides >= 0).sum() == 4000
        share = np.bincount(overrides[overrides >= 0], minlength=5) / 4000
        np.testing.assert_allclose(share, 0.2, atol=0.03)

    def test_training_labels_only(self):
        clean, noisy = data.load("digits"), data.load("digits", label_noise=0.5, seed=1)
        before, after = everything(clean.train), everything(noisy.train)
        changed = (before["label"] != after["label"]).mean()
        assert 0.40 < changed < 0.5  # 0.5 drawn anew, a tenth of them the true class
        np.testing.assert_array_equal(before["x"], after["x"])
        for name in ("validation", "test"):
            np.testing.assert_array_equal(
                everything(getattr(clean, name))["label"], everything(getattr(noisy, name))["label"]
            )

    def test_once_by_seed(self):
        labels = [
            everything(data.load("digits", label_noise=0.3, seed=seed).train)["label"]
            for seed in (5, 5, 6)
        ]
        np.testing.assert_array_equal(labels[0], labels[1])
        assert (labels[0] != labels[2]).any()

    @pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan"), "half", True])
    def test_bad_fraction(self, fraction):
        with pytest.raises(ValueError, match="label_noise=") as error:
            data.load("digits", label_noise=fraction)
        assert_one_line(error)


class TestArrays:
    @pytest.mark.parametrize(("label", "row"), [(4, 2), (-1, 0)])
    def test_label_out_of_range(self, label, row):
        images, labels = examples(5)
        labels[row] = label
        with pytest.raises(ValueError, match=rf"'test'.*example {row} has label {label}") as error:
            data.from_arrays(images, labels, num_classes=4, name="test")
        assert_one_line(error)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_non_finite_pixel(self, value):
        images = np.zeros((5, 3, 3, 1), np.float32)
        images[3, 1, 1, 0] = value
        with pytest.raises(ValueError, match=rf"'train'.*example 3 .*{value}") as error:
            data.from_arrays(images, np.zeros(5, int), num_classes=4)
        assert_one_line(error)

    @pytest.mark.parametrize(
        ("images", "labels", "match"),
        [
            (np.zeros((0, 3, 3, 1), np.uint8), np.zeros(0, int), "empty"),
            (np.zeros((2, 3, 3), np.uint8), np.zeros(2, int), "shape"),
            (np.zeros((2, 3, 3, 1), np.uint8), np.zeros(3, int), "shape"),
            (np.zeros((2, 3, 3, 1), np.int64), np.zeros(2, int), "int64"),
            (np.zeros((2, 3, 3, 1), np.uint8), np.zeros(2), "float64"),
        ],
    )
    def test_bad_arrays(self, images, labels, match):
        with pytest.raises(ValueError, match=match) as error:
            data.from_arrays(images, labels, num_classes=4)
        assert_one_line(error)

    def test_float_images_become_float32(self):
        split = data.from_arrays(np.full((2, 3, 3, 1), 0.5), np.array([0, 1]), num_classes=2)
        assert everything(split)["x"].dtype == np.float32


class TestPreparedSets:
    """TFDS sets written to disk by the test."""

    def test_reads_images_and_labels(self, tmp_path):
        arrays = tiny_set(tmp_path)
        tiny = data.load("tiny", data_dir=tmp_path)
        assert (tiny.num_classes, tiny.image_shape) == (4, (6, 5, 3))
        assert (len(tiny.train), len(tiny.validation), len(tiny.test)) == (36, 4, 12)
        for split, origin in (("train", "train"), ("validation", "train"), ("test", "test")):
            read = getattr(tiny, split)
            batch = everything(read)
            np.testing.assert_array_equal(batch["x"], arrays[origin][0][read.indices])
            np.testing.assert_array_equal(batch["label"], np.array(arrays[origin][1])[read.indices])
        assert not set(tiny.train.indices) & set(tiny.validation.indices)

    def test_statistics_of_an_unknown_set(self, tmp_path):
        tiny_set(tmp_path)
        tiny = data.load("tiny", data_dir=tmp_path)
        pixels = everything(tiny.train)["x"].reshape(-1, 3) / 255
        np.testing.assert_allclose(tiny.mean, pixels.mean(0))
        np.testing.assert_allclose(tiny.std, pixels.std(0))

    def test_cifar100_by_name(self, tmp_path):
        tiny_set(
            tmp_path,
            "cifar100",
            sizes={"train": 200, "test": 100},
            num_classes=100,
            shape=(32, 32, 3),
            version="3.0.2",
        )
        cifar = data.load("cifar100", data_dir=tmp_path)
        assert (cifar.num_classes, cifar.image_shape) == (100, (32, 32, 3))
        assert cifar.mean == pytest.approx((0.5071, 0.4865, 0.4409))
        assert (len(cifar.train), len(cifar.validation)) == (180, 20)
        assert everything(cifar.test)["label"].max() == 99

    def test_own_validation_split_unless_one_is_asked_for(self, tmp_path):
        arrays = tiny_set(tmp_path, sizes={"train": 20, "validation": 8, "test": 4})
        own = data.load("tiny", data_dir=tmp_path)
        assert len(own.train) == 20
        np.testing.assert_array_equal(everything(own.validation)["x"], arrays["validation"][0])
        cut = data.load("tiny", data_dir=tmp_path, validation=5)
        assert (len(cut.train), len(cut.validation), len(cut.test)) == (15, 5, 4)

    def test_validation_split_stands_in_for_a_test_split(self, tmp_path):
        arrays = tiny_set(tmp_path, sizes={"train": 20, "validation": 8})
        tiny = data.load("tiny", data_dir=tmp_path)
        np.testing.assert_array_equal(everything(tiny.test)["x"], arrays["validation"][0])
        assert (len(tiny.train), len(tiny.validation)) == (18, 2)

    @pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
    def test_cached_after_the_first_read(self, tmp_path, cache_bytes):
        tiny_set(tmp_path)
        test = data.load("tiny", data_dir=tmp_path, cache_bytes=cache_bytes).test
        reads = []
        records = test.source._records

        class Counted:
            def __getitems__(self, indices):
                reads.extend(indices)
                return records.__getitems__(indices)

        test.source._records = Counted()
        first = test.gather(np.array([3, 1, 3]))
        second = test.gather(np.array([3, 1, 3]))
        np.testing.assert_array_equal(first["x"], second["x"])
        assert sorted(reads) == ([1, 3] if cache_bytes else [1, 1, 3, 3, 3, 3])

    def test_threads_read_the_same_rows(self, tmp_path):
        arrays = tiny_set(tmp_path, sizes={"train": 300, "test": 4})
        source = data.load("tiny", data_dir=tmp_path).train.source
        wrong = []

        def read(seed):
            for _ in range(10):
                rows = np.random.default_rng(seed).integers(0, 300, 50)
                if (source.gather(rows)[0] != arrays["train"][0][rows]).any():
                    wrong.append(seed)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_label_out_of_range(self, tmp_path):
        images, labels = examples(10)
        labels[6] = 9
        encoded = {split: ([png(i) for i in images], labels) for split in ("train", "test")}
        write_image_set(tmp_path, "tiny", encoded, num_classes=4, shape=(6, 5, 3))
        with pytest.raises(ValueError, match=r"'train': example 6 has label 9.*0\.\.3") as error:
            data.load("tiny", data_dir=tmp_path, validation=0)
        assert_one_line(error)

    def test_undecodable_image(self, tmp_path):
        images, labels = examples(10)
        encoded = [png(i) for i in images]
        write_image_set(
            tmp_path,
            "tiny",
            {"train": (encoded, labels), "test": ([*encoded[:7], b"no png", *encoded[8:]], labels)},
            num_classes=4,
            shape=(6, 5, 3),
        )
        test = data.load("tiny", data_dir=tmp_path).test
        assert len(test.gather(np.arange(7))["x"]) == 7
        with pytest.raises(ValueError, match="'test': example 7 cannot be read") as error:
            everything(test)
        assert_one_line(error)

    def test_images_of_several_sizes(self, tmp_path):
        images = [examples(1, shape, seed=7)[0][0] for shape in ((9, 6, 3), (5, 20, 3), (8, 8, 3))]
        encoded = {split: ([png(i) for i in images], [0, 1, 2]) for split in ("train", "test")}
        write_image_set(tmp_path, "tiny", encoded, num_classes=4, shape=(None, None, 3))
        with pytest.raises(ValueError, match="vary in size: give image_size") as error:
            data.load("tiny", data_dir=tmp_path)
        assert_one_line(error)
        tiny = data.load("tiny", data_dir=tmp_path, image_size=8)
        assert tiny.image_shape == (8, 8, 3)
        np.testing.assert_array_equal(everything(tiny.test)["x"][2], images[2])

    def test_label_noise_before_any_image_is_decoded(self, tmp_path):
        tiny_set(tmp_path)
        clean = data.load("tiny", data_dir=tmp_path)
        noisy = data.load("tiny", data_dir=tmp_path, label_noise=1.0)
        changed = everything(clean.train)["label"] != everything(noisy.train)["label"]
        assert 0.5 < changed.mean() < 1
        np.testing.assert_array_equal(
            everything(clean.validation)["label"], everything(noisy.validation)["label"]
        )


class TestUnreadableSets:
    def refused(self, match, name, kind=ValueError, **options):
        with pytest.raises(kind, match=match) as error:
            data.load(name, **options)
        assert_one_line(error)

    def test_missing_data_dir(self, tmp_path):
        self.refused("does not exist", "cifar10", FileNotFoundError, data_dir=tmp_path / "none")

    @pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist"])
    def test_empty_data_dir(self, tmp_path, name):
        self.refused(rf"'{name}' is not prepared.*pip install tensorflow", name, data_dir=tmp_path)
        assert not list(tmp_path.iterdir())

    @pytest.mark.skipif(
        importlib.util.find_spec("tensorflow") is not None, reason="would start a download"
    )
    def test_download_without_tensorflow(self, tmp_path):
        self.refused(
            "not prepared.*pip install tensorflow", "cifar100", data_dir=tmp_path, download=True
        )

    @pytest.mark.parametrize("name", ["no_such_set", "cifar10:9.9.9", "a/b:c", "../x"])
    def test_unknown_name(self, tmp_path, name):
        self.refused("cannot be opened", name, data_dir=tmp_path)

    @pytest.mark.parametrize("name", ["", None, 3])
    def test_no_name(self, name):
        self.refused("data set name", name)

    def test_other_file_format(self, tmp_path):
        tiny_set(tmp_path, file_format="tfrecord")
        self.refused("not prepared as array_record", "tiny", data_dir=tmp_path)

    @pytest.mark.parametrize("sizes", [{"train": 10}, {"test": 10}])
    def test_missing_split(self, tmp_path, sizes):
        tiny_set(tmp_path, sizes=sizes)
        self.refused("has the splits", "tiny", data_dir=tmp_path)

    @pytest.mark.parametrize("sizes", [{"train": 10, "test": 0}, {"train": 0, "test": 10}])
    def test_empty_split(self, tmp_path, sizes):
        tiny_set(tmp_path, sizes=sizes)
        self.refused("is empty", "tiny", data_dir=tmp_path)

    def test_no_label(self, tmp_path):
        tiny_set(tmp_path, with_label=False)
        self.refused(r"no image and class label.*\['image'\]", "tiny", data_dir=tmp_path)

    def test_text_set(self, tfds_dir):
        self.refused("no image and class label", "glue/sst2", data_dir=tfds_dir)

    def test_shard_removed(self, tmp_path):
        tiny_set(tmp_path)
        next(tmp_path.rglob("*-test.array_record*")).unlink()
        self.refused("split 'test'.*lacks the file", "tiny", data_dir=tmp_path)

    def test_shard_truncated(self, tmp_path):
        tiny_set(tmp_path)
        shard = next(tmp_path.rglob("*-train.array_record*"))
        shard.write_bytes(shard.read_bytes()[:2000])
        self.refused("split 'train'.*cannot be read", "tiny", data_dir=tmp_path)

    @pytest.mark.parametrize("seed", [-1, 0.5, None])
    def test_bad_seed(self, seed):
        self.refused("seed=", "digits", seed=seed)


class TestRealSets:
    @pytest.mark.parametrize(
        ("name", "shape", "sizes"),
        [
            ("cifar10", (32, 32, 3), (45_000, 5_000, 10_000)),
            ("fashion_mnist", (28, 28, 1), (54_000, 6_000, 10_000)),
        ],
    )
    def test_by_name(self, tfds_dir, name, shape, sizes):
        loaded = data.load(name, data_dir=tfds_dir)
        assert loaded.image_shape == shape
        assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == sizes
        rows = np.concatenate([loaded.train.indices, loaded.validation.indices])
        np.testing.assert_array_equal(np.sort(rows), np.arange(sum(sizes[:2])))
        pixels = loaded.train.gather(np.arange(500))["x"].reshape(-1, shape[-1]) / 255
        np.testing.assert_allclose(pixels.mean(0), loaded.mean, atol=0.02)
        np.testing.assert_allclose(pixels.std(0), loaded.std, atol=0.02)

    def test_cifar100_is_not_there(self, tfds_dir):
        if (tfds_dir / "cifar100").exists():
            pytest.skip("cifar100 is prepared here")
        with pytest.raises(ValueError, match="'cifar100' is not prepared"):
            data.load("cifar100", data_dir=tfds_dir)


def test_reading_imports_no_tensorflow(tmp_path):
    tiny_set(tmp_path)
    stub = tmp_path / "installed" / "tensorflow"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise SystemExit('tensorflow was imported')")
    program = f"""
import sys
sys.path.append({str(stub.parent)!r})
from jdecouple import data
loaded = data.load("tiny", data_dir={str(tmp_path)!r})
next(data.train_batches(loaded.train, 8, seed=0))
next(data.evaluation_batches(loaded.test, 8))
print(sorted(name for name in sys.modules if name.split(".")[0] == "tensorflow"))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


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
        with pytest.raises(ValueError, match="batch_size=") as error:
            data.train_batches(numbered(10), batch_size, seed=0)
        assert_one_line(error)

    def test_bad_start(self):
        with pytest.raises(ValueError, match="start=-1"):
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
