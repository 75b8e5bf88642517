import colorsys
import functools
from importlib.metadata import version

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest

from jdecouple.data import ImageInputs, augment

# Without XLA's optimisations, which users have, jaxlib 0.11 computes other hues.
if not version("jaxlib").startswith("0.10."):
    pytestmark = pytest.mark.usefixtures("optimized")

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
UNIT = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def images(count=16, size=16, channels=3, seed=0):
    """Random images without zeros, so that zero padding can be told apart."""
    generator = np.random.default_rng(seed)
    return generator.integers(1, 256, (count, size, size, channels), dtype=np.uint8)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@functools.cache
def compiled(name, mean=UNIT["mean"], std=UNIT["std"], **options):
    transform = augment.get(name, mean=mean, std=std, **options)
    return jax.jit(transform, static_argnums=2)


def augmented(name, x, key_array, train=True, **options):
    return np.asarray(compiled(name, **options)({"x": x}, key_array, train)["x"])


def pixels_of(out):
    return np.round(out * 255).astype(np.uint8)


# "two_views" is a "basic" one and a "strong" one.
@pytest.mark.parametrize("name", nets.marked(augment.names(), ("none", "strong")))
class TestEveryAugmentation:
    def test_shape_and_dtype(self, name):
        x = images(6)
        batch = {"x": x, "label": np.arange(6)}
        out = compiled(name)(batch, keys(6), True)
        count = 12 if name == "two_views" else 6
        assert out["x"].shape == (count, 16, 16, 3)
        assert out["x"].dtype == jnp.float32
        np.testing.assert_array_equal(out["label"], np.resize(np.arange(6), count))

    def test_deterministic_by_key(self, name):
        x = images()
        first = augmented(name, x, keys(16))
        np.testing.assert_array_equal(first, augmented(name, x, keys(16)))
        if name != "none":
            assert (first != augmented(name, x, keys(16, seed=1))).any()

    @pytest.mark.parametrize("parts", [2, 16])
    def test_independent_of_the_batch_around_it(self, name, parts):
        x, key_array = images(), keys(16)
        whole = augmented(name, x, key_array).reshape(-1, 16, 16, 16, 3)
        pieces = [
            augmented(name, piece, key_piece).reshape(-1, 16 // parts, 16, 16, 3)
            for piece, key_piece in zip(
                np.split(x, parts), key_array.reshape(parts, -1), strict=True
            )
        ]
        np.testing.assert_allclose(whole, np.concatenate(pieces, axis=1), rtol=0, atol=1e-6)

    def test_independent_of_sharding(self, name):
        mesh = jax.make_mesh((4,), ("data",))
        sharding = jax.NamedSharding(mesh, jax.P("data"))
        x, key_array = images(), keys(16)
        out = augmented(name, jax.device_put(x, sharding), jax.device_put(key_array, sharding))
        np.testing.assert_allclose(out, augmented(name, x, key_array), rtol=0, atol=1e-6)

    def test_evaluation_only_normalises(self, name):
        x = images()
        batch = {"x": x, "label": np.arange(16)}
        out = compiled(name, mean=MEAN, std=STD)(batch, None, False)
        expected = (x.astype(np.float64) / 255 - MEAN) / STD
        np.testing.assert_allclose(out["x"], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(out["label"], np.arange(16))

    def test_values_are_normalised(self, name):
        x = images()
        plain = augmented(name, x, keys(16))
        assert 0 <= plain.min() < plain.max() <= 1 + 1e-6
        normal = augmented(name, x, keys(16), mean=MEAN, std=STD)
        np.testing.assert_allclose(normal, (plain - MEAN) / STD, rtol=1e-5, atol=1e-5)

    def test_uint8_equals_float(self, name):
        x = images()
        scaled = x.astype(np.float32) / 255
        np.testing.assert_allclose(
            augmented(name, x, keys(16)), augmented(name, scaled, keys(16)), rtol=0, atol=1e-5
        )

    def test_one_channel(self, name):
        x = images(4, channels=1)
        out = augmented(name, x, keys(4), mean=(0.5,), std=(0.5,))
        assert out.shape[1:] == (16, 16, 1)
        assert np.isfinite(out).all()

    def test_float32_under_x64(self, name, x64):
        transform = jax.jit(augment.get(name, mean=MEAN, std=STD), static_argnums=2)
        assert transform({"x": images(2)}, keys(2), True)["x"].dtype == jnp.float32

    def test_other_entries_pass_through(self, name):
        batch = {"x": images(4), "label": np.arange(4), "weight": np.ones((4, 2)), "step": 7}
        out = compiled(name)(batch, keys(4), True)
        count = 8 if name == "two_views" else 4
        assert set(out) == set(batch)
        assert out["weight"].shape == (count, 2)
        assert out["step"] == 7


@pytest.mark.parametrize("name", ["basic", "strong", "two_views"])
@pytest.mark.parametrize("given", ["none", "too few", "single"])
def test_bad_keys(name, given):
    bad = {"none": None, "too few": keys(3), "single": jax.random.key(0)}[given]
    with pytest.raises(ValueError, match="one key for each"):
        augment.get(name, **UNIT)({"x": images(4)}, bad, True)


def windows(image, padding, mode="constant"):
    """Every window of the padded image, plain and flipped, with its offset."""
    size = image.shape[0]
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode)
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            window = padded[top : top + size, left : left + size]
            yield (top, left, False), window
            yield (top, left, True), window[:, ::-1]


@pytest.mark.parametrize(("size", "padding"), [(8, 1), (16, 2), (28, 3), (32, 4)])
def test_basic_is_a_shifted_window_flipped_or_not(size, padding):
    x = images(12, size)
    out = np.round(augmented("basic", x, keys(12)) * 255).astype(np.uint8)
    for image, result in zip(x, out, strict=True):
        matches = [place for place, window in windows(image, padding) if (window == result).all()]
        assert len(matches) == 1


@pytest.mark.slow
def test_crop_is_basic_without_the_flip():
    x = images(40, 8)
    cropped, flipped = (pixels_of(augmented(name, x, keys(40))) for name in ("crop", "basic"))
    flips = 0
    for image, result, other in zip(x, cropped, flipped, strict=True):
        places = [place for place, window in windows(image, 1) if (window == result).all()]
        assert [flip for *_, flip in places] == [False]
        flips += (other != result).any()
        np.testing.assert_array_equal(other, result if (other == result).all() else result[:, ::-1])
    assert 10 < flips < 30


@pytest.mark.parametrize(
    ("padding", "mode", "numpy_mode"),
    [(3, "zeros", "constant"), (3, "reflect", "reflect"), (6, "reflect", "reflect")],
)
def test_padding_is_that_of_numpy(padding, mode, numpy_mode):
    x = images(12, 8)
    out = pixels_of(augmented("crop", x, keys(12), crop_padding=padding, crop_mode=mode))
    found = set()
    for image, result in zip(x, out, strict=True):
        plain = [each for each in windows(image, padding, numpy_mode) if not each[0][2]]
        matches = [place for place, window in plain if (window == result).all()]
        assert len(matches) == 1
        found |= {*matches}
    assert len(found) > 8
    assert {max(place[:2]) for place in found} - {*range(padding)}, "never beyond the middle"


@pytest.mark.slow
def test_a_given_padding_holds_for_every_view():
    """Also of an eighth of the size, as without one."""
    x = np.repeat(images(6, 1), 8 * 8, axis=1).reshape(6, 8, 8, 3)  # each of one colour
    whole = augmented("strong", x, keys(6), crop_padding=0)
    np.testing.assert_allclose(whole, np.broadcast_to(whole[:, :1, :1], whole.shape), atol=1e-6)
    given = augmented("basic", x, keys(6), crop_padding=1)
    np.testing.assert_array_equal(given, augmented("basic", x, keys(6)))


@pytest.mark.parametrize("side", [4, 3])
def test_cutout_is_a_square_around_any_pixel_clipped_at_the_borders(side):
    size, count = 6, 3000
    x = np.repeat(images(1, size), count, axis=0)
    plain = (x[0] / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    out = augmented("none", x, keys(count), mean=MEAN, std=STD, cutout=side)
    covered = (out == 0).all(-1)
    kept = np.repeat(plain[None], count, 0)[~covered]
    np.testing.assert_allclose(out[~covered], kept, rtol=0, atol=1e-6)
    expected = {}
    for centre in np.ndindex(size, size):
        hole = np.zeros((size, size), bool)
        first = [max(0, place - side // 2) for place in centre]
        last = [max(0, place - side // 2 + side) for place in centre]
        hole[first[0] : last[0], first[1] : last[1]] = True
        expected[hole.tobytes()] = hole
    assert len(expected) == size**2
    drawn = [expected[hole.tobytes()] for hole in covered]
    shares = np.bincount([[*expected].index(hole.tobytes()) for hole in covered]) / count
    np.testing.assert_allclose(shares, 1 / size**2, atol=0.015)
    wanted = np.mean([hole.mean() for hole in expected.values()])
    assert np.mean(drawn) == pytest.approx(wanted, abs=0.01)
    assert wanted < side**2 / size**2


@pytest.mark.slow
def test_cutout_leaves_the_rest_of_a_view_as_it_is():
    x = images(8, 8)
    whole = augmented("basic", x, keys(8), mean=MEAN, std=STD)
    out = augmented("basic", x, keys(8), mean=MEAN, std=STD, cutout=4)
    covered = (out == 0).all(-1)
    assert (covered.sum((1, 2)) <= 16).all()
    assert (covered.sum((1, 2)) >= 4).all()
    np.testing.assert_allclose(out[~covered], whole[~covered], rtol=0, atol=1e-6)
    evaluated = compiled("basic", mean=MEAN, std=STD, cutout=4)({"x": x}, None, False)["x"]
    assert not (evaluated == 0).all(-1).any()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("crop", {"crop_padding": 8}, "crop_padding is 8: a number below the images' side, 8,"),
        ("crop", {"crop_padding": -1}, "crop_padding is -1: a whole number of at least 0"),
        ("crop", {"crop_padding": 1.5}, r"crop_padding is 1\.5: a whole number"),
        ("crop", {"crop_mode": "mirror"}, "crop_mode is 'mirror': allowed are zeros, reflect"),
        ("none", {"crop_padding": 4}, "crop_padding is 4, but augmentation 'none' does not crop"),
        ("none", {"crop_mode": "reflect"}, "does not crop: basic, crop, strong, two_views do"),
        ("none", {"cutout": 9}, "cutout is 9: at most the images' side, 8, is allowed"),
        ("basic", {"cutout": -2}, "cutout is -2: a whole number of at least 0"),
    ],
)
def test_options_that_do_not_fit(name, options, said):
    inputs = ImageInputs((16, 8, 3), MEAN, STD)
    with pytest.raises(ValueError, match=said) as error:
        inputs.transform(name, **options)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=said):
        augment.get(name, **UNIT, **options)({"x": images(4, 8)}, keys(4), True)


def test_basic_draws_shifts_and_flips_uniformly():
    count = 1500
    x = np.repeat(images(1, 8), count, axis=0)
    out = np.round(augmented("basic", x, keys(count)) * 255).astype(np.uint8)
    table = {window.tobytes(): place for place, window in windows(x[0], 1)}
    places = [table[result.tobytes()] for result in out]
    assert len(set(places)) == 18
    np.testing.assert_allclose(np.mean([flip for *_, flip in places]), 0.5, atol=0.05)
    for axis in (0, 1):
        share = np.bincount([place[axis] for place in places]) / count
        np.testing.assert_allclose(share, 1 / 3, atol=0.05)


@pytest.mark.slow
def test_strong_jitters_and_greys_at_the_stated_rates():
    count = 2000
    x = np.full((count, 8, 8, 3), (200, 100, 50), np.uint8)
    centre = augmented("strong", x, keys(count))[:, 4, 4]
    gray = np.ptp(centre, axis=1) < 1e-6
    unchanged = np.abs(centre - np.array((200, 100, 50)) / 255).max(axis=1) < 1e-6
    assert gray.mean() == pytest.approx(0.2, abs=0.03)
    assert unchanged[~gray].mean() == pytest.approx(0.2, abs=0.03)


def luma(image):
    return image @ np.array([0.2989, 0.587, 0.114])


def test_colour_jitter_equals_its_definition():
    """The definition of torchvision's four operations, in NumPy and colorsys."""
    image = images(1, 6)[0].astype(np.float32) / 255
    jitter = jax.jit(augment.colour_jitter)
    for seed in range(8):
        key = jax.random.key(seed)
        b, c, s, h = np.asarray(jax.random.uniform(key, (4,), minval=-1.0), np.float64)
        expected = np.clip(image * (1 + 0.4 * b), 0, 1)
        mean, factor = luma(expected).mean(), 1 + 0.4 * c
        expected = np.clip(factor * expected + (1 - factor) * mean, 0, 1)
        gray, factor = luma(expected)[..., None], 1 + 0.4 * s
        expected = np.clip(factor * expected + (1 - factor) * gray, 0, 1)
        for index in np.ndindex(6, 6):
            hue, saturation, value = colorsys.rgb_to_hsv(*expected[index])
            expected[index] = colorsys.hsv_to_rgb((hue + 0.1 * h) % 1, saturation, value)
        np.testing.assert_allclose(jitter(key, image), expected, atol=1e-5)


def test_jitter_of_one_channel_changes_brightness_and_contrast():
    image = images(1, 6, channels=1)[0].astype(np.float32) / 255
    out = augment.colour_jitter(jax.random.key(0), image)
    assert out.shape == image.shape
    assert (out != image).any()


def test_two_views_are_a_basic_and_then_a_strong_view():
    x, key_array = images(8), keys(8)
    weak, strong = np.split(augmented("two_views", x, key_array), 2)
    np.testing.assert_array_equal(weak, augmented("basic", x, key_array))
    assert (np.abs(weak - strong).reshape(8, -1).max(1) > 0.01).all()


@pytest.mark.slow
def test_two_views_draw_separately():
    count = 200
    x = np.repeat(images(1, 8), count, axis=0)
    weak, strong = np.split(augmented("two_views", x, keys(count)), 2)
    border = [(view == 0).all(axis=-1)[:, 0, 3] for view in (weak, strong)]
    assert np.mean(border[0] & border[1]) == pytest.approx(1 / 9, abs=0.07)


@pytest.mark.parametrize(
    ("name", "mean", "std", "match"),
    [
        ("basics", MEAN, STD, "none, basic, crop, strong, two_views"),
        (None, MEAN, STD, "augmentation None"),
        ("basic", MEAN, (0.2,), "as many"),
        ("basic", MEAN, (0.2, 0.0, 0.2), "above 0"),
    ],
)
def test_bad_arguments(name, mean, std, match):
    with pytest.raises(ValueError, match=match):
        augment.get(name, mean=mean, std=std)


@pytest.mark.parametrize("shape", [(4, 8, 8, 1), (8, 8, 3)])
def test_bad_images(shape):
    with pytest.raises(ValueError, match=r"x is .* is needed"):
        augment.get("none", mean=MEAN, std=STD)({"x": np.zeros(shape, np.uint8)}, None, False)
