"""Image files that nobody vouches for: which are opened, how large, and as what pixels."""

from __future__ import annotations

import contextlib
import io
import math
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np

from jdecouple._errors import first_line

if TYPE_CHECKING:
    from PIL import Image, ImageFile

# What a file holds decides, not its name. Pillow knows more: for one it starts Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
EXTENSIONS = ("png", "jpg", "jpeg", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm")
MOST_PIXELS = 89_478_485  # Pillow warns of more: a few kilobytes can be gigabytes of pixels

_GREY = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L")
_TRANSPARENT = ("RGBA", "RGBa", "LA", "La", "PA")
_TOO_DEEP = ("I", "F")  # 32 bits, of which no range is known
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations
_LONG = 16  # sides in proportion, beyond which only the middle of a picture is resized


class Head(NamedTuple):
    """What the head of a file says: the size of the picture once turned, and its colours."""

    height: int
    width: int
    is_grey: bool


def head(path: str) -> Head:
    """Reads the head of an image file, without its pixels; ValueError as of `decode`."""
    from PIL import ExifTags

    with _opened(path) as picture:
        width, height = picture.size
        if picture.format == "TIFF":  # of which some versions of Pillow turn the size, others not
            tags = picture.tag_v2  # type: ignore[attr-defined]
            width, height = tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength]
        if width != height and _orientation(picture, path) in _SIDEWAYS:
            width, height = height, width
        return Head(height, width, picture.mode in _GREY)


def check(encoded: bytes) -> None:
    """Raises ValueError unless an encoded image is of one of `FORMATS` and in bounds."""
    with _recognized(io.BytesIO(encoded)):
        pass


def decode(path: str, channels: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decodes an image file.

    Args:
        path: file of one of `FORMATS`, with at most `MOST_PIXELS` pixels.
        channels: 1 or 3.
        size: height and width that the picture is brought to, see `fit`; None is its own.

    Returns:
        Pixels, uint8 [height, width, channels].

    Raises:
        ValueError: the file cannot be read, is no such image, or has pixels of 32 bits. The error
            is one line that names the file.
    """
    from PIL import ImageOps

    with _opened(path) as opened:
        ImageOps.exif_transpose(opened, in_place=True)
        return pixels(opened, channels, size)


def pixels(picture: Image.Image, channels: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """Pixels of an upright picture, as `decode` gives those of a file.

    Raises:
        ValueError: they have 32 bits.
    """
    from PIL import Image

    if picture.mode in _TOO_DEEP:
        raise ValueError(f"pixels have 32 bits (mode {picture.mode}): 8 or 16 are needed")
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in _TRANSPARENT or "transparency" in picture.info:
        picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    picture = picture.convert("L" if channels == 1 else "RGB")
    values = np.asarray(fit(picture, *size) if size else picture)
    return values.reshape(*values.shape[:2], channels)


def below(folder: Path) -> list[str]:
    """Image files at any depth, also behind links, in alphabetical order.

    Hidden files and those that do not end in one of `EXTENSIONS` are passed over. No folder is read
    twice, and none that is above `folder`, wherever links lead.
    """
    here, above = (Path(os.path.realpath(path)) for path in (folder, folder.parent))
    seen = {str(path) for path in (*here.parents, above, *above.parents)}
    paths, tops = [], [str(folder)]
    for top in tops:  # which grows: folders behind links come after those without one
        for path, folders, names in os.walk(top, onerror=_raise):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            real_path = os.path.realpath(path)
            if real_path in seen:
                folders.clear()
                continue
            seen.add(real_path)
            inner = [os.path.join(path, name) for name in folders]
            tops += [link for link in inner if os.path.islink(link)]
            for name in names:
                if not name.startswith(".") and name.lower().rpartition(".")[2] in EXTENSIONS:
                    paths.append(os.path.join(path, name))
    return sorted(paths)


def _raise(error: OSError) -> None:
    raise error


def resize_image(image: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Brings an image to `shape` as `fit` does: uint8 [H, W, C]."""
    if image.shape == shape:
        return image
    from PIL import Image

    picture = Image.fromarray(image[..., 0] if shape[-1] == 1 else image)
    return np.asarray(fit(picture, *shape[:2])).reshape(shape)


def fit(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Resizes the shorter side (bilinear, antialiased), then crops the centre."""
    if picture.size == (width, height):
        return picture
    from PIL import Image

    scale = max(height / picture.height, width / picture.width)
    wide = max(width, round(picture.width * scale))
    high = max(height, round(picture.height * scale))
    left, top = (wide - width) // 2, (high - height) // 2
    if wide * high <= _LONG * width * height:
        picture = picture.resize((wide, high), Image.Resampling.BILINEAR)
        return picture.crop((left, top, left + width, top + height))
    # The whole of a thread of pixels would take gigabytes, of which next to nothing is kept.
    x, columns = _section(picture.width, wide, left, width)
    y, rows = _section(picture.height, high, top, height)
    middle = picture.crop((columns.start, rows.start, columns.stop, rows.stop))
    box = (x[0], y[0], x[1], y[1])
    return middle.resize((width, height), Image.Resampling.BILINEAR, box)


def _section(length: int, resized: int, first: int, count: int) -> tuple[list[float], range]:
    """Finds `count` pixels of a side from `first` on, once resized, in the side of `length`.

    Returns the pixels that the filter reads for them, and where the section begins and ends in
    those.
    """
    step = length / resized
    ends = [first * step, min((first + count) * step, length)]
    reach = math.ceil(max(step, 1)) + 1
    read = range(max(0, math.floor(ends[0]) - reach), min(length, math.ceil(ends[1]) + reach))
    return [end - read.start for end in ends], read


@contextlib.contextmanager
def _opened(path: str) -> Iterator[ImageFile.ImageFile]:
    """Opens a file; whatever is raised until it is closed becomes a ValueError that names it."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for whoever writes
            raise ValueError("it is no regular file")
        if not status.st_size:
            raise ValueError("it is empty")
        # Pillow maps a file that it opens itself, and then reads some turned TIFF images wrongly.
        with open(path, "rb") as file, _recognized(file) as picture:
            yield picture
    except Exception as error:  # whatever Pillow makes of a broken file
        reason = first_line(getattr(error, "strerror", None) or error)
        raise ValueError(f"{path!r}: {reason}") from error


@contextlib.contextmanager
def _recognized(file: IO[bytes]) -> Iterator[ImageFile.ImageFile]:
    """Reads the head of a file; ValueError for another format or too many pixels."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file, formats=FORMATS) as picture:
            if math.prod(picture.size) > MOST_PIXELS:
                raise Image.DecompressionBombError("it has {} x {}".format(*picture.size))
            yield picture
    except UnidentifiedImageError as error:
        raise ValueError(f"it is no image of the formats {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"at most {MOST_PIXELS} pixels are read ({error})") from error


def _orientation(picture: ImageFile.ImageFile, path: str) -> int:
    """EXIF orientation, for which pixels are decoded only where it may lie behind them."""
    from PIL import ExifTags, Image

    if picture.format == "PNG" and not _ends_with_text(path):
        exif = Image.Image.getexif(picture)  # that of PNG decodes the pixels in any case
    else:
        exif = picture.getexif()
    return exif.get(ExifTags.Base.Orientation, 1)


def _ends_with_text(path: str) -> bool:
    """Whether a PNG has more than its end behind its pixels."""
    pixels_began = False
    with open(path, "rb") as file:
        file.seek(8)
        while len(start := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", start)
            if pixels_began and kind not in (b"IDAT", b"IEND"):
                return True
            pixels_began = kind == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)
    return False
