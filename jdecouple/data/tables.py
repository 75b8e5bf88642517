"""Labelled texts in CSV or Parquet files, by name `csv:PATH` or `parquet:PATH`."""

from __future__ import annotations

import array
import bisect
import collections
import dataclasses
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdecouple._errors import first_line
from jdecouple.data import csv_rows
from jdecouple.data.columns import Columns, Places, find, is_header, names_columns, number, plain
from jdecouple.data.splits import held_out, stratified_order
from jdecouple.data.texts import Texts

TEST_SHARE = 0.2  # of a single file
_NUMBER = re.compile(r"[+-]?\d{1,999}")
_TEXTS = ("string", "large_string", "string_view")  # types of a Parquet column
_FEW = 10  # examples, which may all have labels of their own, to try something out
_HEADER = "write a header such as 'label,text', or give label_column and text_columns"


@dataclasses.dataclass
class Table:
    """Labels as they are written, a whole number or a text each, and texts of some files.

    Attributes:
        columns: those that the next file needs.
        labels: one an example.
        texts: one an example.
        unnamed: examples that begin a file without a header.
    """

    columns: Columns
    labels: list[Any] = dataclasses.field(default_factory=list)
    texts: list[str] = dataclasses.field(default_factory=list)
    unnamed: list[int] = dataclasses.field(default_factory=list)
    _numbers: array.array = dataclasses.field(default_factory=lambda: array.array("Q"))
    _files: list[tuple[int, str]] = dataclasses.field(default_factory=list)

    def begin(self, file: str) -> None:
        """Tells what the next examples are called, but for their numbers."""
        self._files.append((len(self.labels), file))

    def append(self, label: Any, texts: Sequence[str], row: int) -> None:
        """Adds an example."""
        self.labels.append(label)
        self.texts.append(" ".join(texts))
        self._numbers.append(row)

    def place(self, example: int) -> str:
        """What file and line an example is from."""
        file = bisect.bisect_right(self._files, example, key=lambda entry: entry[0]) - 1
        return f"{self._files[file][1]} {self._numbers[example]}"


def splits(
    name: str,
    data_dir: str | os.PathLike[str] | None,
    label_column: str | None = None,
    text_columns: Sequence[str] | None = None,
) -> tuple[dict[str, Texts], tuple[str, ...]]:
    """Reads a set of labelled texts from files.

    PATH is a folder with the files `train.csv`, `test.csv` and perhaps `validation.csv` (or
    `train-*.csv`, ... in alphabetical order), or a single file, of which a fixed stratified fifth
    is the test split; `.parquet` likewise. The columns `label_column` and `text_columns` are the
    labels and, joined by spaces, the text. Without them the column called `label`, `class`,
    `target`, ... (`columns.find`) holds the labels, all others (in Parquet: all others of texts)
    but for the numbers of rows the text. A CSV file whose first line names no column has no
    header, and its first column holds the labels. Labels may be numbers or words; class i is the
    i-th of those of the training file in sorted order.

    A relative PATH begins at `data_dir`, by default the current folder.

    Also returns the names of the classes.

    Raises:
        ValueError: a file is not laid out like that, or pyarrow is not installed.
        FileNotFoundError: there is no such folder or file.
    """
    kind, _, suffix = name.partition(":")
    path = Path(data_dir or "").expanduser() / Path(suffix).expanduser()
    if not suffix or not path.exists():
        raise FileNotFoundError(f"data set {name!r}: there is no file or folder '{path}'")
    columns = _columns(label_column, text_columns)
    if path.is_file():
        stored, class_names = _labelled({"train": _read(kind, [path], columns)}, name)
        texts, labels = stored["train"]
        kept, held = held_out(stratified_order(labels), TEST_SHARE)
        for split, rows in (("train", kept), ("test", held)):
            stored[split] = Texts([texts[row] for row in rows], labels[rows])
        return stored, class_names
    tables: dict[str, Table] = {}
    for split in ("train", "validation", "test"):
        if paths := sorted([*path.glob(f"{split}.{kind}"), *path.glob(f"{split}-*.{kind}")]):
            tables[split] = _read(kind, paths, columns)
            columns = tables[split].columns
        elif split == "train":
            raise ValueError(f"data set {name!r}: there is no 'train.{kind}' in '{path}'")
    return _labelled(tables, name)


def _columns(label: Any, texts: Any) -> Columns:
    if label is not None and not isinstance(label, str):
        raise ValueError(f"label_column is {label!r}: the name of a column is needed")
    if texts is not None:
        listed = isinstance(texts, list | tuple) and all(isinstance(name, str) for name in texts)
        if not listed or not texts or len({plain(name) for name in texts}) < len(texts):
            raise ValueError(f"text_columns is {texts!r}: different names of columns are needed")
        if label is not None and plain(label) in map(plain, texts):
            raise ValueError(f"text_columns is {texts!r}: {label!r} is label_column")
    return Columns(label, texts)


def _read(kind: str, paths: Sequence[Path], columns: Columns) -> Table:
    table = Table(columns)
    for path in paths:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError(f"'{path}' is no file")
        _READERS[kind](path, table)
    return table


def _labelled(tables: dict[str, Table], name: str) -> tuple[dict[str, Texts], tuple[str, ...]]:
    """Numbers the labels by those of the training split; also returns what they are."""
    try:
        _check_labels(tables["train"])
    except ValueError as error:
        raise ValueError(f"data set {name!r}: {error}") from None
    found = sorted(set(tables["train"].labels), key=_order)
    numbers = {label: number for number, label in enumerate(found)}
    stored = {}
    for split, table in tables.items():
        for row, label in enumerate(table.labels):
            if label not in numbers:
                raise ValueError(
                    f"data set {name!r}: split {split!r}: example {row} has label {label!r}, "
                    f"which no training example has ({table.place(row)})"
                )
        numbered = np.array([numbers[label] for label in table.labels], np.int64)
        stored[split] = Texts(table.texts, numbered)
    return stored, tuple(map(str, found))


def _check_labels(table: Table) -> None:
    """Raises ValueError where what was read for training labels can be none."""
    counts, size = collections.Counter(table.labels), len(table.labels)
    if len(counts) < 2:
        raise ValueError(
            f"{size} training examples have {len(counts)} label(s): at least 2 are needed"
        )
    written: dict[float, Any] = {}
    for label in counts:
        value = number(label) if isinstance(label, str) else label
        if value is not None and (other := written.setdefault(value, label)) is not label:
            places = [table.place(table.labels.index(text)) for text in (other, label)]
            raise ValueError(
                f"labels {other!r} ({places[0]}) and {label!r} ({places[1]}) are one number: write "
                "each label in one way"
            )
    for row in table.unnamed:
        label = table.labels[row]
        if isinstance(label, str) and counts[label] == 1:
            raise ValueError(
                f"{table.place(row)} may be a header or an example: {label[:40]!r} is no known "
                f"name of a column, and no other example has it as its label; {_HEADER}"
            )
    some = " and ".join(repr(label)[:40] for label in list(counts)[:2])
    words = any(isinstance(label, str) for label in counts)
    if table.unnamed and 2 * len(counts) > size and (words or size > _FEW):
        raise ValueError(  # texts or numbers of rows taken for labels
            f"{len(counts)} different labels, such as {some}, among {size} training examples: a "
            f"file without a header has its labels in the first column; {_HEADER}"
        )
    if len(counts) == size > _FEW:
        raise ValueError(
            f"all {size} training examples have different labels, such as {some}: labels are "
            "classes, of several examples each; label_column chooses their column"
        )


def _order(label: Any) -> tuple[bool, Any]:
    """Numbers by value, then texts by letters."""
    return (not isinstance(label, int), label)


def _label(written: str) -> int | str:
    label = _composed(written.strip())
    return int(label) if _NUMBER.fullmatch(label) else label


def _read_csv(path: Path, table: Table) -> None:
    table.begin(f"'{path}', line")
    names: tuple[str, ...] = ()
    places = None
    for line, row in csv_rows.rows(path):
        if places is None:
            if re.match("sep=", row[0], re.IGNORECASE):
                raise ValueError(f"'{path}', line {line} is {','.join(row)!r}: remove the line")
            if table.columns != Columns() or names_columns(row):
                names = tuple(map(plain, row))
                places = find(row, table.columns, f"'{path}', line {line}", range(len(row)))
                table.columns = Columns(
                    row[places.label], tuple(row[place] for place in places.texts)
                )
                width = len(row)
                continue
            places, width = Places(0, range(1, len(row))), len(row)
            table.unnamed.append(len(table.labels))
        if len(row) != width or len(row) < 2:
            raise ValueError(
                f"'{path}', line {line} has {len(row)} column(s): a label and at least one text "
                f"are needed, and as many as in the first line ({width})"
            )
        label = _label(row[places.label])
        if label == "":
            raise ValueError(f"'{path}', line {line}: the label is empty")
        if isinstance(label, str) and is_header(row, names, places.label):
            raise ValueError(
                f"'{path}', line {line} is a header in the middle of a file: {','.join(row)[:80]!r}"
            )
        table.append(label, [row[place] for place in places.texts], line)


def _read_parquet(path: Path, table: Table) -> None:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            "reading Parquet files needs pyarrow: pip install 'jdecouple[parquet]'"
        ) from error
    try:
        stored = parquet.read_table(path)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"'{path}' cannot be read ({first_line(error)})") from error
    names = stored.column_names
    texts = [n for n, field in enumerate(stored.schema) if str(_plain(field.type)) in _TEXTS]
    places = find(names, table.columns, f"'{path}'", texts)
    table.columns = Columns(names[places.label], [names[place] for place in places.texts])
    table.begin(f"'{path}', row")
    read = (stored.column(place).to_pylist() for place in (places.label, *places.texts))
    for row, (label, *parts) in enumerate(zip(*read, strict=True)):
        if label in (None, "") or None in parts:
            raise ValueError(f"'{path}': row {row} lacks its label or a text")
        if not isinstance(label, int | str):
            raise ValueError(
                f"'{path}': row {row} has label {label!r}: a whole number or text is needed"
            )
        table.append(_composed(label) if isinstance(label, str) else label, parts, row)


def _composed(label: str) -> str:
    """A label in the form in which the words of texts are."""
    return unicodedata.normalize("NFC", label)


def _plain(column: Any) -> Any:
    """The type of a column's values; pandas writes categories as a dictionary of them."""
    return column.value_type if str(column).startswith("dictionary<") else column


_READERS: dict[str, Callable[[Path, Table], None]] = {
    "csv": _read_csv,
    "parquet": _read_parquet,
}
