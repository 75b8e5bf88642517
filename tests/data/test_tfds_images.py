import importlib.util
import json
import logging
import subprocess
import sys
import threading
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

    def test_nothing_is_said_of_opencv(self, tmp_path, caplog):
        tiny_set(tmp_path)
        everything(data.load("tiny", data_dir=tmp_path).test)
        advice = "OpenCV is not installed. We recommend using OpenCV"  # as TFDS says it, once
        logging.getLogger("absl").warning(advice)
        logging.getLogger("absl").warning("something else")
        assert [record.getMessage() for record in caplog.records] == ["something else"]

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

    @pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist", "glue/sst2"])
    def test_empty_data_dir(self, tmp_path, name, caplog):
        self.refused(rf"'{name}' is not prepared.*pip install tensorflow", name, data_dir=tmp_path)
        assert not caplog.records
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

    def test_other_file_format(self, tmp_path):
        tiny_set(tmp_path, file_format="tfrecord")
        self.refused("not prepared as array_record", "tiny", data_dir=tmp_path)

    @pytest.mark.parametrize("sizes", [{"train": 10}, {"test": 10}])
    def test_missing_split(self, tmp_path, sizes):
        tiny_set(tmp_path, sizes=sizes)
        self.refused("the splits of data set", "tiny", data_dir=tmp_path)

    @pytest.mark.parametrize("sizes", [{"train": 10, "test": 0}, {"train": 0, "test": 10}])
    def test_empty_split(self, tmp_path, sizes):
        tiny_set(tmp_path, sizes=sizes)
        self.refused("is empty", "tiny", data_dir=tmp_path)

    def test_no_label(self, tmp_path):
        tiny_set(tmp_path, with_label=False)
        self.refused(r"features \['image'\]: an image and a class label", "tiny", data_dir=tmp_path)

    def test_shard_removed(self, tmp_path):
        tiny_set(tmp_path)
        next(tmp_path.rglob("*-test.array_record*")).unlink()
        self.refused("split 'test'.*lacks the file", "tiny", data_dir=tmp_path)

    def test_shard_truncated(self, tmp_path):
        tiny_set(tmp_path)
        shard = next(tmp_path.rglob("*-train.array_record*"))
        shard.write_bytes(shard.read_bytes()[:2000])
        self.refused("split 'train'.*cannot be read", "tiny", data_dir=tmp_path)

    @pytest.mark.parametrize("lengths", [[39], [41]])
    def test_metadata_of_other_files(self, tmp_path, lengths):
        tiny_set(tmp_path)
        (info,) = tmp_path.rglob("dataset_info.json")
        written = json.loads(info.read_text())
        written["splits"][0]["shardLengths"] = lengths
        info.write_text(json.dumps(written))
        said = f"split 'train'.*holds 40 examples, but dataset_info.json says {lengths[0]}"
        self.refused(said, "tiny", data_dir=tmp_path)

    def test_files_of_two_splits_changed_about(self, tmp_path):
        tiny_set(tmp_path)
        train, test = (next(tmp_path.rglob(f"*-{split}.array*")) for split in ("train", "test"))
        whole = train.read_bytes(), test.read_bytes()
        train.write_bytes(whole[1])
        test.write_bytes(whole[0])
        self.refused("split 'train'.*holds 12 examples, .* says 40", "tiny", data_dir=tmp_path)


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
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert "OpenCV" not in done.stderr
