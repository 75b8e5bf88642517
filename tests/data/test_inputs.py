"""What a model reads, of whatever a user has."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import text_sets
from PIL import Image

from jdecouple import data
from jdecouple.data.inputs import ImageInputs, TextInputs, from_json, image_paths

COLOUR = ImageInputs((4, 6, 3), (0.5,) * 3, (0.25,) * 3)
GREY = ImageInputs((4, 6, 1), (0.5,), (0.25,))
WORDS = TextInputs(("[padding]", "[unknown]", "the", "film", "naïve"), max_length=4)


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def saved(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


class TestImages:
    def test_arrays_stay_as_they_are(self):
        images = pixels(5, 4, 6, 3)
        for given in (images, [*images], jnp.asarray(images)):
            found = COLOUR.encode(given)
            assert found.dtype == np.uint8
            np.testing.assert_array_equal(found, images)
        np.testing.assert_array_equal(COLOUR.encode(images[2]), images[2:3])

    def test_one_channel_may_be_left_out(self):
        images = pixels(5, 4, 6)
        for given in (images, images[..., None], [*images]):
            np.testing.assert_array_equal(GREY.encode(given), images[..., None])
        np.testing.assert_array_equal(GREY.encode(images[0]), images[:1, ..., None])
        square = ImageInputs((4, 4, 1), (0.5,), (0.25,))
        assert square.encode(pixels(4, 4, 4)).shape == (4, 4, 4, 1)
        assert square.encode(pixels(4, 4, 1)).shape == (1, 4, 4, 1)

    def test_floats(self):
        images = pixels(5, 4, 6, 3)
        found = COLOUR.encode(images / 255)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, (images / 255).astype(np.float32))
        trained_on_floats = ImageInputs(COLOUR.image_shape, COLOUR.mean, COLOUR.std, "float32")
        np.testing.assert_array_equal(
            trained_on_floats.encode(images), images.astype(np.float32) / np.float32(255)
        )
        assert trained_on_floats.encode(images * 1.0).max() > 1

    def test_files_pictures_and_folders(self, tmp_path):
        """As a folder of images is read: turned, coloured, resized."""
        images = [pixels(4, 6, 3), pixels(12, 12, 3), pixels(9, 7)]
        files = [saved(tmp_path / f"a/{n}.png", image) for n, image in enumerate(images)]
        (tmp_path / "a" / "notes.txt").write_text("no image")
        wanted = np.concatenate([COLOUR.encode(file) for file in files])
        np.testing.assert_array_equal(wanted[0], images[0])
        for given in (
            tmp_path,
            str(tmp_path),
            files,
            [*map(str, files)],
            [*map(Image.open, files)],
        ):
            np.testing.assert_array_equal(COLOUR.encode(given), wanted)
        assert image_paths(tmp_path) == [*map(str, files)]
        mixed = COLOUR.encode([files[1], images[0] / 255])
        np.testing.assert_allclose(mixed, wanted[[1, 0]] / np.float32(255), rtol=1e-6)
        assert GREY.encode(files).shape == (3, 4, 6, 1)

    @pytest.mark.parametrize(
        ("given", "kind", "said"),
        [
            (pixels(5, 4, 6), ValueError, r"images are uint8\[5, 4, 6\]: uint8, .* \[n, 4, 6, 3\]"),
            (pixels(3, 3, 4, 6), ValueError, r"images are uint8\[3, 3, 4, 6\]"),
            (pixels(4, 6, 3) * 1, ValueError, r"images are int64\[1, 4, 6, 3\]|uint8"),
            (pixels(4, 6, 3) * 1.0, ValueError, "float pixels are from .*: 0..1 is needed"),
            (np.full((4, 6, 3), np.nan), ValueError, "float pixels are from nan to nan"),
            ([], ValueError, "there are no images"),
            (pixels(0, 4, 6, 3), ValueError, "there are no images"),
            (None, TypeError, "NoneType is given: an image or several are needed"),
            ("nowhere.png", ValueError, "'nowhere.png': No such file"),
        ],
    )
    def test_refused(self, given, kind, said):
        if isinstance(given, np.ndarray) and given.shape == (4, 6, 3) and given.dtype == np.uint8:
            given = given.astype(np.int64)
        with pytest.raises(kind, match=said) as error:
            COLOUR.encode(given)
        assert "\n" not in str(error.value)

    def test_an_empty_folder_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="holds no images"):
            COLOUR.encode(tmp_path)


class TestTexts:
    def test_texts(self):
        wanted = [[2, 4, 3, 1], [3, 0, 0, 0]]
        texts = ["The nai\u0308ve film ends badly", "film"]
        for given in (texts, tuple(texts), np.array(texts), np.array(texts, object)):
            found = WORDS.encode(given)
            assert found.dtype == np.int32
            np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(WORDS.encode(texts[1]), wanted[1:])
        np.testing.assert_array_equal(WORDS.encode(["", "the"]), [[1, 0, 0, 0], [2, 0, 0, 0]])

    def test_numbers(self):
        for given in ([2, 3], (2, 3), np.array([[2, 3]]), [[2, 3]], jnp.array([2, 3])):
            np.testing.assert_array_equal(WORDS.encode(given), [[2, 3, 0, 0]])

    @pytest.mark.parametrize("clean", ["none", "punctuation", "paper"])
    def test_as_the_data_set_encodes(self, tmp_path, clean):
        name = text_sets.csv_set(tmp_path, longest=30)
        loaded = data.load(name, max_length=12, clean=clean)
        texts = [text for _, text in text_sets.examples(16, seed=1, longest=30)]
        wanted = loaded.test.gather(np.arange(16))["x"]
        np.testing.assert_array_equal(loaded.inputs.encode(texts), wanted)
        again = from_json(json.loads(json.dumps(loaded.inputs.to_json())))
        np.testing.assert_array_equal(again.encode(texts), wanted)
        assert ("the" in loaded.words) == (clean != "paper")

    @pytest.mark.parametrize(
        ("given", "kind", "said"),
        [
            ([], ValueError, "there are no texts"),
            (["a", None], TypeError, "a text is a NoneType: a str is needed"),
            (b"a", ValueError, r"numbers of words are \|S1\[\]"),
            ([2.5], TypeError, "a text is a float"),
            ([2, 3, 4, 2, 2], ValueError, r"are int64\[5\]: .* at most 4 words"),
            ([2, 9], ValueError, "from 2 to 9: 0..4 is needed"),
            (3, ValueError, r"numbers of words are int64\[\]"),
            (np.zeros((0, 3), int), ValueError, r"int64\[0, 3\]"),
        ],
    )
    def test_refused(self, given, kind, said):
        with pytest.raises(kind, match=said) as error:
            WORDS.encode(given)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "inputs",
    [COLOUR, GREY, WORDS, TextInputs(("a", "b\n"), 3, 7), TextInputs(("a",), 3, clean="paper")],
)
def test_json(inputs):
    assert from_json(json.loads(json.dumps(inputs.to_json()))) == inputs


def test_json_of_earlier_versions_has_nothing_taken_out():
    written = WORDS.to_json()
    del written["clean"]
    assert from_json(written) == WORDS


def test_many_words_stay_small():
    words = tuple(f"word{number}" for number in range(30_000))
    inputs = TextInputs(words, 9)
    inputs.encode("word7")  # what it remembers is not written
    assert len(json.dumps(inputs.to_json())) < 150_000


def test_given_vectors_are_known_by_their_width():
    inputs = TextInputs(WORDS.words, 4, 7)
    assert inputs.model_arguments()["embeddings"].shape == (5, 7)
    assert WORDS.model_arguments()["embeddings"] is None


class TestClassNames:
    def test_of_built_in_sets(self):
        assert data.load("digits").class_names == tuple("0123456789")
        assert data.load("synthetic", num_classes=3).class_names == ("0", "1", "2")

    def test_of_folders(self, tmp_path):
        for number, name in enumerate(("cat", "a dog", "cat", "a dog") * 3):
            saved(tmp_path / name / f"{number}.png", pixels(4, 4))
        assert data.load(f"folder:{tmp_path}").class_names == ("a dog", "cat")

    def test_of_tables(self, tmp_path):
        rows = [("10", "a b"), ("9", "c d"), ("no", "e")] * 5
        path = text_sets.write_csv(tmp_path / "set.csv", rows, ("label", "text"))
        assert data.load(f"csv:{path}").class_names == ("9", "10", "no")

    def test_of_a_users_own(self):
        split = data.from_arrays(pixels(6, 4, 4, 1), np.arange(6) % 2, num_classes=2)
        arguments = ("own", split, split, split, 2, (4, 4, 1), (0.5,), (0.25,))
        assert data.ImageDataset(*arguments).class_names == ("0", "1")
        assert data.ImageDataset(*arguments, class_names=("no", "yes")).class_names == ("no", "yes")
        with pytest.raises(ValueError, match="'own' has 3 class names: 2 are needed"):
            data.ImageDataset(*arguments, class_names=("a", "b", "c"))
