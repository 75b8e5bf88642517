import itertools
import json

import nets
import numpy as np
import pytest
import runs
from PIL import Image
from test_data import assert_one_line, everything

from jdecouple import data
from jdecouple.data import folders
from jdecouple.train.config import ConfigError
from jdecouple.train.loop import build, train_and_evaluate

CLASSES = ("ant", "bee", "cat")
# The grey value of an image says which it is.
COLOURS = {name: 60 + 60 * number for number, name in enumerate(CLASSES)}


def write(path, size=(8, 8), colour=0, mode="L", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def divided(root, splits=("train", "test"), count=6, inner="", suffix="png", grey=False, **options):
    """Writes SPLIT/CLASS/[INNER/]i.png of a colour (grey or red) for each class and number."""
    for split in splits:
        for name in CLASSES:
            for number in range(count):
                path = root / split / name / inner / f"{name}{number}.{suffix}"
                value = COLOURS[name] + number
                write(path, colour=(value,) * 3 if grey else value, **options)
    return root


def tiny_imagenet(root, count=6):
    """The layout of Tiny ImageNet: listed validation images, test images without labels."""
    jpeg = {"mode": "RGB", "quality": 100}
    divided(root, ["train"], count, "images", "JPEG", grey=True, **jpeg)
    lines = []
    for number, name in enumerate([*CLASSES, *CLASSES]):
        path = root / "val" / "images" / f"val_{number}.JPEG"
        write(path, colour=(COLOURS[name],) * 3, **jpeg)
        lines.append(f"val_{number}.JPEG\t{name}\t0\t0\t7\t7\n")
    (root / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    write(root / "test" / "images" / "test_0.JPEG", mode="RGB")
    (root / "wnids.txt").write_text("\n".join(CLASSES))
    for name in CLASSES:
        (root / "train" / name / f"{name}_boxes.txt").write_text("x")
    return root


def load(root, **options):
    return data.load(f"folder:{root}", **options)


def numbers(split):
    """Label and pixel of every example."""
    batch = everything(split)
    return sorted(zip(batch["label"].tolist(), batch["x"][:, 0, 0, 0].tolist(), strict=True))


def wanted(count):
    return [(i, COLOURS[name] + n) for i, name in enumerate(CLASSES) for n in range(count)]


class TestLayouts:
    @pytest.mark.parametrize("inner", ["", "images", "a/b"])
    def test_train_and_test(self, tmp_path, inner):
        found = load(divided(tmp_path, inner=inner), validation=0)
        assert (found.num_classes, found.image_shape) == (3, (8, 8, 1))
        assert numbers(found.train) == numbers(found.test) == wanted(6)
        assert len(found.validation) == 0

    @pytest.mark.parametrize("name", ["val", "validation"])
    def test_val_stands_in_for_test(self, tmp_path, name):
        found = load(divided(tmp_path, ["train", name]), validation=3)
        assert (len(found.train), len(found.validation)) == (15, 3)
        assert numbers(found.test) == wanted(6)
        assert sorted(numbers(found.train) + numbers(found.validation)) == wanted(6)

    def test_all_three(self, tmp_path):
        divided(tmp_path, ["train", "val"], 6)
        found = load(divided(tmp_path, ["test"], 2))
        assert numbers(found.train) == numbers(found.validation) == wanted(6)
        assert numbers(found.test) == wanted(2)

    def test_tiny_imagenet(self, tmp_path):
        found = load(tiny_imagenet(tmp_path), validation=0)
        assert (found.num_classes, found.image_shape) == (3, (8, 8, 3))
        assert numbers(found.train) == wanted(6)
        assert numbers(found.test) == [(i, COLOURS[n]) for i, n in enumerate(CLASSES) for _ in "12"]

    def test_classes_alone(self, tmp_path):
        for name in CLASSES:
            for number in range(10):
                write(tmp_path / name / f"{number}.png", colour=COLOURS[name] + number)
        found, again = load(tmp_path, seed=1), load(tmp_path, seed=2)
        assert numbers(found.test) == numbers(again.test)
        assert np.bincount(everything(found.test)["label"]).tolist() == [2, 2, 2]
        parts = [numbers(split) for split in (found.train, found.validation, found.test)]
        assert sorted(itertools.chain(*parts)) == wanted(10)

    def test_a_class_named_train(self, tmp_path):
        for name in ("plane", "train"):
            for number in range(5):
                write(tmp_path / name / f"{number}.png")
        assert load(tmp_path).num_classes == 2

    def test_hidden_and_other_files(self, tmp_path):
        divided(tmp_path)
        (tmp_path / ".DS_Store").write_text("x")
        (tmp_path / "train" / ".cache").mkdir()
        write(tmp_path / "train" / "ant" / ".thumbnails" / "1.png")
        (tmp_path / "train" / "ant" / "._ant0.png").write_text("x")
        (tmp_path / "test" / "bee" / "notes.txt").write_text("x")
        found = load(tmp_path, validation=0)
        assert numbers(found.train) == numbers(found.test) == wanted(6)

    def test_relative_to_data_dir(self, tmp_path):
        divided(tmp_path / "pets")
        assert len(load("pets", data_dir=tmp_path).test) == 18

    def test_rows_mix_the_classes(self, tmp_path):
        found = load(divided(tmp_path, count=20))
        labels = everything(found.train)["label"]
        assert (np.bincount(labels[:12], minlength=3) >= 3).all()


class TestLinks:
    @pytest.fixture
    def root(self, tmp_path):
        """Classes in `set`, and five images more beside it."""
        for number in range(5):
            write(tmp_path / "more" / f"m{number}.png", colour=200 + number)
        return divided(tmp_path / "set")

    def train(self, root):
        return numbers(load(root, validation=0).train)

    def more(self):
        return sorted(wanted(6) + [(0, 200 + number) for number in range(5)])

    def test_below_a_class(self, root):
        (root / "train" / "ant" / "deep").mkdir()
        (root / "train" / "ant" / "deep" / "more").symlink_to(root.parent / "more")
        assert self.train(root) == self.more()

    def test_alone_in_a_class(self, root):
        for path in (root / "train" / "ant").iterdir():
            path.unlink()
        (root / "train" / "ant" / "images").symlink_to(root.parent / "more")
        assert self.train(root) == [row for row in self.more() if row[0] or row[1] >= 200]

    def test_behind_links(self, root):
        write(root.parent / "third" / "1.png", colour=250)
        (root.parent / "more" / "third").symlink_to("../third")
        (root / "train" / "ant" / "more").symlink_to(root.parent / "more")
        assert self.train(root) == sorted([*self.more(), (0, 250)])

    def test_one_folder_counts_once(self, root):
        """Under its own name, whatever the links to it are called; so folders can be no bomb."""
        (root / "train" / "ant" / "z").mkdir()
        for number in range(30):
            level = root / "train" / "ant" / "z" / f"{number}"
            level.mkdir()
            for name in "ab":
                (level / name).symlink_to(f"../{number + 1}")
        (root / "train" / "ant" / "z" / "30").symlink_to(root.parent / "more")
        assert self.train(root) == self.more()
        names = [path for path, _ in folders._in_classes(root / "train", CLASSES)]
        (root / "train" / "ant" / "a").symlink_to("z")
        assert [path for path, _ in folders._in_classes(root / "train", CLASSES)] == names

    @pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "../bee/../ant", "/"])
    def test_loops_end(self, root, target):
        (root / "train" / "ant" / "loop").symlink_to(target)
        assert self.train(root) == wanted(6)

    def test_a_class_that_leads_above_itself(self, root):
        (root / "train" / "loop").symlink_to("../train")
        with pytest.raises(ValueError, match="loop' holds no images"):
            load(root)

    @pytest.mark.parametrize("target", ["gone", "nowhere"])
    def test_a_link_to_itself_or_nowhere_is_no_class(self, root, target):
        (root / "train" / "gone").symlink_to(target)
        assert self.train(root) == wanted(6)

    @pytest.mark.parametrize("target", ["ant9.png", "nowhere"])
    def test_a_link_to_itself_or_nowhere_is_no_image(self, root, target):
        (root / "train" / "ant" / "ant9.png").symlink_to(target)
        with pytest.raises(ValueError, match=r"ant9\.png") as error:
            load(root)
        assert_one_line(error)


class TestImages:
    def one(self, tmp_path, **options):
        """Pixel in the middle of an image, in a set of colour images."""
        divided(tmp_path, mode="RGB")
        save = {key: options.pop(key) for key in ("transparency",) if key in options}
        path = tmp_path / "test" / "ant" / "ant0.png"
        picture = Image.new(**{"mode": "RGB", "size": (8, 8), **options})
        if picture.mode == "P":
            picture.putpalette([value for value in range(256) for _ in "RGB"])
        picture.save(path, **save)
        batch = everything(load(tmp_path, image_size=8).test)
        (row,) = [x for x in batch["x"] if x[4, 4].tolist() not in self.others()]
        return row[4, 4].tolist()

    def others(self):
        return [[COLOURS[name] + n, 0, 0] for name in CLASSES for n in range(6)]

    @pytest.mark.parametrize(
        ("mode", "colour", "pixel"),
        [
            ("L", 10, [10, 10, 10]),
            ("1", 1, [255, 255, 255]),
            ("RGBA", (200, 10, 20, 255), [200, 10, 20]),
            ("RGBA", (200, 10, 20, 0), [255, 255, 255]),
            ("LA", (7, 255), [7, 7, 7]),
            ("I;16", 7 * 256 + 99, [7, 7, 7]),
        ],
    )
    def test_modes(self, tmp_path, mode, colour, pixel):
        assert self.one(tmp_path, mode=mode, color=colour) == pixel

    def test_transparent_palette(self, tmp_path):
        assert self.one(tmp_path, mode="P", color=3, transparency=3) == [255, 255, 255]

    def test_one_colour_image_makes_three_channels(self, tmp_path):
        divided(tmp_path)
        assert load(tmp_path).image_shape == (8, 8, 1)
        write(tmp_path / "test" / "cat" / "cat5.png", mode="RGB", colour=(9, 8, 7))
        found = load(tmp_path)
        assert found.image_shape == (8, 8, 3)
        assert [9, 8, 7] in everything(found.test)["x"][:, 0, 0].tolist()

    def test_resized_and_cropped(self, tmp_path):
        divided(tmp_path)
        write(tmp_path / "train" / "ant" / "wide.jpg", size=(40, 10), colour=200)
        found = load(tmp_path, image_size=5, validation=0)
        batch = everything(found.train)
        assert batch["x"].shape == (19, 5, 5, 1)
        assert np.isclose(batch["x"], 200, atol=2).all((1, 2, 3)).any()

    def test_turned_as_a_camera_was_held(self, tmp_path):
        divided(tmp_path, size=(8, 4))
        exif = Image.Exif()
        exif[0x0112] = 6
        write(tmp_path / "train" / "ant" / "turned.jpg", size=(4, 8), exif=exif)
        assert load(tmp_path, validation=0).image_shape == (4, 8, 1)
        assert everything(load(tmp_path, validation=0).train)["x"].shape == (19, 4, 8, 1)

    def test_decoded_when_read(self, tmp_path):
        divided(tmp_path)
        found = load(tmp_path, image_size=8, validation=0)
        test = found.test
        for path in (tmp_path / "test").rglob("*.png"):
            path.write_bytes(b"broken since")
        with pytest.raises(ValueError, match="example 0 cannot be read"):
            test.gather(np.array([0]))
        for path in (tmp_path / "train").rglob("*.png"):  # read already, for the statistics
            path.unlink()
        assert numbers(found.train) == wanted(6)

    def test_statistics_are_those_of_the_training_images(self, tmp_path):
        divided(tmp_path, mode="RGB")
        found = load(tmp_path, validation=0)
        pixels = everything(found.train)["x"].reshape(-1, 3) / 255
        np.testing.assert_allclose(found.mean, pixels.mean(0))
        np.testing.assert_allclose(found.std, np.where(pixels.std(0) > 0, pixels.std(0), 1))

    def test_label_noise(self, tmp_path):
        divided(tmp_path)
        noisy = load(tmp_path, label_noise=1.0, validation=0)
        assert numbers(noisy.train) != wanted(6)
        assert numbers(noisy.test) == wanted(6)


class TestRefused:
    def refused(self, root, *words, kind=ValueError, **options):
        with pytest.raises(kind) as error:
            everything(load(root, **options).test)
        assert_one_line(error)
        for word in words:
            assert word in str(error.value)

    @pytest.mark.parametrize("root", ["", "nowhere"])
    def test_no_folder(self, root):
        self.refused(root, "there is no folder", kind=FileNotFoundError)

    def test_no_classes(self, tmp_path):
        self.refused(tmp_path, "0 class folders", "PATH/CLASS")
        write(tmp_path / "ant" / "1.png")
        self.refused(tmp_path, "1 class folders")

    def test_images_without_classes(self, tmp_path):
        for split in ("train", "test"):
            write(tmp_path / split / "1.png")
        self.refused(tmp_path, "train' has 0 class folders")

    def test_class_without_images(self, tmp_path):
        empty = divided(tmp_path) / "train" / "empty"
        empty.mkdir()
        (tmp_path / "test" / "empty").mkdir()
        self.refused(tmp_path, f"'{empty}' holds no images")

    @pytest.mark.parametrize(("split", "other"), [("train", "test"), ("test", "train")])
    def test_classes_that_differ(self, tmp_path, split, other):
        write(divided(tmp_path) / split / "dog" / "1.png")
        self.refused(tmp_path, f"class 'dog' is in '{tmp_path / split}', but not in {other}")

    def test_nothing_to_test_on(self, tmp_path):
        write(divided(tmp_path, ["train"]) / "test" / "images" / "1.png")
        self.refused(tmp_path, "neither 'test' nor 'val' with labelled images")

    def test_too_few_to_hold_out(self, tmp_path):
        for name in "ab":
            write(tmp_path / name / "1.png")
        self.refused(tmp_path, "2 images", "too few")

    def test_sizes_that_differ(self, tmp_path):
        odd = write(divided(tmp_path) / "test" / "bee" / "bee9.png", size=(9, 8))
        self.refused(tmp_path, f"'{odd}' is 9 x 8 pixels", "others are 8 x 8", "image_size")

    @pytest.mark.parametrize("options", [{}, {"image_size": 8}])
    @pytest.mark.parametrize("name", ["no image", "cut off", "empty", "32 bits"])
    def test_broken_file(self, tmp_path, name, options):
        path = divided(tmp_path) / "test" / "bee" / "bee9.tif"
        write(path, mode="F" if name == "32 bits" else "L")
        if name != "32 bits":
            kept = {"no image": b"no image", "cut off": path.read_bytes()[:-20], "empty": b""}
            path.write_bytes(kept[name])
        self.refused(tmp_path, f"'{path}'", **options)

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("val_0.JPEG\tdog\t0", "line 7: 'dog' is no class"),
            ("val_9.JPEG\tant\t0", "val_9.JPEG'"),
            ("val_0.JPEG", "line 7: '' is no class"),
        ],
    )
    def test_bad_list_of_classes(self, tmp_path, line, words):
        listing = tiny_imagenet(tmp_path) / "val" / "val_annotations.txt"
        listing.write_text(f"{listing.read_text()}{line}\n")
        self.refused(tmp_path, f"'{listing}'", words)

    @pytest.mark.parametrize("name", ["{outside}", "../../outside.png", "..", "", "a\\b.png"])
    def test_list_that_leaves_its_folder(self, tmp_path, name):
        write(tmp_path / "outside.png", mode="RGB")
        listing = tiny_imagenet(tmp_path) / "val" / "val_annotations.txt"
        name = name.format(outside=tmp_path / "outside.png")
        listing.write_text(f"{listing.read_text()}{name}\tant\t0\n")
        self.refused(tmp_path, f"'{listing}', line 7: {name!r} is no name of a file alone")

    def test_list_in_another_encoding(self, tmp_path):
        listing = tiny_imagenet(tmp_path) / "val" / "val_annotations.txt"
        text = listing.read_text()
        listing.write_bytes(text.encode("utf-8-sig"))
        assert len(load(tmp_path).test) == 6
        listing.write_bytes(text.encode("utf-16"))
        self.refused(tmp_path, f"'{listing}' is no text in UTF-8")

    def test_image_that_is_not_listed(self, tmp_path):
        path = write(tiny_imagenet(tmp_path) / "val" / "images" / "more.JPEG")
        self.refused(tmp_path, f"val_annotations.txt' has no line for '{path}'")

    def test_class_that_is_not_listed(self, tmp_path):
        write(tiny_imagenet(tmp_path) / "train" / "dog" / "1.JPEG", mode="RGB")
        self.refused(tmp_path, "val_annotations.txt' has no image of class 'dog'")


def on(root):
    """Values of a run on a folder; what synthetic images alone read is at its defaults."""
    values = {"data__name": f"folder:{root}", "batch_size": 4}
    return {**values, "data__synthetic_size": 4096, "data__channels": 3}


@pytest.mark.slow
def test_a_run_on_a_folder(tmp_path):
    root = divided(tmp_path / "pets", mode="RGB")
    values = {**on(root), "steps": 2}
    config = runs.cheap(**values)
    result = train_and_evaluate(config, tmp_path / "run")
    assert result["finished"]
    found = json.loads((tmp_path / "run" / "config.json").read_text())["config"]["data"]
    assert found["name"] == f"folder:{root}"


@pytest.mark.slow
def test_images_that_are_not_square(tmp_path):
    """Nets with a mean over all pixels read them; others are refused."""
    root = divided(tmp_path / "wide", size=(12, 8), mode="RGB")
    values = {**on(root), "steps": 1}
    words = ("8 x 12 pixels", "config.data.image_size", "'mlp'")
    config = runs.cheap(**values)
    config.data.image_size = None
    nets.assert_clear(ConfigError, words, lambda: build(config))
    config.model.update(name="resnet", depth=8, width=0.125, hidden=None)
    assert build(config).dataset.image_shape == (8, 12, 3)
    # Whose mean is the end of its last block.
    del config.model.depth
    config.model.update(name="resnet18", width=1 / 64, variant="scpl")
    assert build(config).trainer.model.classifier.layers[-1].kernel.shape == (8, 3)


def test_a_broken_file_ends_a_run_with_one_line(tmp_path):
    root = divided(tmp_path / "pets", mode="RGB")
    path = root / "test" / "bee" / "bee3.png"
    path.write_bytes(path.read_bytes()[:-30])
    values = {**on(root), "steps": 2}
    with pytest.raises(ValueError) as error:
        train_and_evaluate(runs.cheap(**values), tmp_path / "run")
    assert_one_line(error)
    assert f"'{path}'" in str(error.value)
