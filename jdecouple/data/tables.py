"""Labelled texts in CSV or Parquet files, by name `csv:PATH` or `parquet:PATH`."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jdecouple._errors import first_line
from jdecouple.data.splits import held_out, stratified_order
from jdecouple.data.texts import Texts

TEST_SHARE = 0.2  # of a single file
_LABELS = ("label", "class")  # names of the column of labels
_NUMBER = re.compile(r"[+-]?\d{1,999}")
_TEXTS = ("string", "large_string", "string_view")  # types of a Parquet column
_LONGEST_FIELD = 1 << 30


class Table(NamedTuple):
    """Labels as they are written, a whole number or a text each, and texts of some files.

    `named` says whether the files name the column of labels.
    """

    labels: list[Any]
    texts: list[str]
    named: bool = True


def splits(name: str, data_dir: str | os.PathLike[str] | None) -> tuple[dict[str, Texts], int]:
    """Reads a set of labelled texts from files.

    PATH is a folder with the files `train.csv`, `test.csv` and perhaps `validation.csv` (or
    `train-*.csv`, ... in alphabetical order), or a single file, of which a fixed stratified fifth
    is the test split; `.parquet` likewise. The column called `label` or `class` holds the labels,
    all others (in Parquet: all others of texts) the text, joined by spaces. A CSV file whose first
    line names neither has no header, and its first column holds the labels. Labels may be numbers
    or words; class i is the i-th of those of the training file in sorted order.

    A relative PATH begins at `data_dir`, by default the current folder.

    Also returns the number of classes.

    Raises:
        ValueError: a file is not laid out like that, or pyarrow is not installed.
        FileNotFoundError: there is no such folder or file.
    """
    kind, _, suffix = name.partition(":")
    path = Path(data_dir or "").expanduser() / Path(suffix).expanduser()
    if not suffix or not path.exists():
        raise FileNotFoundError(f"data set {name!r}: there is no file or folder '{path}'")
    read = _READERS[kind]
    if path.is_file():
        stored, num_classes = _labelled({"train": read([path])}, name)
        texts, labels = stored["train"]
        kept, held = held_out(stratified_order(labels), TEST_SHARE)
        for split, rows in (("train", kept), ("test", held)):
            stored[split] = Texts([texts[row] for row in rows], labels[rows])
        return stored, num_classes
    files = {
        split: sorted([*path.glob(f"{split}.{kind}"), *path.glob(f"{split}-*.{kind}")])
        for split in ("train", "validation", "test")
    }
    tables = {split: read(paths) for split, paths in files.items() if paths}
    if "train" not in tables:
        raise ValueError(f"data set {name!r}: there is no 'train.{kind}' in '{path}'")
    return _labelled(tables, name)


def _labelled(tables: dict[str, Table], name: str) -> tuple[dict[str, Texts], int]:
    """Numbers the labels by those of the training split; also returns how many there are."""
    labels, _, named = tables["train"]
    numbers = {label: number for number, label in enumerate(sorted(set(labels), key=_order))}
    if len(numbers) < 2:
        raise ValueError(
            f"data set {name!r}: {len(labels)} training examples have {len(numbers)} label(s): at "
            "least 2 are needed"
        )
    words = [label for label in labels if isinstance(label, str)]
    if not named and 2 * len(set(words)) > len(labels):  # texts taken for labels
        raise ValueError(
            f"data set {name!r}: {len(set(words))} different labels, such as {words[0][:40]!r}, "
            f"among {len(labels)} training examples; labels are in a column called 'label' or "
            "'class', or in the first of a CSV file without a header"
        )
    stored = {}
    for split, table in tables.items():
        for row, label in enumerate(table.labels):
            if label not in numbers:
                raise ValueError(
                    f"data set {name!r}: split {split!r}: example {row} has label {label!r}, "
                    "which no training example has"
                )
        numbered = np.array([numbers[label] for label in table.labels], np.int64)
        stored[split] = Texts(table.texts, numbered)
    return stored, len(numbers)


def _order(label: Any) -> tuple[bool, Any]:
    """Numbers by value, then texts by letters."""
    return (not isinstance(label, int), label)


def _number(label: str) -> int | str:
    label = label.strip()
    return int(label) if _NUMBER.fullmatch(label) else label


def _read_csv(paths: Sequence[Path]) -> Table:
    table = Table([], [])
    limit = csv.field_size_limit(_LONGEST_FIELD)  # a text may be longer than Python's default
    try:
        named = [_append_csv(path, table) for path in paths]
    finally:
        csv.field_size_limit(limit)
    return table._replace(named=all(named))


def _append_csv(path: Path, table: Table) -> bool:
    """Appends the rows of a file; returns whether it names the column of labels."""
    column = width = None
    named = False
    for number, row in _csv_rows(path):
        if column is None:
            names = [cell.strip().lower() for cell in row]
            label = next((name for name in _LABELS if name in names), None)
            named, width = label is not None, len(row)
            column = names.index(label) if label else 0
            if named:
                continue
        if len(row) != width or len(row) < 2:
            raise ValueError(
                f"'{path}', line {number} has {len(row)} column(s): a label and at least one text "
                f"are needed, and as many as in the first line ({width})"
            )
        if not row[column].strip():
            raise ValueError(f"'{path}', line {number}: the label is empty")
        table.labels.append(_number(row[column]))
        table.texts.append(" ".join(row[:column] + row[column + 1 :]))
    return named


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                if row:
                    yield reader.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"'{path}' cannot be read as CSV in UTF-8 ({first_line(error)})"
        ) from error


def _read_parquet(paths: Sequence[Path]) -> Table:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            "reading Parquet files needs pyarrow: pip install 'jdecouple[parquet]'"
        ) from error
    table = Table([], [])
    for path in paths:
        try:
            columns = parquet.read_table(path)
        except (arrow.ArrowException, OSError) as error:
            raise ValueError(f"'{path}' cannot be read ({first_line(error)})") from error
        names = {name.lower(): name for name in reversed(columns.column_names)}
        label = next((names[name] for name in _LABELS if name in names), None)
        texts = [
            field.name
            for field in columns.schema
            if field.name != label and str(_plain(field.type)) in _TEXTS
        ]
        if label is None or not texts:
            raise ValueError(
                f"'{path}' has the columns {', '.join(columns.column_names)}: 'label' (or 'class') "
                "and at least one of texts are needed"
            )
        rows = zip(*(columns.column(name).to_pylist() for name in (label, *texts)), strict=True)
        for number, (value, *row) in enumerate(rows):
            if value in (None, "") or None in row:
                raise ValueError(f"'{path}': row {number} lacks its label or a text")
            if not isinstance(value, int | str):
                raise ValueError(
                    f"'{path}': row {number} has label {value!r}: a whole number or text is needed"
                )
            table.labels.append(value)
            table.texts.append(" ".join(row))
    return table


def _plain(column: Any) -> Any:
    """The type of a column's values; pandas writes categories as a dictionary of them."""
    return column.value_type if str(column).startswith("dictionary<") else column


_READERS: dict[str, Callable[[Sequence[Path]], Table]] = {
    "csv": _read_csv,
    "parquet": _read_parquet,
}
