"""Which models, meshes and schedules the SPMD engine takes; the others are refused in one line."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
import runs
from flax import nnx
from spmd_nets import Ends, build, setting

import jdecouple as jd
from jdecouple.train import loop as training
from jdecouple.train.config import ConfigError

pytestmark = pytest.mark.usefixtures("module_x64")


ONE, OTHER = jax.devices()[:2]


class Scaled(nnx.Module):
    """A dense layer times a constant that is no part of its state."""

    def __init__(self, scale: float, features: int = 8, rngs: nnx.Rngs | None = None):
        self.dense = nnx.Linear(8, features, param_dtype=jnp.float64, rngs=rngs or nnx.Rngs(0))
        self.scale = scale

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(x) * np.linspace(0, self.scale, 1000)[-1]


def blocks(*modules: nnx.Module, **options: Any) -> dict[str, Any]:
    """Options of a trainer of these blocks between an embedding and a classifier."""
    rngs = nnx.Rngs(0)
    classifier = nnx.Linear(8, nets.CLASSES, param_dtype=jnp.float64, rngs=rngs)
    return {"model": jd.Model([Ends(rngs), *modules, classifier]), **options}


def dropout(rate: float) -> nnx.Module:
    dense = nnx.Linear(8, 8, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    return nnx.Sequential(dense, nnx.Dropout(rate, rngs=nnx.Rngs(0)))


def pooled() -> dict[str, Any]:
    model = jd.models.vgg(
        nets.CLASSES, blocks="4|4,M|4|4", image_size=8, channels=1, rngs=nnx.Rngs(0)
    )
    return {"model": model, "example": nets.images(1)[0]}


def refuse(words: tuple[str, ...], name: str = "bp", **options: Any) -> None:
    options = {
        "model": nets.mlp(),
        "optimizer": jd.optim.sgd(0.1),
        "mesh": jd.make_mesh(2),
        "example": nets.batches(1)[0],
        "engine": "spmd",
        **options,
    }

    def make(engine: str) -> jd.Trainer:
        values = {**options, "engine": engine}
        model, optimizer = values.pop("model"), values.pop("optimizer")
        return jd.Trainer(model, nets.method(name), optimizer, **values)

    nets.assert_clear(ValueError, ("engine", *words), lambda: make(options["engine"]))
    if options["engine"] == "spmd":
        assert make("auto").engine == "mpmd"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: blocks(Scaled(1), dropout(0), Scaled(1)), ("2", "1", "block/dense/bias")),
        (lambda: blocks(Scaled(1), Scaled(2), Scaled(1)), ("2", "1", "program")),
        pytest.param(
            lambda: blocks(dropout(0.1), dropout(0.2), dropout(0.1)),
            ("2", "1", "program"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            pooled,
            ("2", "1", "input", "[16, 4, 4, 4] instead of", "[16, 8, 8, 4]"),
            marks=pytest.mark.slow,
        ),
        (lambda: {"model": nets.mlp(depth=3)}, ("2", "1", "head/classifier")),
        (lambda: {"model": nets.mlp(depth=2)}, ("1", "0", "block/layers/0")),
        (
            lambda: {"model": nets.mlp(depth=2), "name": "deinforeg", "mesh": jd.make_mesh(1, 2)},
            ("1", "0", "block/layers/0"),
        ),
    ],
)
def test_other_blocks_are_named(make, words):
    first, second, *others = words
    refuse((f"block {first} differs from block {second}: ", *others), **make())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "fdg"}, ("delayed",)),
        ({"schedule": "1f1b"}, ("gpipe", "1f1b")),
        pytest.param({"schedule": "zb_h1"}, ("gpipe", "zb_h1"), marks=pytest.mark.slow),
        pytest.param({"schedule": "sequential"}, ("gpipe", "sequential"), marks=pytest.mark.slow),
        ({"fuse": False}, ("fuse=False",)),
        ({"remat": ("stages", "none")}, ("all", "['stages', 'none']")),
        ({"mesh": jd.make_mesh(replicas=(2, 1))}, ("replicas", "2, 1")),
        ({"engine": "fast"}, ("fast", "mpmd, spmd, auto")),
        ({"mesh": jd.pipeline.StageMesh(((ONE,), (OTHER,), (ONE,)))}, ("row of devices",)),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    refuse(words, **options)


@pytest.mark.slow
def test_other_functions_that_drew_the_weights_do_not_matter():
    """Every layer of init="torch" holds a function of its own, which no program sees."""
    assert build("deinforeg", "vgg", 4).engine == "spmd"


@pytest.mark.parametrize(
    ("stages", "options", "engine"),
    [(2, {}, "spmd"), (1, {}, "mpmd"), (2, {"schedule": "1f1b"}, "mpmd")],
)
def test_auto(stages, options, engine):
    trainer = build("bp", "dropout", stages, engine="auto", **options)
    assert trainer.engine == engine
    assert trainer.schedule.name == {"spmd": "gpipe"}.get(
        engine, options.get("schedule", "sequential")
    )


@pytest.mark.parametrize("engine", [pytest.param("mpmd", marks=pytest.mark.slow), "spmd"])
def test_no_batches_are_refused(engine):
    trainer = build("bp", "dropout", 2, engine=engine)
    nets.assert_clear(ValueError, ("empty",), lambda: trainer.steps(trainer.init(), []))


def test_bad_batches_are_refused_before_anything_runs():
    trainer = build("bp", "dropout", 2)
    (batch, *_) = setting("dropout")[1]
    state = trainer.init()
    bad = {**batch, "label": batch["label"] + nets.CLASSES}
    nets.assert_clear(ValueError, ("label",), lambda: trainer.steps(state, [batch, bad]))
    with pytest.raises(ValueError, match="mpmd"):
        trainer.measure(state, batch)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.stages))


# --- From the command line -----------------------------------------------------------------------

TWO = {"mesh__stages": 2, "model__depth": 3, "engine": "spmd", "optimizer__name": "sgd"}


@pytest.mark.slow
def test_a_run_of_one_engine_is_continued_by_the_other(tmp_path):
    wanted = runs.finished(**{**TWO, "steps": 9, "engine": "mpmd", "mesh__stages": 1})
    for engine, steps in (("mpmd", 4), ("spmd", 9)):
        values = {**TWO, "engine": engine, "steps": steps}
        run = runs.server().run(*runs.arguments(tmp_path, **values), devices=2)
        assert run.returncode == 0, run.stderr
    (step, found), (last, expected) = runs.final_arrays(tmp_path), runs.final_arrays(wanted)
    assert step == last == 9
    assert nets.largest_error(found, expected) < 1e-4
    assert json.loads((tmp_path / "config.json").read_text())["engine"] == "spmd"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"engine": "fast"}, ("config.engine", "fast", "mpmd, spmd, auto")),
        ({"profile": 3}, ("config.profile", "spmd")),
        ({"model__depth": 2}, ("engine 'spmd'", "block 1")),
    ],
)
def test_refused_configurations(values, words):
    config = runs.tiny(**{**TWO, **values})
    nets.assert_clear(ConfigError, words, lambda: training.build(config))
