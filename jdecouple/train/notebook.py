"""A run in a notebook: its bar, its curves, and a stop that the cells behind it notice."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jdecouple._errors import OneLine


class StoppedError(OneLine, RuntimeError):
    """A run in a notebook was stopped before its end; the message says how it goes on."""


def is_active() -> bool:
    """Whether this is the kernel of a notebook, which has imported IPython."""
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
    return getattr(get_shell(), "kernel", None) is not None  # no shell of a terminal has one


def bar_type() -> Any:
    """The progress bar for where this runs: in a notebook a widget, if these are installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bar of characters will do
        from tqdm.auto import tqdm
    return tqdm


@contextlib.contextmanager
def stop_button() -> Iterator[None]:
    """Context that ends by StoppedError, in a notebook, where the kernel is interrupted at once."""
    try:
        yield
    except KeyboardInterrupt as error:
        if not is_active():
            raise
        raise StoppedError(
            "interrupted at once, without saving: the run is not finished; run this cell again, "
            "and it goes on from its last checkpoint, if there is one"
        ) from error


def close(curves: Path | None, stopped: str | None) -> None:
    """Shows the curves below the cell.

    Raises:
        StoppedError: the run has `stopped`, as that says, and saved.
    """
    from IPython.display import Image, display

    if curves is not None:
        display(Image(filename=str(curves)))
    if stopped is not None:
        raise StoppedError(
            f"{stopped} and saved: the run is not finished; run this cell again, and it continues"
        )
