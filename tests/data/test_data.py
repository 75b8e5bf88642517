import numpy as np
import pytest

from jdecouple import data
from jdecouple.data import sources


def examples(count, shape=(6, 5, 3), num_classes=4, seed=0):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
    return images, [index % num_classes for index in range(count)]


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

    def test_they_are_those_of_scikit_learn(self, monkeypatch):
        """Whether its file is read, or it has none where it was."""
        found = sources._bundled_digits()
        monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
        for mine, wanted in zip(found, sources._bundled_digits(), strict=True):
            np.testing.assert_array_equal(mine, wanted)
            assert mine.dtype == wanted.dtype

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
    with pytest.raises(ValueError, match="validation is") as error:
        data.load("digits", validation=validation)
    assert_one_line(error)


def test_a_constant_channel_has_deviation_one():
    images = np.zeros((70, 4, 4, 2), np.uint8)
    images[:35, ..., 0] = 255
    split = data.from_arrays(images, np.zeros(70, int), num_classes=2)
    assert data.channel_statistics(split) == ((0.5, 0.0), (0.5, 1.0))


class TestNormalisation:
    def test_given_in_place_of_the_set_s_own(self):
        own = data.load("digits")
        given = data.load("digits", mean=(0.25,), std=[1])
        assert (given.mean, given.std) == ((0.25,), (1.0,))
        assert (given.inputs.mean, given.inputs.std) == (given.mean, given.std)
        assert given.method_arguments() == {"image_mean": (0.25,), "image_std": (1.0,)}
        half = data.load("digits", std=(0.5,))
        assert (half.mean, half.std) == (own.mean, (0.5,))
        x = everything(given.test)["x"]
        normal = given.transform("none")({"x": x}, None, False)["x"]
        np.testing.assert_allclose(normal, x / 255 - 0.25, rtol=0, atol=1e-6)

    def test_of_registered_sets(self, monkeypatch):
        monkeypatch.setattr(data.loaders, "_LOADERS", {**data.loaders._LOADERS})
        data.register("again", lambda: data.load("digits"))
        assert data.load("again", std=(0.5,)).std == (0.5,)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"mean": (0.5,) * 3}, "mean is .*: a number from 0 to 1 for each .* have 1"),
            ({"mean": 0.5}, "mean is 0.5: a number from 0 to 1 for each"),
            ({"mean": (125.3,)}, r"mean is \(125.3,\): a number from 0 to 1"),
            ({"mean": ("0.5",)}, "mean is"),
            ({"std": (0.0,)}, "std is .*: a number above 0, at most 1, for each"),
            ({"std": (float("nan"),)}, "std is"),
            ({"std": ()}, "std is"),
        ],
    )
    def test_refused(self, options, said):
        with pytest.raises(ValueError, match=said) as error:
            data.load("digits", **options)
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
        with pytest.raises(ValueError, match="label_noise is") as error:
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
            (np.zeros((2, 3, 3), np.uint8), np.zeros(2, int), r"images are \(2, 3, 3\)"),
            (np.zeros((2, 3, 3, 1), np.uint8), np.zeros(3, int), r"labels \(3,\)"),
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


@pytest.mark.parametrize("seed", [-1, 0.5, None])
def test_bad_seed(seed):
    with pytest.raises(ValueError, match="seed is") as error:
        data.load("digits", seed=seed)
    assert_one_line(error)


@pytest.mark.parametrize("name", ["", None, 3])
def test_no_name(name):
    with pytest.raises(ValueError, match="data set name") as error:
        data.load(name)
    assert_one_line(error)
