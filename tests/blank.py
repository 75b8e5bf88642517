"""Pictures that are not drawn: a short run spends a third of its time on drawing its curves.

Tests of what is drawn have the fixture `drawn`.
"""

import io
from pathlib import Path
from typing import Any

from PIL import Image

from jdecouple._files import replace
from jdecouple.inference import pictures

DRAWN = pictures.save


def save(figure: Any, path: Path, **options: Any) -> None:
    """Writes a grey pixel where `jdecouple.inference.pictures.save` would write the figure."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1), 128).save(buffer, format="png")
    replace(path, lambda temporary: Path(temporary).write_bytes(buffer.getvalue()))


def install() -> None:
    """For all that this process and its forks do."""
    pictures.save = save
