"""Text data sets: from TFDS, CSV and Parquet files, as numbers of words."""

import builtins
import sys

import numpy as np
import pytest
from text_sets import csv_set, everything, examples, refused, text, write_csv
from tfds_writer import write_text_set

from jdecouple import data


class TestDataset:
    def test_words_and_labels(self, tmp_path):
        loaded = data.load(csv_set(tmp_path), max_length=6)
        batch = everything(loaded.train)
        assert (batch["x"].dtype, batch["x"].shape) == (np.int32, (58, 6))
        assert batch["label"].dtype == np.int32
        assert set(batch["label"]) == {0, 1}
        assert (len(loaded.validation), len(loaded.test), loaded.num_classes) == (6, 16, 2)
        assert loaded.kind == "texts"
        assert loaded.model_arguments() == {
            "vocabulary_size": len(loaded.words),
            "max_length": 6,
            "embeddings": None,
        }

    def test_texts_come_back(self, tmp_path):
        rows = [(0, "one two three"), (1, "four"), (0, "one"), (1, "two")] * 5
        write_csv(tmp_path / "train.csv", rows)
        write_csv(tmp_path / "test.csv", [(1, "two seven one nine")])
        loaded = data.load(f"csv:{tmp_path}", validation=0)
        assert [text(loaded, "train", row) for row in range(4)] == [each for _, each in rows[:4]]
        assert text(loaded, "test", 0) == "two [unknown] one [unknown]"
        np.testing.assert_array_equal(loaded.train.lengths[:4], [3, 1, 1, 1])
        assert everything(loaded.train)["x"].shape == (20, 256)

    def test_the_vocabulary_is_of_the_training_split_alone(self, tmp_path):
        write_csv(tmp_path / "train.csv", [(n % 2, f"word{n}") for n in range(40)])
        write_csv(tmp_path / "validation.csv", [(0, "other")] * 2)
        write_csv(tmp_path / "test.csv", [(0, "another")] * 2)
        own = data.load(f"csv:{tmp_path}")
        assert set(own.words[2:]) == {f"word{n}" for n in range(40)}
        assert text(own, "validation", 0) == text(own, "test", 1) == "[unknown]"
        cut = data.load(f"csv:{tmp_path}", validation=10)
        assert set(cut.words[2:]) == {f"word{n}" for n in cut.train.indices}
        assert set(everything(cut.validation)["x"][:, 0]) == {1}

    def test_vocabulary_size(self, tmp_path):
        name = csv_set(tmp_path)
        assert len(data.load(name, vocabulary_size=7).words) == 7
        assert data.load(name, vocabulary_size=7).words == data.load(name).words[:7]
        numbers = everything(data.load(name, vocabulary_size=7).train)["x"]
        assert set(np.unique(numbers)) == set(range(7))

    def test_label_noise(self, tmp_path):
        name = csv_set(tmp_path, train=400)
        clean, noisy = data.load(name), data.load(name, label_noise=0.5, seed=1)
        changed = (everything(clean.train)["label"] != everything(noisy.train)["label"]).mean()
        assert 0.15 < changed < 0.35
        np.testing.assert_array_equal(everything(clean.train)["x"], everything(noisy.train)["x"])
        for split in ("validation", "test"):
            np.testing.assert_array_equal(
                everything(getattr(clean, split))["label"],
                everything(getattr(noisy, split))["label"],
            )

    def test_glove(self, tmp_path):
        (tmp_path / "vectors.txt").write_text("film 1 2 3\ngood 4 5 6\n")
        loaded = data.load(csv_set(tmp_path), glove=tmp_path / "vectors.txt")
        embeddings = loaded.model_arguments()["embeddings"]
        assert embeddings.shape == (len(loaded.words), 3)
        np.testing.assert_array_equal(embeddings[loaded.words.index("good")], [4, 5, 6])
        refused("none.txt", csv_set(tmp_path), FileNotFoundError, glove=tmp_path / "none.txt")

    @pytest.mark.parametrize(
        "option", [{"max_length": 0}, {"max_length": 2.5}, {"vocabulary_size": 2}]
    )
    def test_bad_sizes(self, tmp_path, option):
        refused(f"{next(iter(option))} is", csv_set(tmp_path), **option)

    def test_options_of_the_other_kind(self, tmp_path):
        refused("max_length is 9: data set 'digits' holds images", "digits", max_length=9)
        refused("clean is 'paper': data set 'digits' holds images", "digits", clean="paper")
        refused("image_size is 9: .* holds texts", csv_set(tmp_path), image_size=9)
        refused(r"mean is \(0\.5,\): .* holds texts", csv_set(tmp_path), mean=(0.5,))
        refused("clean is 'all': allowed are none, punct", csv_set(tmp_path), clean="all")

    def test_texts_are_not_augmented(self, tmp_path):
        loaded = data.load(csv_set(tmp_path))
        assert loaded.transform("none") is None
        with pytest.raises(
            ValueError, match=r"augmentation 'basic': allowed for the texts .* is none"
        ):
            loaded.transform("basic")
        with pytest.raises(ValueError, match=r"cutout is 4: it is for images, .* holds texts"):
            loaded.transform("none", cutout=4)

    def test_images_have_no_lengths(self):
        with pytest.raises(ValueError, match="train split has no lengths"):
            _ = data.load("digits").train.lengths


class TestTFDS:
    """Prepared sets written to disk by the test, under the names of real ones."""

    def test_reads_texts_and_labels(self, tmp_path):
        rows = {"train": examples(30, num_classes=3), "test": examples(9, num_classes=3, seed=1)}
        write_text_set(tmp_path, "tiny", rows, num_classes=3)
        tiny = data.load("tiny", data_dir=tmp_path)
        assert (tiny.num_classes, len(tiny.train), len(tiny.validation)) == (3, 27, 3)
        for row, index in enumerate(tiny.train.indices):
            assert text(tiny, "train", row) == rows["train"][index][1]
        np.testing.assert_array_equal(everything(tiny.test)["label"], [0, 1, 2] * 3)

    def test_ag_news_joins_title_and_description(self, tmp_path):
        news = [(label, f"title{label}", f"body{label}") for label in (0, 1, 2, 3)] * 5
        columns = ("title", "description")
        splits = {"train": news, "test": news}
        write_text_set(tmp_path, "ag_news_subset", splits, columns=columns, num_classes=4)
        loaded = data.load("ag_news_subset", data_dir=tmp_path)
        assert {text(loaded, "test", row) for row in range(4)} == {
            f"title{label} body{label}" for label in range(4)
        }

    def test_imdb_leaves_out_what_has_no_labels(self, tmp_path):
        splits = {"train": examples(20), "test": examples(8), "unsupervised": [(-1, "x")] * 9}
        write_text_set(tmp_path, "imdb_reviews/plain_text", splits)
        loaded = data.load("imdb_reviews", data_dir=tmp_path)
        assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (18, 2, 8)

    def test_hidden_test_labels_leave_the_validation_split_as_the_test_split(self, tmp_path):
        splits = {"train": examples(40), "validation": examples(8, seed=1), "test": [(-1, "x")] * 5}
        write_text_set(tmp_path, "glue/sst2", splits, columns=("sentence",), version="2.0.0")
        loaded = data.load("glue/sst2", data_dir=tmp_path)
        assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (36, 4, 8)
        assert text(loaded, "test", 0) == splits["validation"][0][1]

    def test_label_out_of_range(self, tmp_path):
        splits = {"train": examples(10), "test": [(0, "a"), (-1, "b")]}
        write_text_set(tmp_path, "tiny", splits)
        refused("'test': example 1 has label -1", "tiny", data_dir=tmp_path)

    def test_shard_truncated(self, tmp_path):
        write_text_set(tmp_path, "tiny", {"train": examples(300), "test": examples(8)})
        shard = next(tmp_path.rglob("*-train.array_record*"))
        shard.write_bytes(shard.read_bytes()[:2000])
        refused("split 'train'.*cannot be read", "tiny", data_dir=tmp_path)

    def test_no_label(self, tmp_path):
        folder = write_text_set(tmp_path, "tiny", {"train": examples(9), "test": examples(9)})
        features = folder / "features.json"
        features.write_text(features.read_text().replace("class_label_feature.ClassLabel", "x.Y"))
        refused("tiny", "tiny", data_dir=tmp_path)

    @pytest.mark.slow
    def test_real_sst2(self, tfds_dir):
        loaded = data.load("glue/sst2", data_dir=tfds_dir, max_length=15)
        assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (60614, 6735, 872)
        assert np.bincount(everything(loaded.test)["label"]).tolist() == [428, 444]
        assert loaded.words[2:6] == ("the", ",", "a", "and")
        unknown = everything(loaded.test)["x"] == 1
        assert unknown.sum() / loaded.test.lengths.sum() < 0.06
        assert text(loaded, "test", 2).startswith("i am sorry that i was unable to get")


class TestCSV:
    def test_columns_by_name(self, tmp_path):
        rows = [("a title", "1", "a, body"), ("other", "0", 'with "quotes"\nand lines')] * 6
        for split in ("train", "test"):
            write_csv(tmp_path / f"{split}.csv", rows, header=("title", "Label", "content"))
        loaded = data.load(f"csv:{tmp_path}")
        assert text(loaded, "test", 0) == "a title a , body"
        assert text(loaded, "test", 1) == 'other with " quotes " and lines'
        np.testing.assert_array_equal(everything(loaded.test)["label"][:2], [1, 0])

    def test_labels_count_from_any_number_or_are_words(self, tmp_path):
        """DBpedia's classes are 1 to 14; 10 comes after 9."""
        rows = [(label, "title", "text") for label in range(1, 15)] * 2
        write_csv(tmp_path / "one" / "train.csv", rows)
        write_csv(tmp_path / "one" / "test.csv", rows)
        numbered = data.load("csv:one", data_dir=tmp_path)
        assert numbered.num_classes == 14
        np.testing.assert_array_equal(everything(numbered.test)["label"][:14], range(14))
        write_csv(tmp_path / "two" / "train.csv", [("pos", "x"), ("neg", "y")] * 5)
        write_csv(tmp_path / "two" / "test.csv", [("neg", "y")])
        assert everything(data.load("csv:two", data_dir=tmp_path).test)["label"].tolist() == [0]

    def test_a_single_file(self, tmp_path):
        path = write_csv(tmp_path / "all.csv", examples(100))
        loaded = data.load(f"csv:{path}")
        assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (72, 8, 20)
        assert np.bincount(everything(loaded.test)["label"]).tolist() == [10, 10]

    def test_several_files_and_a_byte_order_mark(self, tmp_path):
        for number in (0, 1):
            (tmp_path / f"train-{number}.csv").write_text(f"\ufeff0,a{number}\n1,b{number}\n")
        write_csv(tmp_path / "test.csv", [(0, "a1")])
        loaded = data.load(f"csv:{tmp_path}", validation=0)
        assert [text(loaded, "train", row) for row in range(4)] == ["a0", "b0", "a1", "b1"]

    def test_a_long_text(self, tmp_path):
        write_csv(tmp_path / "train.csv", [(0, "word " * 40_000), (1, "x")])
        write_csv(tmp_path / "test.csv", [(0, "word")])
        assert data.load(f"csv:{tmp_path}", validation=0).train.lengths.tolist() == [256, 1]

    def test_few_examples_of_named_labels(self, tmp_path):
        """Without a header the same labels are taken for texts."""
        for split in ("train", "test"):
            (tmp_path / f"{split}.csv").write_text("label,text\ngood,a\nbad,b\nfair,c\n")
        assert data.load(f"csv:{tmp_path}", validation=0).num_classes == 3

    @pytest.mark.parametrize(
        ("train", "said"),
        [
            ("0,a\n1\n", r"train.csv', line 2 has 1 column\(s\)"),
            ("0,a\n1,b,c\n", r"line 2 has 3 column\(s\).*as in the first line \(2\)"),
            ("0\n1\n", r"line 1 has 1 column"),
            ("0,a\n0,b\n", r"2 training examples have 1 label\(s\): at least 2"),
            ("", r"0 training examples have 0 label\(s\)"),
            ('0,a\n1,"b\n', r"cannot be read as CSV"),
            ("0,a\n2,b\n", r"split 'test': example 1 has label 1, which no training example has"),
            ('0,a\n" ",b\n', r"train.csv', line 2: the label is empty"),
            ("what,sort\na,x\nb,y\nb,y\nwhat,y\n", r"3 different labels, such as 'what'.* among 5"),
        ],
    )
    def test_bad_files(self, tmp_path, train, said):
        (tmp_path / "train.csv").write_text(train)
        write_csv(tmp_path / "test.csv", [(0, "a"), (1, "b")])
        refused(said, f"csv:{tmp_path}")

    def test_signs_and_many_digits(self, tmp_path):
        """What Python makes no number of is a word."""
        huge = "1" * 5000
        rows = [(label, "x") for label in ("+-5", huge, "+1", "-1")] * 2
        path = write_csv(tmp_path / "train.csv", rows)
        write_csv(tmp_path / "test.csv", rows[:4])
        loaded = data.load(f"csv:{path.parent}", validation=0)
        assert everything(loaded.test)["label"].tolist() == [2, 3, 1, 0]

    def test_not_utf8(self, tmp_path):
        (tmp_path / "train.csv").write_bytes(b"0,\xff\xfe\n1,b\n")
        refused("cannot be read as CSV in UTF-8", f"csv:{tmp_path}")

    def test_missing_files(self, tmp_path):
        refused("there is no file or folder", "csv:", FileNotFoundError)
        refused("there is no file or folder", f"csv:{tmp_path}/none", FileNotFoundError)
        refused("there is no 'train.csv'", f"csv:{tmp_path}")
        write_csv(tmp_path / "train.csv", examples(8))
        refused(r"are \['train'\]: 'train' and 'test'", f"csv:{tmp_path}")


class TestParquet:
    @pytest.fixture
    def write(self, tmp_path):
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")

        def written(**files):
            for name, columns in files.items():
                parquet.write_table(arrow.table(columns), tmp_path / f"{name}.parquet")
            return f"parquet:{tmp_path}"

        return written

    def test_columns_of_texts(self, write):
        columns = {"id": [7, 8], "title": ["a", "c"], "label": [3, 5], "content": ["b", "d"]}
        loaded = data.load(write(train=columns, test=columns), validation=0)
        assert (text(loaded, "train", 1), loaded.num_classes) == ("c d", 2)
        np.testing.assert_array_equal(everything(loaded.test)["label"], [0, 1])

    def test_equals_the_same_set_as_csv(self, write, tmp_path):
        def columns(rows):
            return {"label": [label for label, _ in rows], "text": [each for _, each in rows]}

        name = csv_set(tmp_path / "csv")
        wanted = data.load(name)
        found = data.load(write(train=columns(examples(64)), test=columns(examples(16, seed=1))))
        assert found.words == wanted.words
        for split in ("train", "validation", "test"):
            here, there = everything(getattr(found, split)), everything(getattr(wanted, split))
            np.testing.assert_array_equal(here["x"], there["x"])
            np.testing.assert_array_equal(here["label"], there["label"])

    def test_bad_files(self, write, tmp_path):
        name = write(train={"text": ["a"], "sort": [1]}, test={"label": [1], "text": ["a"]})
        refused(
            r"has the columns text, sort: none is called 'label', 'class'.*give label_column", name
        )
        refused(
            "row 1 lacks its label or a text", write(train={"label": [1, None], "text": ["a"] * 2})
        )
        refused(
            "row 0 has label 0.0: a whole", write(train={"label": [0.0, 1.0], "text": ["a"] * 2})
        )
        refused("has the columns", write(train={"label": [0, 1], "text": [["a"], ["b"]]}))
        (tmp_path / "train.parquet").write_bytes(b"nothing")
        refused("train.parquet' cannot be read", name)

    def test_damaged_pages(self, write, tmp_path):
        name = write(train={"label": [0, 1] * 50, "text": [f"text {n}" for n in range(100)]})
        whole = (tmp_path / "train.parquet").read_bytes()
        (tmp_path / "train.parquet").write_bytes(whole[:30] + b"\xff" * 200 + whole[230:])
        refused("train.parquet' cannot be read", name)

    def test_categories_and_views(self, write):
        arrow = pytest.importorskip("pyarrow")
        wanted = {"label": ["a", "b"] * 4, "text": ["x", "y"] * 4}
        categories = {key: arrow.array(each).dictionary_encode() for key, each in wanted.items()}
        views = {**wanted, "text": arrow.array(wanted["text"], arrow.string_view())}
        for columns in (categories, views):
            loaded = data.load(write(train=columns, test=columns), validation=0)
            assert [text(loaded, "train", row) for row in range(2)] == ["x", "y"]
            assert everything(loaded.test)["label"].tolist() == [0, 1] * 4

    def test_without_pyarrow(self, tmp_path, monkeypatch):
        def no_arrow(name, *rest):
            if name.startswith("pyarrow"):
                raise ImportError(name)
            return imported(name, *rest)

        imported = builtins.__import__
        for name in [name for name in sys.modules if name.startswith("pyarrow")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(builtins, "__import__", no_arrow)
        (tmp_path / "train.parquet").touch()
        refused(r"needs pyarrow: pip install 'jdecouple\[parquet\]'", f"parquet:{tmp_path}")
