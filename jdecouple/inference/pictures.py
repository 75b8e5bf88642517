"""Pictures of a run, in training and after."""

import warnings
from pathlib import Path
from typing import Any

from jdecouple._files import replace


def save(figure: Any, path: Path, **options: Any) -> None:
    """Writes a matplotlib figure as a PNG, atomically; a letter that its font lacks is a box."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        replace(path, lambda temporary: figure.savefig(temporary, format="png", **options))
