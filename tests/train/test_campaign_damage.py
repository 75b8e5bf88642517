"""A campaign of damage: every file of a checkpoint in four ways, and inputs that are no inputs."""

import functools
import math
import operator
import random
import shutil
import time
from pathlib import Path

import chex
import numpy as np
import pytest
from ml_collections import ConfigDict
from runs import BP, arrays_at, delayed, finished, tiny
from tfds_writer import png, write_image_set

from jdecouple import data
from jdecouple.checkpoint import Checkpointer
from jdecouple.train import config as configuration
from jdecouple.train.errors import ConfigError, one_line
from jdecouple.train.run import build

pytestmark = pytest.mark.slow


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data)) if data else 0]


def flip(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    if data:
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def zero(data: bytes, chance: random.Random) -> bytes:
    return bytes(len(data))


def missing(data: bytes, chance: random.Random) -> None:
    return None


DAMAGES = (cut, flip, zero, missing)


@pytest.mark.parametrize("values", [{}, BP, delayed("fdg")], ids=["deinforeg", "bp", "fdg"])
def test_every_file_of_a_checkpoint(tmp_path, values):
    """The damaged one is refused, or what it gives is what was saved: never another value."""
    reference = finished(**values)
    folder = Path(shutil.copytree(reference / "checkpoints", tmp_path / "checkpoints"))
    steps = Checkpointer(folder, read_only=True).steps()
    saved = {step: arrays_at(reference, step) for step in steps}
    files = [path for path in sorted((folder / str(steps[-1])).rglob("*")) if path.is_file()]
    chance, refused = random.Random(0), 0
    for file in files:
        sound = file.read_bytes()
        for damage in DAMAGES:
            damaged = damage(sound, chance)
            file.unlink() if damaged is None else file.write_bytes(damaged)
            restored = Checkpointer(folder, read_only=True).restore(saved[steps[-1]])
            assert restored is not None
            refused += restored.step != steps[-1]
            wanted = saved[restored.step]
            chex.assert_trees_all_equal_shapes_and_dtypes(restored.arrays, wanted)
            chex.assert_trees_all_equal(restored.arrays, wanted)
            file.write_bytes(sound)
    print(f"{len(files)} files in {len(DAMAGES)} ways: {refused} refused, none restored wrongly")
    assert refused >= len(files)


# --- Inputs that are no inputs -----------------------------------------------------------------

BAD_VALUES = (-1, 0, 0.5, 2**31, 10**400, math.nan, math.inf, -1e300, True, "x", "", (), (1, "a"))
GIVEN_UP = 120  # seconds that one input may take on a busy machine
DATA_INPUTS, CONFIGURATIONS = 50, 50


def texts(folder: Path) -> dict:
    rows = [f'{index % 2},"good, film {index}"' for index in range(40)]
    for name in ("train", "test"):
        (folder / f"{name}.csv").write_text("label,text\n" + "\n".join(rows) + "\n")
    (folder / "vectors.txt").write_text("good 0.5 0.25\nfilm 1.5 -2\n")
    return {"name": f"csv:{folder}", "glove": str(folder / "vectors.txt"), "max_length": 8}


def pictures(folder: Path) -> dict:
    rng = np.random.default_rng(0)
    for index in range(16):
        path = folder / "train" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(rng.integers(0, 256, (8, 8, 3), np.uint8)))
    return {"name": f"folder:{folder}", "image_size": 8}


def records(folder: Path) -> dict:
    blank = png(np.zeros((8, 8, 1), np.uint8))
    splits = {"train": ([blank] * 24, [0, 1] * 12), "test": ([blank] * 2, [0, 1])}
    write_image_set(folder, "tiny", splits, num_classes=2, shape=(8, 8, 1))
    return {"name": "tiny", "data_dir": str(folder)}


def test_malformed_data(tmp_path):
    """It is read as what it then says, or told in one line."""
    chance, told = random.Random(0), 0
    for index in range(DATA_INPUTS):
        folder = tmp_path / str(index)
        folder.mkdir()
        options = (texts, pictures, records)[index % 3](folder)
        file = chance.choice([path for path in sorted(folder.rglob("*")) if path.is_file()])
        damaged = chance.choice(DAMAGES)(file.read_bytes(), chance)
        file.unlink() if damaged is None else file.write_bytes(damaged)
        try:
            with one_line():
                loaded = data.load(**options)
                for split in (loaded.train, loaded.validation, loaded.test):
                    split.gather(np.arange(len(split)))
        except ConfigError as error:
            told += is_one_line(error)
    print(f"{DATA_INPUTS} data sets with a damaged file: {told} told in one line, others readable")
    assert told > DATA_INPUTS // 4


def test_malformed_configurations():
    """A bad value in a random key is refused in one line, soon, or is a value that can be used."""
    chance, told = random.Random(0), 0
    keys = flat(configuration.filled(tiny(), all_options=True))
    for _ in range(CONFIGURATIONS):
        key, value = chance.choice(keys), chance.choice(BAD_VALUES)
        began = time.monotonic()
        try:
            build(changed(key, value))
        except ConfigError as error:
            told += is_one_line(error)
        assert time.monotonic() - began < GIVEN_UP, (key, value)
    print(f"{CONFIGURATIONS} configurations with a bad value: {told} told in one line")
    assert told > CONFIGURATIONS // 2


def is_one_line(error: ConfigError) -> bool:
    assert len(str(error).splitlines()) == 1, error
    return True


def flat(config: ConfigDict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in config.items():
        inside = isinstance(value, ConfigDict)
        keys += flat(value, f"{prefix}{key}.") if inside else [prefix + key]
    return keys


def changed(path: str, value: object) -> dict:
    """The tiny configuration as a plain dict, with a value of any type at a key."""
    *sections, key = path.split(".")
    plain = tiny().to_dict()
    section = functools.reduce(operator.getitem, sections, plain)
    section[key] = value
    return plain
