"""Image files as nobody promised them: other formats, turned, damaged, without bound."""

import os
import socket
import struct
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile
from test_data import assert_one_line
from tfds_writer import png, write_image_set

from jdecouple import data
from jdecouple.data import images

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
WITH_EXIF = {
    "JPEG": {},
    "MPO": {"save_all": True},
    "WEBP": {"lossless": True},
    "PNG": {},
    "TIFF": {},
    "TIFF of LZW": {"compression": "tiff_lzw"},
}


def picture(size=(7, 5), mode="L"):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def chunk(kind, content):
    length, check = len(content), zlib.crc32(kind + content)
    return struct.pack(">I", length) + kind + content + struct.pack(">I", check)


def grey_png(width, height, *before, rows=None, behind=()):
    """A black PNG, however large: `rows` of pixels are in the file, by default all."""
    head = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((width + 1) * (height if rows is None else rows)))
    chunks = [(b"IHDR", head), *before, (b"IDAT", pixels), *behind, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def refused(path, *words):
    """Both the head and the pixels of a file are refused in one line that names it."""
    for read in (images.head, lambda path: images.decode(path, 3)):
        with pytest.raises(ValueError) as error:
            read(str(path))
        assert_one_line(error)
        for word in (repr(str(path)), *words):
            assert word in str(error.value)


class TestOrientation:
    @pytest.mark.parametrize("mode", ["L", "RGB"])
    @pytest.mark.parametrize("name", WITH_EXIF)
    def test_of_every_format_that_has_it(self, tmp_path, name, mode):
        """The pixels are those of the picture without EXIF data, turned by NumPy."""
        form, options, path = name.split()[0], WITH_EXIF[name], str(tmp_path / "x")
        others = {"append_images": [picture(mode=mode)]} if form == "MPO" else {}
        picture(mode=mode).save(path, form, **options, **others)
        plain = images.decode(path, 3)
        turned = {
            1: plain,
            2: plain[:, ::-1],
            3: plain[::-1, ::-1],
            4: plain[::-1],
            5: plain.swapaxes(0, 1),
            6: np.rot90(plain, -1),
            7: plain[::-1, ::-1].swapaxes(0, 1),
            8: np.rot90(plain),
        }
        for orientation, expected in turned.items():
            picture(mode=mode).save(path, form, exif=exif(orientation), **options, **others)
            np.testing.assert_array_equal(images.decode(path, 3), expected)
            assert images.head(path)[:2] == expected.shape[:2]

    @pytest.mark.parametrize("place", ["before", "behind"])
    @pytest.mark.parametrize("kind", ["eXIf", "XMP"])
    def test_of_png_wherever_it_stands(self, tmp_path, kind, place):
        xmp = b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation='1' tiff:Orientation=\"6\"/>"
        text = {"eXIf": (b"eXIf", exif(6).tobytes()[6:]), "XMP": (b"iTXt", xmp)}[kind]
        before, behind = ([text], []) if place == "before" else ([], [text])
        path = tmp_path / "x.png"
        path.write_bytes(grey_png(7, 5, *before, behind=behind))
        assert images.head(str(path))[:2] == images.decode(str(path), 1).shape[:2] == (7, 5)

    def test_sets_of_turned_images_have_one_size(self, tmp_path):
        for number, (name, options) in enumerate(WITH_EXIF.items()):
            for label in "ab":
                for split in ("train", "test"):
                    path = tmp_path / split / label / f"{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    picture(mode="RGB").save(path, name.split()[0], exif=exif(6), **options)
        found = data.load(f"folder:{tmp_path}", validation=0)
        assert found.image_shape == (7, 5, 3)
        assert found.test.gather(np.arange(12))["x"].shape == (12, 7, 5, 3)

    @pytest.mark.parametrize("name", WITH_EXIF)
    def test_heads_are_read_without_pixels(self, tmp_path, name, monkeypatch):
        path = str(tmp_path / "x")
        picture().save(path, name.split()[0], exif=exif(1), **WITH_EXIF[name])
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
        assert images.head(path) == (5, 7, name != "WEBP")  # which has no grey
        (tmp_path / "plain").write_bytes(grey_png(7, 5))
        assert images.head(str(tmp_path / "plain")) == (5, 7, True)


class TestFormats:
    @pytest.mark.parametrize("form", images.FORMATS)
    def test_the_content_decides(self, tmp_path, form):
        for name in ("x.png", "x.eps", "x"):
            path = str(tmp_path / name)
            Image.new("L", (7, 5), 200).save(path, form)
            assert images.head(path)[:2] == (5, 7)
            assert (abs(images.decode(path, 1) - 200.0) < 3).all()

    def test_ghostscript_is_not_started(self, tmp_path, monkeypatch):
        monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started"))
        path = tmp_path / "x.png"
        path.write_bytes(EPS)
        refused(path, "no image of the formats BMP, GIF, JPEG")

    @pytest.mark.parametrize("form", ["ICO", "PCX", "TGA", "SGI", "PDF"])
    def test_other_formats(self, tmp_path, form):
        path = tmp_path / "x.png"
        picture().save(path, form)
        refused(path, "no image of the formats BMP, GIF, JPEG")

    @pytest.mark.parametrize("form", images.FORMATS)
    def test_a_file_that_is_cut_off(self, tmp_path, form):
        path = tmp_path / "x.png"
        picture((40, 30), "RGB").save(path, form)
        whole = path.read_bytes()
        for kept in (len(whole) // 2, 20, 3):
            path.write_bytes(whole[:kept])
            with pytest.raises(ValueError) as error:
                images.decode(str(path), 3)
            assert_one_line(error)
            assert repr(str(path)) in str(error.value)
        refused(path)

    def test_an_empty_file(self, tmp_path):
        (tmp_path / "x.png").touch()
        refused(tmp_path / "x.png", "it is empty")

    def test_a_name_of_two_lines(self, tmp_path):
        (tmp_path / "x\ny.png").write_bytes(b"no image")
        refused(tmp_path / "x\ny.png")

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    def test_images_in_prepared_sets(self, tmp_path, monkeypatch):
        """They lie in records, which TFDS decodes by whatever Pillow knows."""
        monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started"))
        good = png(np.zeros((8, 8, 1), np.uint8))
        for name, bad, word in (
            ("eps", EPS, "no image of the formats"),
            ("bomb", grey_png(20_000, 5_000, rows=1), "it has 20000 x 5000"),
        ):
            splits = {"train": ([good] * 4, [0, 1] * 2), "test": ([good, bad], [0, 1])}
            write_image_set(tmp_path, name, splits, num_classes=2, shape=(8, 8, 1))
            test = data.load(name, data_dir=tmp_path, validation=0).test
            with pytest.raises(ValueError, match=f"example 1 cannot be read .*{word}") as error:
                test.gather(np.arange(2))
            assert_one_line(error)


@pytest.mark.timeout(60)
class TestFilesThatAreNone:
    def test_a_pipe(self, tmp_path):
        os.mkfifo(tmp_path / "x.png")
        refused(tmp_path / "x.png", "no regular file")

    def test_a_device(self, tmp_path):
        (tmp_path / "x.png").symlink_to("/dev/zero")
        refused(tmp_path / "x.png", "no regular file")

    def test_a_socket(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # the path of a socket must be short
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("x.png")
            refused("x.png", "no regular file")

    def test_a_folder(self, tmp_path):
        refused(tmp_path, "no regular file")

    def test_links_that_lead_nowhere(self, tmp_path):
        for name, target in (("x.png", tmp_path / "x.png"), ("y.png", tmp_path / "none")):
            (tmp_path / name).symlink_to(target)
            refused(tmp_path / name)


class TestBounds:
    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize(
        ("size", "word"),
        [
            ((89_478_486, 1), "it has 89478486 x 1"),
            ((10_000, 9_000), "it has 10000 x 9000"),
            ((100_000, 100_000), "10000000000 pixels"),
        ],
    )
    def test_too_many_pixels(self, tmp_path, size, word):
        path = tmp_path / "x.png"
        path.write_bytes(grey_png(*size, rows=0))
        refused(path, "at most 89478485 pixels are read", word)

    def test_the_bound_itself_is_allowed(self, tmp_path, monkeypatch):
        path = tmp_path / "x.png"
        path.write_bytes(grey_png(6, 5))
        monkeypatch.setattr(images, "MOST_PIXELS", 30)
        assert images.decode(str(path), 1).shape == (5, 6, 1)
        monkeypatch.setattr(images, "MOST_PIXELS", 29)
        refused(path, "at most 29 pixels are read (it has 6 x 5)")

    @pytest.mark.parametrize("size", [(1, 120_000), (120_000, 1)])
    def test_a_thread_of_pixels_is_not_resized_whole(self, tmp_path, size, monkeypatch):
        made, resize = [], Image.Image.resize

        def spy(self, to, *arguments):
            made.append((self.size, to))
            return resize(self, to, *arguments)

        monkeypatch.setattr(Image.Image, "resize", spy)
        path = tmp_path / "x.png"
        path.write_bytes(grey_png(*size))
        assert images.decode(str(path), 1, (64, 64)).shape == (64, 64, 1)
        assert images.resize_image(np.zeros((*size, 3), np.uint8), (64, 64, 3)).shape == (64, 64, 3)
        assert len(made) == 2
        for start, end in made:
            assert max(*start, *end) <= 64

    @pytest.mark.parametrize("size", [(37, 23), (640, 480), (64, 64), (33, 500), (5, 1)])
    def test_ordinary_images_are_resized_and_then_cropped(self, size):
        image = np.asarray(picture(size, "RGB"))
        for height, width in ((32, 32), (64, 48)):
            scale = max(height / size[1], width / size[0])
            wide, high = (
                max(n, round(s * scale)) for n, s in zip((width, height), size, strict=True)
            )
            left, top = (wide - width) // 2, (high - height) // 2
            whole = np.asarray(
                Image.fromarray(image).resize((wide, high), Image.Resampling.BILINEAR)
            )
            expected = whole[top : top + height, left : left + width]
            found = images.resize_image(image, (height, width, 3))
            np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize("size", [(1, 1200), (900, 3), (7, 2000), (5000, 64)])
    def test_the_middle_of_a_long_image_is_that_of_the_whole(self, size, monkeypatch):
        image = np.asarray(picture(size, "RGB"))
        found = [images.resize_image(image, (16, 20, 3))]
        monkeypatch.setattr(images, "_LONG", 10**9)
        found.append(images.resize_image(image, (16, 20, 3)))
        np.testing.assert_allclose(*np.array(found, int), rtol=0, atol=1)
        assert found[0].std() > 5


class TestFoundAtTheStart:
    """The heads of images that are not trained on are read before a run begins."""

    def layout(self, root, names=("train", "test")):
        for name in names:
            for label in "ab":
                (root / name / label).mkdir(parents=True)
                for number in range(6):
                    picture((8, 8)).save(root / name / label / f"{number}.png")

    @pytest.mark.parametrize("name", ["test", "val"])
    @pytest.mark.parametrize("kind", ["no image", "empty", "pipe"])
    def test_a_bad_file(self, tmp_path, name, kind):
        self.layout(tmp_path, ("train", "test", "val"))
        path = tmp_path / name / "b" / "3.png"
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        else:
            path.write_bytes(kind.encode() if kind == "no image" else b"")
        with pytest.raises(ValueError, match=f"^{str(path)!r}: it is ") as error:
            data.load(f"folder:{tmp_path}", image_size=8)
        assert_one_line(error)

    def test_of_the_images_held_out(self, tmp_path, monkeypatch):
        """And of those to train on only one of a class, for its colours."""
        self.layout(tmp_path)
        read, head = [], images.head
        monkeypatch.setattr(images, "head", lambda path: read.append(path) or head(path))
        data.load(f"folder:{tmp_path}", image_size=8, validation=3)
        of_train = {path for path in read if path.startswith(str(tmp_path / "train"))}
        assert 3 <= len(of_train) <= 5
        assert len({*read} - of_train) == 12
        data.load(f"folder:{tmp_path}")
        assert len({*read}) == 24
