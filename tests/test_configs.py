"""Every file in configs/ starts, trains two steps of a tiny stand-in and saves."""

import runpy

import pytest
import runs

from jdecouple import methods
from jdecouple.checkpoint import Checkpointer
from jdecouple.config import filled, validate
from jdecouple.training import train_and_evaluate

FOLDER = runs.REPOSITORY / "configs"
# Arguments to call the files with that take one; the convolutions compile for long.
VISION = ["cifar10,mlp,deinforeg", "cifar10,vgg8,scpl", "fashion_mnist,mlp,bp"]
SLOW = [
    pytest.param("vision", f"cifar10,vgg8,{x}", marks=pytest.mark.slow) for x in ("bp", "deinforeg")
]
ARGUMENTS = {"vision": VISION}
CASES = [
    (path.stem, argument)
    for path in sorted(FOLDER.glob("*.py"))
    for argument in ARGUMENTS.get(path.stem, [None])
]


def load(name, argument):
    get_config = runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"]
    return get_config() if argument is None else get_config(argument)


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_values_are_valid(name, argument):
    config = load(name, argument)
    assert config.is_locked
    assert validate(config).to_dict() == filled(config).to_dict()


@pytest.mark.parametrize(("name", "argument"), [*CASES, *SLOW])
def test_two_steps_of_a_stand_in(tmp_path, name, argument):
    config = load(name, argument)
    config.data.name = "synthetic"
    config.data.image_size = 16
    config.data.synthetic_size = 20
    config.batch_size = 8
    config.steps = 2
    config.mesh.stages = 1
    if config.model.name == "vgg8":
        config.model.width = 1 / 64
    elif config.model.name == "mlp":
        config.model.hidden = 8
    else:
        config.model.blocks = "2,M|2"
    if config.method.name == "deinforeg":
        config.method.projector = "8-4"
    result = train_and_evaluate(config, tmp_path)
    assert result["finished"]
    assert 0 <= result["test"]["accuracy"] <= 1
    assert Checkpointer(tmp_path / "checkpoints", read_only=True).steps() == [2]
    assert (tmp_path / "curves.png").is_file()


def test_every_method_is_covered():
    assert {argument.split(",")[2] for argument in VISION} == set(methods.names())


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_docstring_gives_the_command(name):
    text = (FOLDER / f"{name}.py").read_text()
    assert f"python train.py --config configs/{name}.py" in text


def test_the_papers_settings():
    deinforeg = load("vision", "cifar10,vgg8,deinforeg")
    assert (deinforeg.optimizer.name, deinforeg.batch_size, deinforeg.epochs) == ("lars", 128, 200)
    rates = deinforeg.optimizer.learning_rate, deinforeg.optimizer.end_learning_rate
    assert (*rates, deinforeg.optimizer.weight_decay) == (0.2, 0.002, 1e-4)
    assert deinforeg.optimizer.schedule == "cosine"
    scpl = load("vision", "cifar10,vgg8,scpl")
    assert (scpl.optimizer.name, scpl.batch_size, scpl.model.layout) == ("adam", 1024, "scpl")
    rates = scpl.optimizer.learning_rate, scpl.optimizer.end_learning_rate
    assert rates == (1e-3, 1e-5)
    assert scpl.data.augment == "two_views"
