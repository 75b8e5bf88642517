"""One self-contained HTML page from sections of tables, pictures, notes and the like.

Every text is escaped here, so a name, a path or a value of a user's may hold anything. A page has
no script and asks nothing of any other place, which its Content-Security-Policy holds it to.
"""

import base64
import html
import importlib.resources
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_MARK = '<meta name="generator" content="jdecouple">\n'
_HEAD = 1000  # bytes of a page in which the mark is
_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?( ?%)?|inf|nan")
_DIGITS = 5  # of a float in a table
# They turn the direction of what is written behind them.
_TURNS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


class Piece(Protocol):
    """What a section holds."""

    def html(self) -> str:
        """The piece as markup, with every text escaped."""


class Headline(NamedTuple):
    """A figure that a reader looks for first, and what it is."""

    value: str
    text: str

    def html(self) -> str:
        """See `Piece`."""
        return (
            f'<p class="headline"><strong>{escaped(self.value)}</strong> {escaped(self.text)}</p>'
        )


class Text(NamedTuple):
    """A paragraph."""

    text: str

    def html(self) -> str:
        """See `Piece`."""
        return f"<p>{escaped(self.text)}</p>"


class Note(NamedTuple):
    """What a reader has to know of what is shown, or why something is not."""

    text: str

    def html(self) -> str:
        """See `Piece`."""
        return f'<p class="note" role="note">{escaped(self.text)}</p>'


class Code(NamedTuple):
    """Text to be copied, such as a command; `label` says what it is."""

    label: str
    text: str

    def html(self) -> str:
        """See `Piece`."""
        label = escaped(self.label)
        return f'<pre tabindex="0" aria-label="{label}"><code>{escaped(self.text)}</code></pre>'


class Facts(NamedTuple):
    """Names with what is known of each; a number is written as in a `Table`.

    Attributes:
        rows: the pairs.
        sentences: whether they are long, to be read one below the other.
    """

    rows: Sequence[tuple[str, Any]]
    sentences: bool = False

    def html(self) -> str:
        """See `Piece`."""
        pairs = (
            f"<div><dt>{escaped(k)}</dt><dd>{escaped(shown(v))}</dd></div>" for k, v in self.rows
        )
        kind = ' class="terms"' if self.sentences else ""
        return f"<dl{kind}>{''.join(pairs)}</dl>"


class Table(NamedTuple):
    """A table whose first column names its rows.

    Attributes:
        caption: what it holds, above it.
        columns: their names.
        rows: cells: texts, numbers, or None where a figure has no value.
        shades: how dark each cell but the first of a row is, from 0 to 1; None for a plain table.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    shades: Sequence[Sequence[float]] | None = None

    def html(self) -> str:
        """See `Piece`."""
        numbers = [all(map(_is_number, column)) for column in zip(*self.rows, strict=True)]
        numbers = [False, *numbers[1:]] if numbers else [False] * len(self.columns)
        head = "".join(
            f'<th scope="col"{_aligned(number)}>{escaped(name)}</th>'
            for name, number in zip(self.columns, numbers, strict=True)
        )
        shades = self.shades or [()] * len(self.rows)
        rows = zip(self.rows, shades, strict=True)
        body = "".join(_row(row, shade, numbers) for row, shade in rows)
        caption = escaped(self.caption)
        kind = ' class="shaded"' if self.shades else ""
        return _scrolled(
            f"<table{kind}><caption>{caption}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table>",
            caption,
        )


class Picture(NamedTuple):
    """A PNG, of any size; `alt` says in words what it shows."""

    png: bytes
    alt: str
    caption: str = ""

    def html(self) -> str:
        """See `Piece`."""
        data, alt = base64.b64encode(self.png).decode(), escaped(self.alt)
        image = f'<img src="data:image/png;base64,{data}" alt="{alt}">'
        return f"<figure>{_scrolled(image, alt)}{_caption(self.caption)}</figure>"


class Drawing(NamedTuple):
    """An SVG element, as markup that is known to be sound, such as `charts` makes."""

    svg: str
    caption: str = ""

    def html(self) -> str:
        """See `Piece`."""
        return f"<figure>{self.svg}{_caption(self.caption)}</figure>"


class Grid(NamedTuple):
    """Pieces side by side where there is room."""

    pieces: Sequence[Piece]

    def html(self) -> str:
        """See `Piece`."""
        return f'<div class="grid">{joined(self.pieces)}</div>'


class Fold(NamedTuple):
    """Pieces that a reader unfolds."""

    summary: str
    pieces: Sequence[Piece]

    def html(self) -> str:
        """See `Piece`."""
        summary = f"<summary>{escaped(self.summary)}</summary>"
        return f"<details>{summary}{joined(self.pieces)}</details>"


class Section(NamedTuple):
    """A part of the page with a heading, which the list of contents leads to."""

    title: str
    pieces: Sequence[Piece]


def render(title: str, sections: Sequence[Section], lead: Sequence[Piece] = ()) -> str:
    """The page as one text: its title, what leads, a list of contents, the sections.

    >>> from jdecouple.train.pages import page
    >>> table = page.Table("Accuracy", ["exit", "test"], [["<last>", 0.75]])
    >>> text = page.render("A run", [page.Section("Exits", [table])])
    >>> '<th scope="row">&lt;last&gt;</th><td class="number">0.75</td>' in text
    True

    Args:
        title: also that of the browser's tab.
        sections: those without pieces are left out.
        lead: pieces between the title and the contents.
    """
    sections = [section for section in sections if section.pieces]
    links = "".join(
        f'<li><a href="#part-{i}">{escaped(section.title)}</a></li>'
        for i, section in enumerate(sections, 1)
    )
    parts = "".join(
        f'<section aria-labelledby="part-{i}"><h2 id="part-{i}">{escaped(section.title)}</h2>'
        f"{joined(section.pieces)}</section>\n"
        for i, section in enumerate(sections, 1)
    )
    style = (importlib.resources.files(__package__) / "page.css").read_text(encoding="utf-8")
    name = escaped(title)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'{_MARK}<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{name}</title>\n<style>\n{style}</style></head>\n<body>"
        f"<header><h1>{name}</h1>{joined(lead)}</header>\n"
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n<main>{parts}</main></body></html>\n'
    )


def check_place(path: Path) -> None:
    """Refuses a place for a page where another file is; a page of an earlier time may be.

    Raises:
        OSError, ValueError: in one line; also for a name that no browser would open.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {path} is no page: a name that ends in .html is needed")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--output {path}: its folder does not exist")
    if path.exists():
        head = path.read_bytes()[:_HEAD] if path.is_file() else b""
        if _MARK.encode() not in head:
            raise FileExistsError(
                f"'{path}' is there and no page of jdecouple's: give another --output"
            )


def joined(pieces: Sequence[Piece]) -> str:
    """The markup of pieces, one after the other."""
    return "".join(piece.html() for piece in pieces)


def escaped(text: str) -> str:
    r"""Text as markup that shows it, in an element or in an attribute's quotes.

    What no browser would show, or would obey, is written as an escape.

    >>> print(escaped("<b>\x00 & 'c'"))
    &lt;b&gt;\x00 &amp; &#x27;c&#x27;
    """
    return html.escape("".join(c if _is_shown(c) else ascii(c)[1:-1] for c in text))


def _is_shown(letter: str) -> bool:
    obeyed = unicodedata.category(letter) in ("Cc", "Cs") or ord(letter) in _TURNS
    return letter == "\n" or not obeyed


def shown(value: Any) -> str:
    """A value of a table as text.

    >>> shown(12345), shown(0.1234567), shown(None), shown("a")
    ('12,345', '0.12346', '', 'a')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.{_DIGITS}g}"
    return f"{value:,}" if type(value) is int else str(value)


def _is_number(value: Any) -> bool:
    return value is None or bool(_NUMBER.fullmatch(shown(value)))


def _aligned(number: bool) -> str:
    return ' class="number"' if number else ""


def _row(cells: Sequence[Any], shades: Sequence[float], numbers: Sequence[bool]) -> str:
    name, *values = cells
    found = [f'<th scope="row">{escaped(shown(name))}</th>']
    for k, value in enumerate(values):
        shade = f' style="--shade:{shades[k]:.3f}"' if shades else ""
        found.append(f"<td{_aligned(numbers[k + 1])}{shade}>{escaped(shown(value))}</td>")
    return f"<tr>{''.join(found)}</tr>"


def _caption(text: str) -> str:
    return f"<figcaption>{escaped(text)}</figcaption>" if text else ""


def _scrolled(markup: str, name: str) -> str:
    """Markup that may be wider than the page, to be scrolled with the keyboard too."""
    return f'<div class="wide" role="region" aria-label="{name}" tabindex="0">{markup}</div>'
