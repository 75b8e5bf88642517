"""Every file in configs/ starts, trains a few steps of a tiny stand-in and saves."""

import json
import runpy

import nets
import pytest
import runs
from text_sets import csv_set, examples
from tfds_writer import write_text_set

from jdecouple import methods
from jdecouple.checkpoint import Checkpointer
from jdecouple.train.config import ConfigError, filled, validate
from jdecouple.train.loop import build, train_and_evaluate

FOLDER = runs.REPOSITORY / "configs"
# Arguments to call the files with that take one.
UNDELAYED = [name for name in methods.names() if name not in nets.DELAYED]
PAPERS = ("deinforeg", "scpl", "al", "dgl", "predsim", "auglocal", "man", "infopro")
VISION = [f"cifar10,mlp,{name}" for name in UNDELAYED]
VISION += [f"cifar10,mlp,bp@{name}" for name in PAPERS]
VISION += [f"cifar10,vgg8,{name}" for name in ("bp", "deinforeg", "scpl", "bp@predsim")]
VISION += ["cifar10,vgg8b,predsim", "cifar10,vgg8b,bp@predsim"]
VISION += [f"cifar10,resnet18,{name}" for name in ("scpl", "deinforeg", "greedy_exit@scpl")]
VISION += [f"cifar10,resnet20,{name}" for name in ("al", "dgl,3", "infopro,4", "infopro")]
DELAYED = [f"cifar10,mlp,{name},2" for name in ("bp", *nets.DELAYED)]
DELAYED += ["cifar10,mlp,fdg,1", "cifar10,mlp,bp@fr", "cifar10,resnet20,fdg,3"]
EQUAL = ["digits,mlp,deinforeg", "cifar10,mlp,scpl"]
TEXT = ["glue/sst2,transformer,deinforeg", "ag_news_subset,lstm,scpl"]
TEXT += ["imdb_reviews,transformer,bp", "csv:dbpedia,lstm,al"]
TEXT += ["glue/sst2,lstm,bp@scpl"]
TEXT += [f"glue/sst2,lstm,{name}" for name in UNDELAYED if name not in ("scpl", "al", "infopro")]
# Trained in the fast run: each file and kind of model once.
FAST = [None]
GROWING = ["glue/sst2,lstm,deinforeg", "csv:dbpedia,transformer,scpl", "imdb_reviews,lstm,al"]
ARGUMENTS = {"vision": VISION, "delayed": DELAYED, "text": TEXT, "equal": EQUAL}
ARGUMENTS["growing"] = GROWING
ARGUMENTS["lm"] = ["topics,gpt,dgl,2"]  # others: test_token_runs.py
CASES = [
    (path.stem, argument)
    for path in sorted(FOLDER.glob("*.py"))
    for argument in ARGUMENTS.get(path.stem, [None])
]


def module(name):
    return runpy.run_path(str(FOLDER / f"{name}.py"))


def load(name, argument):
    get_config = module(name)["get_config"]
    return get_config() if argument is None else get_config(argument)


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_values_are_valid(name, argument):
    config = load(name, argument)
    assert config.is_locked
    assert validate(config).to_dict() == filled(config).to_dict()


IMAGES = [
    case if case[1] in FAST else pytest.param(*case, marks=pytest.mark.slow)
    for case in CASES
    if case[0] not in ("text", "growing", "lm")
]


@pytest.mark.parametrize(("name", "argument"), IMAGES)
def test_four_steps_of_a_stand_in(tmp_path, name, argument):
    config = load(name, argument)
    config.data.name = "synthetic"
    config.data.image_size = 16
    config.data.synthetic_size = 20
    config.batch_size = 8
    config.steps = 4
    config.mesh.stages = 1
    name = config.model.name
    if name in ("vgg8", "vgg8b", "resnet18"):
        config.model.width = 1 / 64
    elif name == "resnet20":
        config.model.width = 1 / 16
        config.data.image_size = 8
    elif name == "mlp":
        config.model.hidden = 8
    else:
        config.model.blocks = "2,M|2"
    if name == "vgg8b":
        config.model.hidden = 8
    if config.method.name == "deinforeg":
        config.method.projector = "8-4"
    if config.method.name == "al":
        config.method.features = 8
    if config.method.name == "adl":
        config.method.accumulate = 2
    assert_trained(config, tmp_path, [2, 4])
    if config.split == "fdg":
        assert json.loads((tmp_path / "config.json").read_text())["boundaries"] == [0, 4, 7]


def assert_trained(config, workdir, steps):
    result = train_and_evaluate(config, workdir)
    assert result["finished"]
    assert 0 <= result["test"]["accuracy"] <= 1
    assert Checkpointer(workdir / "checkpoints", read_only=True).steps() == steps
    assert (workdir / "curves.png").is_file()
    (train,) = [line for line in runs.lines(workdir) if line["split"] == "train"]
    assert train["loss"] > 0


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Folder of small sets with the names and columns of real ones."""
    folder = tmp_path_factory.mktemp("texts")
    two, four = (
        {"train": examples(40, num_classes=n), "test": examples(8, num_classes=n)} for n in (2, 4)
    )
    hidden = {"train": two["train"], "validation": two["test"], "test": [(-1, "?")] * 4}
    news = {split: [(label, "title", each) for label, each in rows] for split, rows in four.items()}
    write_text_set(folder, "glue/sst2", hidden, columns=("sentence",), version="2.0.0")
    write_text_set(folder, "imdb_reviews/plain_text", two)
    columns = ("title", "description")
    write_text_set(folder, "ag_news_subset", news, columns=columns, num_classes=4)
    csv_set(folder / "dbpedia", train=42, num_classes=14)
    return folder


@pytest.mark.parametrize("argument", nets.marked(TEXT, FAST))
def test_two_steps_of_texts(tmp_path, texts, argument):
    config = load("text", argument)
    config.data.data_dir = str(texts)
    config.batch_size = 8
    config.steps = 2
    config.eval_every = 1
    config.mesh.stages = 1
    config.model.hidden = 6
    config.model.depth = 1
    assert_trained(config, tmp_path, [1, 2])


@pytest.mark.parametrize("argument", nets.marked(GROWING, ()))
def test_texts_in_two_steps(tmp_path, texts, argument):
    config = load("growing", argument)
    parts = config.data.parts
    assert parts == ((8, 16) if "sst2" in argument else (100, 250))
    config.data.data_dir = str(texts)
    config.growth.epochs, config.growth.steps = None, (0, 1)
    config.batch_size = 8
    config.steps = 2
    config.mesh.stages = 1
    config.model.hidden = 6
    assert train_and_evaluate(config, tmp_path)["finished"]
    first, second = (line for line in runs.lines(tmp_path) if line["split"] == "train")
    assert {"block_0/loss", "block_2/loss"} <= first.keys()
    assert {"block_3/loss", "block_4/loss"} <= second.keys()


def test_a_method_for_images_refuses_texts(texts):
    config = load("text", "glue/sst2,lstm,infopro")
    config.data.data_dir, config.batch_size = str(texts), 8
    with pytest.raises(ConfigError, match=r"image|picture") as error:
        build(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_docstring_gives_the_command(name):
    text = (FOLDER / f"{name}.py").read_text()
    assert f"jdecouple train --config {name}" in text
