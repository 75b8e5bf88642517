"""Pieces of a page that show what a reader chooses, without a script."""

from collections.abc import Sequence
from typing import NamedTuple

from jdecouple.train.pages.page import Piece, escaped, joined


class Variants(NamedTuple):
    """Pieces of which one is shown: that whose number is chosen in the `Choice` around it."""

    pieces: Sequence[Piece]

    def html(self) -> str:
        """See `page.Piece`."""
        markup = "".join(f"<div>{piece.html()}</div>" for piece in self.pieces)
        return f'<div class="variants">{markup}</div>'


class Choice(NamedTuple):
    """Buttons above pieces, of which one is chosen; for a page that has one of them.

    Attributes:
        legend: what is chosen.
        options: three names.
        first: the number of the one that is chosen when the page is opened.
        pieces: what holds `Variants`, at any depth.
    """

    legend: str
    options: Sequence[str]
    first: int
    pieces: Sequence[Piece]

    def html(self) -> str:
        """See `page.Piece`."""
        buttons = "".join(
            f'<label><input type="radio" name="choice" value="{i}" autocomplete="off"'
            f"{' checked' if i == self.first else ''}> {escaped(option)}</label>"
            for i, option in enumerate(self.options)
        )
        return (
            f'<div class="choice"><fieldset><legend>{escaped(self.legend)}</legend>{buttons}'
            f"</fieldset>{joined(self.pieces)}</div>"
        )
