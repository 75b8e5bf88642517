"""Which columns of CSV and Parquet files hold the labels and the texts, and what is refused."""

import numpy as np
import pytest
from text_sets import everything, refused, text, write_csv

from jdecouple import data
from jdecouple.data import csv_rows
from jdecouple.train import config as configuration
from jdecouple.train.run import build

ROWS = [(row % 2, f"text {row}") for row in range(12)]
BODY = "".join(f"{label},{each}\n" for label, each in ROWS)


def loaded(path, **options):
    return data.load(f"csv:{path}", validation=0, **options)


@pytest.fixture
def both(tmp_path):
    """Writes the training and the test file."""

    def write(train, test=None):
        for name, content in (("train.csv", train), ("test.csv", train if test is None else test)):
            (tmp_path / name).write_bytes(content.encode())
        return tmp_path

    return write


class TestHeader:
    @pytest.mark.parametrize(
        "header",
        [
            *("target,text", "labels,text", "sentiment,text", "category,text", "y,text"),
            *("Class Index,Title", " CLASS-index ,whatever", "label_id,text", "class,what"),
        ],
    )
    def test_names_of_labels(self, both, header):
        found = loaded(both(f"{header}\n{BODY}"))
        assert (found.num_classes, len(found.train), len(found.test)) == (2, 12, 12)
        assert text(found, "train", 1) == "text 1"

    @pytest.mark.parametrize("header", ["id,text,target", ",review,sentiment", "idx,message,label"])
    def test_numbers_of_rows_are_no_text(self, both, header):
        rows = "".join(f"{row},{each},{label}\n" for row, (label, each) in enumerate(ROWS))
        found = loaded(both(f"{header}\n{rows}"))
        assert (found.num_classes, text(found, "test", 3)) == (2, "text 3")

    def test_published_files(self, both):
        imdb = "".join(f'"{each}, good.",{"np"[label]}\n' for label, each in ROWS)
        found = loaded(both("review,sentiment\n" + imdb))
        assert (found.num_classes, text(found, "test", 3)) == (2, "text 3 , good .")
        ag_news = "".join(f'"{label + 1}","Title","{each}"\n' for label, each in ROWS)
        for header in ("", "Class Index,Title,Description\n"):
            found = loaded(both(header + ag_news))
            assert (found.num_classes, text(found, "test", 3)) == (2, "title text 3")

    def test_columns_are_found_by_name_in_every_file(self, both):
        train = "title,text,label\n" + "".join(f"a,{each},{label}\n" for label, each in ROWS)
        found = loaded(both(train, "Label,id,Text,Title\n1,7,text 3,a\n"))
        assert text(found, "test", 0) == "a text 3"
        assert everything(found.test)["label"].tolist() == [1]
        for test, missing in (("id,title,text\n1,a,b\n", "label"), ("0,a,b\n", "title")):
            refused(f"test.csv', line 1 has .*: one called '{missing}'", f"csv:{both(train, test)}")

    def test_a_word_among_the_labels_is_no_header(self, both):
        words = "".join(f"{'ny'[label]},{each}\n" for label, each in [*ROWS[1:], *ROWS])
        assert loaded(both(words)).num_classes == 2

    @pytest.mark.parametrize(
        ("train", "said"),
        [
            (f"what,that\n{BODY}", r"train.csv', line 1 may be a header or an example: 'what'"),
            (
                "review,sort\n" + BODY,
                r"line 1 has the columns review, sort: none is called 'label'",
            ),
            ("label,class,text\n1,a,b\n", r"'label' and 'class' may hold the labels; give"),
            ("text,label,label_text\na,1,b\n", r"'label' and 'label_text' may hold the labels"),
            ("id,label\n" + BODY, r"at least one of texts is needed besides .* 'label'"),
            ("sep=,\nlabel,text\n" + BODY, r"line 1 is 'sep=,': remove the line"),
            ("SEP=;\n" + BODY, r"line 1 is 'SEP=;': remove the line"),
            (
                f"label,text\n{BODY}label,text\n{BODY}",
                r"line 14 is a header in the middle .* 'label,",
            ),
            (f"label,text\n{BODY}Text,Label\n{BODY}", r"line 14 is a header in the middle"),
            (f"{BODY}label,text\n{BODY}", r"line 13 is a header in the middle"),
            ("topic,a\nnews,b\n" + BODY + "topic,c\n", r"line 15 is a header in the middle"),
        ],
    )
    def test_what_is_no_header(self, both, train, said):
        refused(said, f"csv:{both(train)}")


class TestChosenColumns:
    def test_by_name(self, both):
        rows = "".join(f"{label},{each},x,\n" for label, each in ROWS)
        path = both(f"v1,v2,v3,\n{rows}")
        assert text(loaded(path, label_column="V1"), "train", 1) == "text 1 x"
        found = loaded(path, label_column="v1", text_columns=["v3", "v2"])
        assert (found.num_classes, text(found, "train", 1)) == (2, "x text 1")

    def test_among_several_that_may_hold_labels(self, both):
        rows = "".join(f"{each},{label},good\n" for label, each in ROWS)
        path = both(f"text,label,label_text\n{rows}")
        refused("'label_text' may hold labels or text; give", f"csv:{path}", label_column="label")
        found = loaded(path, label_column="label", text_columns=("text",))
        assert (found.num_classes, text(found, "train", 1)) == (2, "text 1")

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"label_column": "a"}, "has the columns label, text: one called 'a' is needed"),
            ({"text_columns": ("a",)}, "has the columns label, text: one called 'a' is needed"),
            ({"label_column": 1}, "label_column is 1: the name"),
            ({"text_columns": "text"}, "text_columns is 'text': different names"),
            ({"text_columns": ()}, r"text_columns is \(\): different names"),
            ({"text_columns": ("a", "A")}, "different names"),
            ({"text_columns": ("a", "b"), "label_column": "B"}, "'B' is label_column"),
        ],
    )
    def test_bad_names(self, both, options, said):
        refused(said, f"csv:{both('label,text' + chr(10) + BODY)}", **options)

    @pytest.mark.parametrize("option", [{"label_column": "a"}, {"text_columns": ("a",)}])
    def test_of_other_data_sets(self, option):
        refused("data set 'synthetic' holds images and takes only", "synthetic", **option)

    def test_in_a_configuration(self, both):
        rows = "".join(f"{each},{label}\n" for label, each in ROWS)
        config = configuration.default()
        config.data.name = f"csv:{both(f'v1,v2{chr(10)}{rows}')}"
        config.data.label_column, config.data.text_columns = "v2", ("v3",)
        config.model.name, config.method.name = "lstm", "bp"
        with pytest.raises(configuration.ConfigError, match="one called 'v3' is needed"):
            build(config)
        config.data.name, config.data.text_columns = "synthetic", None
        with pytest.raises(configuration.ConfigError, match=r"config.data.label_column is 'v2': "):
            build(config)

    def test_the_content_of_dbpedia_alone(self, both):
        """With a header, which its files lack."""
        rows = "".join(f'{row % 14 + 1},"Title {row}","Content, of {row}"\n' for row in range(28))
        whole = data.load(f"csv:{both(rows)}", validation=0)
        assert text(whole, "test", 1) == "title 1 content , of 1"
        name = f"csv:{both(f'label,title,content{chr(10)}{rows}')}"
        only = data.load(name, text_columns=("content",), clean="paper", validation=0)
        assert (text(only, "test", 1), only.num_classes) == ("content 1", 14)

    def test_in_parquet_files(self, tmp_path):
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        columns = {"id": ["a", "b"] * 4, "sentiment": [1, 2] * 4, "n": [1] * 8, "text": ["x"] * 8}
        for split in ("train", "test"):
            parquet.write_table(arrow.table(columns), tmp_path / f"{split}.parquet")
        name = f"parquet:{tmp_path}"
        assert text(data.load(name), "test", 0) == "x"
        assert text(data.load(name, text_columns=("id", "text")), "test", 1) == "b x"
        assert text(data.load(name, text_columns=("text",)), "test", 1) == "x"
        refused("at least one of texts is needed", name, text_columns=("n",))


class TestLabels:
    def test_numbers_of_rows_in_place_of_labels(self, both):
        rows = "".join(f"{row},{each},{label}\n" for row, (label, each) in enumerate(ROWS))
        refused("12 different labels, such as 0 and 1, among 12 .* header", f"csv:{both(rows)}")

    def test_all_different(self, both):
        rows = "label,text\n" + "".join(f"{row / 7:.3f},a\n" for row in range(12))
        refused("all 12 training examples have different labels", f"csv:{both(rows)}")

    @pytest.mark.parametrize("other", ["1.0", "1e0", "1."])
    def test_a_number_written_in_two_ways(self, both, other):
        said = rf"labels 1 \('.*train.csv', line 2\) and '{other}' \('.*', line 13\) are one number"
        refused(said, f"csv:{both(f'{BODY}{other},a{chr(10)}')}")

    def test_an_accent_in_two_normal_forms(self, both):
        rows = [(label, "a") for label in ("caf\u00e9", "cafe\u0301", "tea")] * 4
        path = write_csv(both("") / "train.csv", rows).parent
        write_csv(path / "test.csv", rows)
        assert np.bincount(everything(loaded(path).test)["label"]).tolist() == [8, 4]

    def test_place_of_a_foreign_label(self, both):
        said = r"example 1 has label 2, which no training example has \('.*test.csv', line 4\)"
        refused(said, f"csv:{both(BODY, chr(10) + '0,a' + chr(10) * 2 + '2,b')}")


class TestDamage:
    """Errors name the line in which the field begins, at once."""

    @pytest.mark.parametrize(
        ("added", "line"),
        [
            ('0,"open\n' + BODY, 13),
            ('0,"a \\"b\\" c"\n' + BODY, 13),
            ('0,"two\nlines","and\nmore\n' + BODY, 14),
            ('0,"two\r\nlines"\r\n1,"open, ""doubled""\r\n', 15),
            ('0,"two\nlines"\n1,a,b\n', 15),
            ('0,"two\nlines"\n"",a\n', 15),
        ],
    )
    def test_line_of_what_is_bad(self, both, added, line):
        refused(f"train.csv', line {line}[ :]", f"csv:{both(BODY + added)}")

    def test_line_of_a_byte(self, both):
        path = both(BODY * 900)
        (path / "train.csv").write_bytes((BODY * 900).encode() + b"0,caf\xe9\n")
        refused(r"line 10801 cannot be read as CSV in UTF-8 \(byte 0xe9\)", f"csv:{path}")

    @pytest.mark.parametrize("field", ['"open\n' + BODY * 9, "word " * 300, '"' + "word " * 300])
    def test_a_field_without_an_end(self, both, monkeypatch, field):
        monkeypatch.setattr(csv_rows, "LONGEST", 1000)
        path = both(BODY + "0," + field + "\n" + BODY * 900)
        (path / "train.csv").open("ab").write(b"\xff")  # which is not come to
        refused(r"line 13 (is longer than 1,000 characters|.*\(a quote opens)", f"csv:{path}")

    def test_no_file(self, tmp_path):
        (tmp_path / "train.csv").mkdir()
        refused("train.csv' is no file", f"csv:{tmp_path}")
