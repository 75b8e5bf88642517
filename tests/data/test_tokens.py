"""Texts to go on with: documents as rows of tokens, each with the next one as its label."""

import json
from pathlib import Path

import numpy as np
import pytest
from tfds_writer import write_plain_texts

from jdecouple import data
from jdecouple.data import corpora
from jdecouple.data.inputs import from_json
from jdecouple.data.token_inputs import TokenInputs
from jdecouple.data.tokens import TokenSource

MANY = {f"{n:02}.txt": f"document {n}\n" * (n + 1) for n in range(20)}


def write(folder: Path, texts: dict[str, str | bytes]) -> str:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return f"text:{folder}"


def documents(split: data.Split, tokenizer: data.Tokenizer) -> list[str]:
    """What the labels of a split say, without its padding."""
    labels = split.gather(np.arange(len(split)))["label"].ravel()
    parts = np.split(labels, np.flatnonzero(labels == 0))
    return [tokenizer.decode(part[part > 0]) for part in parts]


class TestRows:
    def test_every_token_is_a_label_once_and_the_input_before_it(self):
        texts = [np.arange(1, 6), np.arange(10, 12), np.arange(20, 27)]
        stream = [0, 1, 2, 3, 4, 5, 0, 10, 11, 0, 20, 21, 22, 23, 24, 25, 26, 0]
        source = TokenSource([text.astype(np.int32) for text in texts], 5)
        x, label = source.gather(np.arange(len(source)))
        assert x.dtype == label.dtype == np.int32
        assert x.shape == label.shape == (4, 5)
        assert source.num_labels == 17
        np.testing.assert_array_equal(label.ravel(), [*stream[1:], -1, -1, -1])
        np.testing.assert_array_equal(x.ravel(), [*stream, 0, 0])
        whole = TokenSource([text.astype(np.int32) for text in texts], 5, padded=False)
        assert len(whole) == 3
        np.testing.assert_array_equal(whole.gather(np.array([2]))[0], x[2:3])

    def test_training_rows_are_full_and_the_others_hold_everything(self, tmp_path):
        tokens = data.load(write(tmp_path, MANY), max_length=16)
        sizes = {}
        for split in (tokens.train, tokens.validation, tokens.test):
            rows = split.gather(np.arange(len(split)))
            assert (rows["label"][:-1] >= 0).all()
            assert ((rows["label"] >= 0).all()) == (split.name == "train")
            sizes[split.name] = (rows["label"] >= 0).sum()
        held = [text for name in ("validation", "test") for text in _said(tokens, name)]
        assert len(held) == 4
        assert {*held} <= {*MANY.values()}
        assert not {*held} & {*_said(tokens, "train")}
        for name in ("validation", "test"):  # bytes and documents over labels
            own = _said(tokens, name)
            count = sum(map(len, own)) + len(own)
            assert sizes[name] == count
            assert tokens.bytes_per_token[name] == sum(map(len, own)) / count


def _said(tokens: data.TokenDataset, split: str) -> list[str]:
    return [each for each in documents(getattr(tokens, split), tokens.tokenizer) if each]


class TestFiles:
    def test_the_list_is_sorted_and_leaves_out_what_is_no_text(self, tmp_path):
        write(tmp_path, {"b/1.txt": "one", "a.txt": "two", ".hidden": "no", "c.bin": b"\0no"})
        write(tmp_path, {"b/__pycache__/1.pyc": "no", "d.txt": " \n", "b/.git/x": "no"})
        assert corpora.from_files(f"text:{tmp_path}", None) == {"train": [b"two", b"one"]}
        assert corpora.from_files("text:a.txt", tmp_path) == {"train": [b"two"]}

    def test_stored_splits(self, tmp_path):
        name = write(tmp_path, {"train/1": "one", "train/2": "two", "test.txt": "three"})
        assert corpora.from_files(name, None) == {"train": [b"one", b"two"], "test": [b"three"]}
        write(tmp_path, {"validation.md": "four"})
        splits, _ = corpora.divided(corpora.from_files(name, None), None)
        assert splits == {"train": [b"one", b"two"], "validation": [b"four"], "test": [b"three"]}

    @pytest.mark.parametrize("validation", [None, 0.25, 3, 0])
    def test_documents_are_held_out_whole_by_their_number(self, validation):
        texts = [str(n).encode() for n in range(20)]
        splits, digest = corpora.divided({"train": texts}, validation)
        held = {None: 2, 0.25: 4, 3: 3, 0: 0}[validation]
        assert [len(splits[role]) for role in splits] == [18 - held, held, 2]
        assert sorted(text for held in splits.values() for text in held) == sorted(texts)
        assert corpora.divided({"train": texts}, validation) == (splits, digest)
        assert corpora.divided({"train": [*texts[:-1], b"other"]}, validation)[1] != digest

    def test_of_a_single_document_the_end_is_held_out_at_the_end_of_a_line(self):
        text = b"".join(b"line %d\n" % n for n in range(100))
        splits, _ = corpora.divided({"train": [text]}, None)
        parts = [splits[role][0] for role in ("train", "validation", "test")]
        assert b"".join(parts) == text
        assert all(part.startswith(b"line") and part.endswith(b"\n") for part in parts)
        assert len(parts[2]) == pytest.approx(0.1 * len(text), abs=10)
        with pytest.raises(ValueError, match=r"validation is 3: of a single document a fraction"):
            corpora.divided({"train": [text]}, 3)

    def test_what_comes_with_python(self):
        topics, library = data.load("topics"), data.load("stdlib")
        assert len(topics.train) > 1000
        assert len(library.train) > 20_000
        found = corpora.standard_library()["train"]
        assert found == corpora.standard_library()["train"]
        root = Path(json.__file__).parents[1]
        for name in ("json/encoder.py", "heapq.py"):
            assert (root / name).read_bytes() in found


class TestTokenizers:
    def test_bytes_come_back(self):
        text = "naïve → 😀\n\tdef f(): pass"
        tokenizer = data.Tokenizer()
        assert tokenizer.size == 257
        assert tokenizer.encode(text).min() > 0
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_byte_pairs_are_those_of_training_and_are_kept(self, tmp_path):
        name = write(tmp_path, MANY)
        tokens = data.load(name, tokenizer="bpe", vocabulary_size=270, max_length=8)
        assert tokens.num_classes == tokens.tokenizer.size == 270
        assert tokens.bytes_per_token["test"] > 1.5
        inputs = from_json(json.loads(json.dumps(tokens.inputs.to_json())))
        assert inputs == tokens.inputs
        text = " document 5\nß"
        assert inputs.pieces.decode(inputs.pieces.encode(text)) == text
        assert len(inputs.pieces.encode(text)) < len(text.encode())
        path = tmp_path.parent / f"{tmp_path.name}.json"
        path.write_text(tokens.tokenizer.model)
        again = data.load(name, tokenizer=str(path), max_length=8)
        assert again.inputs == tokens.inputs

    def test_inputs(self):
        inputs = TokenInputs(context=6)
        np.testing.assert_array_equal(
            inputs.encode(["ab", "abcdefg"]), [[0, 98, 99, 0, 0, 0], [0, 98, 99, 100, 101, 102]]
        )
        np.testing.assert_array_equal(inputs.encode([0, 5]), [[0, 5, 0, 0, 0, 0]])
        assert from_json(json.loads(json.dumps(inputs.to_json()))) == inputs
        for bad in ([], [[]], np.ones(7, int), [300], 1.5, [-1], None, ["a", 3]):
            with pytest.raises((ValueError, TypeError)):
                inputs.encode(bad)


class TestTFDS:
    def test_texts_without_labels(self, tmp_path):
        texts = {"train": ["To be, " * 9], "validation": ["or not " * 5], "test": ["to be? " * 5]}
        write_plain_texts(tmp_path, "tiny_shakespeare", texts)
        tokens = data.load("tiny_shakespeare", data_dir=tmp_path, max_length=4)
        assert _said(tokens, "validation") == texts["validation"]
        assert _said(tokens, "test") == texts["test"]
        assert tokens.kind == "tokens"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_noise": 0.1}, "label_noise is 0.1: the labels of tokens are the next tokens"),
        ({"tokenizer": "words"}, "tokenizer is 'words': allowed are 'bytes', 'bpe' and a"),
        ({"tokenizer": "bpe", "vocabulary_size": 256}, "vocabulary_size is 256: at least 257"),
        ({"vocabulary_size": 300}, "vocabulary_size is 300: tokenizer 'bpe' alone takes it"),
        ({"max_length": 10**6}, "the train split has .* at least 1000000"),
        ({"glove": "x"}, "glove is 'x': data set 'topics' holds tokens and takes only: validation"),
        ({"validation": 1000}, "validation is 1000"),
    ],
)
def test_refused(options, words):
    with pytest.raises(ValueError, match=words):
        data.load("topics", **options)
    with pytest.raises(ValueError, match="tokenizer is 'bpe': data set 'digits' holds images"):
        data.load("digits", tokenizer="bpe")


def test_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        data.load(f"text:{tmp_path}/nothing")
    with pytest.raises(ValueError, match="holds no texts"):
        data.load(f"text:{tmp_path}")
    (tmp_path / "file.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no tokenizer"):
        data.load("topics", tokenizer=str(tmp_path / "file.json"))
