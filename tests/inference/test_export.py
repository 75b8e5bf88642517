"""An exported network answers as evaluation does, anywhere and for any number of inputs."""

import errno
import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
import sequence_nets
from flax import nnx
from safetensors.numpy import load_file

import jdecouple as jd
from jdecouple.data import augment
from jdecouple.inference import export as exporting
from jdecouple.inference.export import ALL, PLATFORMS, export
from jdecouple.pipeline.build import abstract, build_units, model_input

COUNTS = (1, 3, 8)
IMAGES = {"image_size": 8, "channels": 1}
NORMALISE = augment.get("none", mean=(0.4,), std=(0.3,))
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("deinforeg", {"batch_norm": True, "hidden": 8, "depth": 2, **IMAGES}),
    "vgg": ("infopro", {"blocks": "4,M|6,M", **IMAGES}),
    "resnet": ("predsim", {"depth": 8, "width": 0.25, **IMAGES}),
    "wide_resnet": ("bp", {"depth": 10, "widen": 1, **IMAGES}),
    "vit": ("dgl", {"pooling": "class"}),
    "lstm": ("deinforeg", {}),
    "transformer": ("al", {"dropout": 0.1}),
    "paper": ("early_exit", {"dropout": 0.1}),
}
"""Method and options by the family of models; together they have every kind of head."""


class Network(NamedTuple):
    """What `export` takes, and inputs."""

    units: tuple
    params: tuple
    stats: tuple
    transform: Any
    x: np.ndarray

    def write(self, folder: Path, **options: Any) -> Path:
        example = jax.ShapeDtypeStruct(self.x.shape[1:], self.x.dtype)
        return export(folder, *self[:3], example, transform=self.transform, **options)


def network(family: str, dtype: Any = None) -> Network:
    """A tiny network of a family with statistics that are not the initial ones."""
    name, options = FAMILIES[family]
    if family in sequence_nets.SIZES:
        model = sequence_nets.model(family, **options)
        inputs, classes = sequence_nets.texts(COUNTS[-1]), sequence_nets.CLASSES
    else:
        model = jd.models.get(family)(nets.CLASSES, rngs=nnx.Rngs(0), **options)
        inputs, classes = None, nets.CLASSES
    transform = None
    if inputs is None or family == "vit":
        inputs, transform = nets.images(1, COUNTS[-1])[0]["x"], NORMALISE
    batch = {"x": inputs, "label": np.zeros(COUNTS[-1], np.int32)}
    carry = model_input(abstract(batch), transform)
    units = build_units(model, nets.method(name), carry, classes, 0, dtype).units
    params, stats = zip(*(unit.initial() for unit in units), strict=True)
    return Network(units, tuple(map(moved, params)), tuple(map(moved, stats)), transform, inputs)


def moved(arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays somewhere else, as if they had been trained."""
    rng = np.random.default_rng(0)
    return {
        name: (array + rng.uniform(-0.1, 0.1, array.shape)).astype(array.dtype)
        for name, array in arrays.items()
    }


def expected(network: Network) -> dict[int, np.ndarray]:
    """Logits of every exit, block by block, as evaluation computes them."""
    carry, found = {"x": network.x}, {}
    if network.transform is not None:
        carry = jax.jit(lambda carry: network.transform(carry, None, False))(carry)
    states = [*zip(*network[:3], strict=True)]
    for unit, params, stats in states:
        carry["x"], logits = jax.jit(unit.evaluate)(params, stats, carry)
        if logits is not None:
            found[unit.index] = logits
    if unit.descends:
        answer = unit.turn(params, stats, carry["x"])
        for unit, params, stats in reversed(states):
            answer = unit.descend(params, stats, answer)
        found[states[-1][0].index] = answer
    return {index: np.asarray(logits, np.float32) for index, logits in found.items()}


def served(folder: Path) -> Any:
    """The script of an exported network, as a module."""
    spec = importlib.util.spec_from_file_location("serve", folder / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_answers(folder: Path, x: np.ndarray, wanted: np.ndarray, counts: Any = COUNTS) -> None:
    assert np.ptp(wanted, axis=-2).max(-1).min() > 1e-3  # inputs are told apart
    predict = served(folder).predict
    for count in counts:
        found = predict(x[:count])
        assert found.dtype == np.float32
        wanted_here = wanted[..., :count, :]
        assert found.shape == wanted_here.shape
        assert np.max(np.abs(found - wanted_here) / np.maximum(1, np.abs(wanted_here))) < 1e-6


@pytest.fixture(scope="module")
def perceptron() -> Network:
    return network("mlp")


@pytest.mark.parametrize("family", nets.marked(FAMILIES, ("vgg",)))
def test_every_family_answers_as_in_evaluation(family, tmp_path):
    net = network(family)
    logits = expected(net)
    folder = net.write(tmp_path / "out", exit=ALL)
    about = json.loads((folder / "model.json").read_text())
    assert about["exits"] == sorted(logits)
    assert about["platforms"] == [*PLATFORMS]
    assert about["input"]["shape"][0] == "batch"
    assert_answers(folder, net.x, np.stack([logits[index] for index in sorted(logits)]), (3,))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_any_number_of_inputs(family, tmp_path):
    net = network(family)
    wanted = expected(net)
    assert_answers(net.write(tmp_path / "out"), net.x, wanted[max(wanted)])


def test_the_first_blocks_answer_alone(perceptron, tmp_path):
    folder = perceptron.write(tmp_path / "out", exit=0)
    assert_answers(folder, perceptron.x, expected(perceptron)[0])
    about = json.loads((folder / "model.json").read_text())
    assert (about["exit"], about["exits"]) == (0, [0])
    assert {name.split("/")[0] for name in about["weights"]} == {"block_0"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_network_in_half_precision_answers_in_float32(tmp_path, dtype):
    net = network("mlp", dtype)
    assert_answers(net.write(tmp_path / "out"), net.x, expected(net)[1], (3,))


def test_files_are_enough_to_rebuild(perceptron, tmp_path):
    about = {"class_names": ["a", "b", "c", "d", "e"], "method": "deinforeg"}
    folder = perceptron.write(tmp_path / "out", about=about)
    assert sorted(os.listdir(folder)) == [
        "flatbuffers",
        "model.jax",
        "model.json",
        "model.safetensors",
        "serve.py",
    ]
    said = json.loads((folder / "model.json").read_text())
    assert said["class_names"] == about["class_names"]
    assert said["input"] == {"shape": ["batch", 8, 8, 1], "dtype": "uint8"}
    assert said["output"] == {"shape": ["batch", 5], "dtype": "float32"}
    assert said["versions"]["jax"] == jax.__version__
    weights = load_file(folder / "model.safetensors")
    trainer = jd.Trainer(
        jd.models.mlp(nets.CLASSES, rngs=nnx.Rngs(0), **FAMILIES["mlp"][1]),
        nets.method("deinforeg"),
        jd.optim.sgd(0.1),
        example={"x": perceptron.x, "label": np.zeros(8, np.int32)},
        num_classes=nets.CLASSES,
    )
    names = {name for name in trainer.to_arrays(trainer.abstract()) if "/opt/" not in name}
    assert weights.keys() == said["weights"].keys() == names
    for index, (params, stats) in enumerate(zip(perceptron.params, perceptron.stats, strict=True)):
        for kind, named in (("params", params), ("stats", stats)):
            for name, array in named.items():
                np.testing.assert_array_equal(weights[f"block_{index}/{kind}/{name}"], array)


def test_the_script_names_classes(perceptron, tmp_path, monkeypatch, capsys):
    names = ["ant", "bee", "cat", "dog", "eel"]
    for exit in (None, ALL):
        folder = perceptron.write(tmp_path / str(exit), exit=exit, about={"class_names": names})
        np.save(tmp_path / "x.npy", perceptron.x)
        monkeypatch.setattr(sys, "argv", ["serve.py", str(tmp_path / "x.npy")])
        runpy.run_path(str(folder / "serve.py"), run_name="__main__")
        wanted = expected(perceptron)[1].argmax(-1)
        assert capsys.readouterr().out.splitlines() == [names[label] for label in wanted]


def test_an_answer_that_comes_down_needs_the_whole_network(tmp_path):
    net = network("transformer")
    words = ("exit is 0", "allowed are 2 and 'all'")
    nets.assert_clear(ValueError, words, lambda: net.write(tmp_path / "out", exit=0))
    assert os.listdir(tmp_path) == []


class Counting(nnx.Module):
    """A block that asks for a number where any may be."""

    def __call__(self, x):
        return x.reshape(len(x), -1)


def test_a_block_that_needs_a_number_says_so(tmp_path):
    model = jd.Model([Counting(), nnx.Linear(64, nets.CLASSES, rngs=nnx.Rngs(0))])
    x = np.linspace(0, 1, 3 * 64, dtype=np.float32).reshape(3, 8, 8, 1)
    batch = {"x": x, "label": np.zeros(3, np.int32)}
    units = build_units(model, nets.method("bp"), abstract(batch), None, 0, None).units
    states = zip(*(unit.initial() for unit in units), strict=True)
    net = Network(units, *states, None, x)
    words = ("block 0 cannot be exported", "x.shape[0]", "batch_size")
    nets.assert_clear(ValueError, words, lambda: net.write(tmp_path / "out"))
    folder = net.write(tmp_path / "out", batch_size=3)
    assert_answers(folder, x, expected(net)[1], (3,))


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
def test_an_interrupted_export_leaves_nothing(perceptron, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(exporting.shutil, "copyfile", fail)  # model.jax is written by then
    path = tmp_path / "deep" / "out"
    with pytest.raises(type(error)) as raised:
        perceptron.write(path, exit=0)
    if error is FULL:
        assert str(raised.value) == f"cannot write {path}: No space left on device"
    assert os.listdir(tmp_path / "deep") == []


def test_a_folder_that_holds_something_is_left_as_it_is(perceptron, tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "empty").mkdir()
    words = ("is there", "a new or an empty folder")
    for path in (tmp_path, tmp_path / "precious"):
        nets.assert_clear(ValueError, words, lambda: perceptron.write(path))  # noqa: B023
    perceptron.write(tmp_path / "empty", exit=0)
    assert (tmp_path / "precious").read_text() == "mine"


def test_bad_arguments_are_refused_in_one_line(perceptron, tmp_path, monkeypatch):
    def refused(words, **options):
        nets.assert_clear(ValueError, words, lambda: perceptron.write(tmp_path / "out", **options))

    refused(("exit is 7", "0, 1 and 'all'"), exit=7)
    refused(("batch_size is 0",), batch_size=0)
    refused(("platform is 'gpu'", "cuda"), platforms=("gpu",))
    monkeypatch.setattr(exporting, "MOST_BYTES", 2**10)
    refused(("the weights are", "GiB"))
    assert os.listdir(tmp_path) == []


NEEDED = ("jax", "jaxlib", "ml_dtypes", "numpy", "numpy.libs", "opt_einsum", "scipy", "scipy.libs")


@pytest.mark.slow
def test_jax_alone_serves_it(perceptron, tmp_path):
    """A process that can import nothing else."""
    site = tmp_path / "site"
    site.mkdir()
    packages = Path(jax.__file__).parents[1]
    for name in NEEDED:
        if (packages / name).exists():
            (site / name).symlink_to(packages / name)
    folder = perceptron.write(tmp_path / "out", about={"class_names": ["a", "b", "c", "d", "e"]})
    np.save(tmp_path / "x.npy", perceptron.x)
    code = (
        "import sys, numpy as np; sys.path.insert(0, sys.argv[1]); import serve\n"
        "np.save('logits.npy', serve.predict(np.load('x.npy')))\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'flax', 'jdecouple', 'safetensors'}"
    )
    for command in (["-c", code, folder], [folder / "serve.py", "x.npy"]):
        subprocess.run(
            [sys.executable, "-S", *command],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"},
            check=True,
        )
    wanted = expected(perceptron)[1]
    assert np.max(np.abs(np.load(tmp_path / "logits.npy") - wanted)) < 1e-6
