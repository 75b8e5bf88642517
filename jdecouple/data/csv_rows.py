"""Rows of a CSV file, each with the line it begins in."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from jdecouple._errors import first_line

LONGEST = 1 << 24  # characters of a field or line: more than any book has
_FIELD = re.compile(r'(?:"[^"]*+(?:""[^"]*+)*+"|(?!")[^,\r\n]*+)(?:,|\r\n?|\n|\Z)')
_LINE_END = re.compile(r"\r\n?|\n")
_NO_UTF8 = re.compile("[\udc80-\udcff]")  # how a byte is read that is none
_UNCLOSED = ("unexpected end of data", "field larger than field limit")


def rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields every row that is not empty, after the number of its first line.

    Raises:
        ValueError: the file is no CSV in UTF-8, or a field is longer than `LONGEST`; the line is
            that in which the field begins.
    """
    lines: list[str] = []  # of the row that is being read
    first = 1
    limit = csv.field_size_limit()
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(_lines(file, path, lines), strict=True)
        try:
            csv.field_size_limit(LONGEST)  # a text may be longer than Python's default
            for row in reader:
                if row:
                    yield first, row
                first = reader.line_num + 1
                lines.clear()
        except csv.Error as error:
            before, field = _bad_field("".join(lines))
            reason = first_line(error)
            if reason.startswith(_UNCLOSED):
                reason = "a quote opens that is not closed"
            raise ValueError(
                f"'{path}', line {first + before} cannot be read as CSV in UTF-8 ({reason}; the "
                f"field begins with {field[:20]!r})"
            ) from error
        finally:
            csv.field_size_limit(limit)


def _lines(file: Iterator[str], path: Path, lines: list[str]) -> Iterator[str]:
    """Yields the lines of a file, which it also appends to `lines`."""
    number = 0
    while line := file.readline(LONGEST + 1):  # type: ignore[attr-defined]
        number += 1
        if len(line) > LONGEST:
            raise ValueError(f"'{path}', line {number} is longer than {LONGEST:,} characters")
        if not line.isascii() and (bad := _NO_UTF8.search(line)):
            byte = ord(bad[0]) - 0xDC00
            raise ValueError(
                f"'{path}', line {number} cannot be read as CSV in UTF-8 (byte 0x{byte:02x})"
            )
        lines.append(line)
        yield line


def _bad_field(text: str) -> tuple[int, str]:
    """How many lines of a row lie before its first field that cannot be read, and the field."""
    position = 0
    while position < len(text) and (field := _FIELD.match(text, position)):
        position = field.end()
    return len(_LINE_END.findall(text, 0, position)), text[position : position + 80]
