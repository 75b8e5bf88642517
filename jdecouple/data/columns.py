"""Columns of a table of labelled texts by their names: which holds the labels, which the texts."""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

# Names as `plain` writes them.
_LABELS = re.compile(
    "labels?|class(es)?|targets?|category|sentiment|polarity|emotion|intent|topic|rating|stars|score|"
    "y|gold label|(class|label|target|category) (index|id|name|text|label)"
)
_TEXTS = re.compile(
    "texts?|title|headline|description|sentence ?[12]?|content|body|review|comment|message|summary|"
    "abstract|document|article|tweet|post|question|answer|query|premise|hypothesis|utterance|subject"
)
_PATHS = re.compile("(image|file)? ?(path|name)|(image|file)|filepath|filename|picture|photo")
_NUMBERING = re.compile("|((row|text) )?(id|idx|index)|uu?id|guid|unnamed: 0")  # perhaps no name
_SHOWN = 8


class Columns(NamedTuple):
    """Names of the column of labels and of those of texts; None: those of the lists above."""

    label: str | None = None
    texts: Sequence[str] | None = None


class Places(NamedTuple):
    """Where the column of labels is in a row, and where those of texts are."""

    label: int
    texts: Sequence[int]


@functools.lru_cache(1 << 12)
def plain(name: str) -> str:
    """A name as it is compared: capitals, and `_`, `-` and spaces in it, make no difference."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFC", name)).strip().casefold()


def _is_known(name: str) -> bool:
    kinds = (_LABELS, _TEXTS, _NUMBERING)
    return bool(name) and any(kind.fullmatch(name) for kind in kinds)


def number(text: str) -> float | None:
    """The finite number that a text is, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def names_columns(row: Sequence[str]) -> bool:
    """Whether a first row is a header: it has a known name in it, and no number in front.

    A single letter is none that would be known by itself.
    """
    names = map(plain, row)
    return number(row[0]) is None and any(len(name) > 1 and _is_known(name) for name in names)


def is_header(row: Sequence[str], names: Sequence[str], label: int) -> bool:
    """Whether a later row is a header, too, of columns like those called `names` or others.

    `label` is the place of the labels; `names` are empty where the file has no header.
    """

    def is_name(cell: str) -> bool:
        return plain(cell) in names or _is_known(plain(cell))

    if not is_name(row[label]):
        return False
    return plain(row[label]) in names[label : label + 1] or all(map(is_name, row))


def places_to_read(
    row: Sequence[str], columns: Sequence[str] | None, where: str, pictures: bool
) -> tuple[list[int], bool]:
    """Which columns of a table hold what is to be classified; whether its first row is a header.

    Without `columns` these are all that hold no labels and do not number the rows: of `pictures`
    the one of their paths. A table of one column needs no header.

    Raises:
        ValueError: there are none, several of a name or of paths; `where` begins the message.
    """
    known = [plain(name) for name in row]
    if columns is not None:
        if pictures and len(columns) > 1:
            raise ValueError(f"columns are {', '.join(columns)}: one column of paths is needed")
        for name in columns:
            if known.count(plain(name)) != 1:
                raise ValueError(
                    f"{where} has the columns {', '.join(row)[:80]}: one called {name!r} is needed"
                )
        return [known.index(plain(name)) for name in columns], True
    is_header = names_columns(row) or any(map(_PATHS.fullmatch, known))
    if not is_header:
        found = [*range(len(row))]
    else:
        found = [
            n
            for n, name in enumerate(known)
            if not (_LABELS.fullmatch(name) or _NUMBERING.fullmatch(name))
        ]
        if pictures and len(found) > 1:
            found = [n for n in found if _PATHS.fullmatch(known[n])]
    if len(found) != 1 and (pictures or not is_header or not found):
        raise ValueError(
            f"{where} is {','.join(row)[:80]!r}: one column, or a header that names those of "
            f"{'paths' if pictures else 'texts'}, is needed; --column chooses"
        )
    return found, is_header


def find(names: Sequence[str], columns: Columns, where: str, texts: Sequence[int]) -> Places:
    """Finds the columns of labels and texts among those of a table, which are called `names`.

    Without names to look for, the labels are in the one column that is called as labels are, and
    the texts in all others of `texts` that do not number the rows.

    Raises:
        ValueError: there are none or several of a name; `where` begins the message.
    """
    known = [plain(name) for name in names]

    def refuse(reason: str) -> ValueError:
        shown = ", ".join(name[:40] for name in names[:_SHOWN])
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return ValueError(f"{where} has the columns {shown}{more}: {reason}")

    def only(name: str) -> int:
        if known.count(plain(name)) != 1:
            raise refuse(f"one called {name!r} is needed")
        return known.index(plain(name))

    given = None if columns.texts is None else [only(name) for name in columns.texts]
    found = [place for place, name in enumerate(known) if _LABELS.fullmatch(name)]
    if columns.label is not None:
        label = only(columns.label)
    else:
        found = [place for place in found if place not in (given or ())]
        if len(found) != 1:
            several = " and ".join(repr(names[place]) for place in found)
            none = "none is called 'label', 'class', 'target', ..."
            reason = f"{several} may hold the labels" if found else none
            raise refuse(f"{reason}; give label_column and text_columns")
        (label,) = found
    if given is None:
        given = [n for n in texts if n != label and not _NUMBERING.fullmatch(known[n])]
        if doubtful := [names[n] for n in given if n in found]:
            raise refuse(f"{doubtful[0]!r} may hold labels or text; give text_columns")
    if not given or not {*given} <= {*texts} - {label}:
        raise refuse(f"at least one of texts is needed besides the labels in {names[label]!r}")
    return Places(label, given)
