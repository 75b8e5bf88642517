"""Arguments that the Trainer refuses, each with one line: what was given, and what is allowed."""

import math

import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest
from flax import nnx

import jdecouple as jd
from jdecouple.methods.routes import Delayed

METHODS = pytest.mark.parametrize("name", jd.methods.names())
DATA = nets.batches()


def test_scpl_without_a_classifier_says_so():
    nets.assert_clear(
        ValueError,
        ("scpl", "needs a classifier", "Model(blocks, classifier)"),
        lambda: nets.build("scpl", model=nets.logits_model()),
    )


def test_deinforeg_without_a_classifier_asks_for_the_classes():
    nets.assert_clear(
        ValueError,
        ("num_classes is needed",),
        lambda: nets.build("deinforeg", model=nets.logits_model()),
    )


def test_bp_without_a_classifier_needs_logits():
    nets.assert_clear(
        ValueError, ("logits", "(16, 2, 3)"), lambda: nets.build("bp", model=jd.Model([Wide()]))
    )


class Wide(nnx.Module):
    def __call__(self, x):
        return jnp.zeros((x.shape[0], 2, 3))


@METHODS
def test_a_block_that_fails_on_its_input_is_named(name):
    rngs = nnx.Rngs(0)
    model = jd.Model(
        [nnx.Linear(nets.FEATURES, 8, rngs=rngs), nnx.Linear(9, 8, rngs=rngs)],
        nnx.Linear(8, nets.CLASSES, rngs=rngs),
    )
    nets.assert_clear(
        ValueError, ("block 1", "Linear", "float32[16, 8]"), lambda: nets.build(name, model=model)
    )


NEEDS_MORE = ("optimizer", "gradients and weights alone", "'value'")
BAD_ARGUMENTS = {
    "model of another type": (TypeError, {"model": [1]}, ("model", "list", "Model")),
    "optimizer by name": (TypeError, {"optimizer": "adam"}, ("optimizer", "str", "optax")),
    "optimizer that needs the loss": (ValueError, {"optimizer": optax.lbfgs()}, NEEDS_MORE),
    "optimizer that searches a line": (ValueError, {"optimizer": optax.polyak_sgd()}, NEEDS_MORE),
    "optimizer in a chain that needs the loss": (
        ValueError,
        {"optimizer": optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau())},
        NEEDS_MORE,
    ),
    "MultiSteps of one that needs the loss": (
        ValueError,
        {"optimizer": optax.MultiSteps(optax.lbfgs(), 2)},
        NEEDS_MORE,
    ),
    "optimizer that needs the gradient's function": (
        ValueError,
        {"optimizer": optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True)},
        ("gradients and weights alone", "grad_fn"),
    ),
    "optimizer whose updates have other shapes": (
        ValueError,
        {"optimizer": optax.stateless(lambda updates, _: jax.tree.map(jnp.sum, updates))},
        ("optimizer", "shapes [()]", "shapes [(2, 3)]"),
    ),
    "mesh of another type": (TypeError, {"mesh": 4}, ("mesh", "int", "make_mesh")),
    "no stages": (ValueError, {"num_stages": 0}, ("num_stages is 0", "at least 1")),
    "stages as text": (ValueError, {"num_stages": "2"}, ("num_stages", "'2'")),
    "half a stage": (ValueError, {"num_stages": 1.5}, ("num_stages", "1.5")),
    "more stages than blocks": (ValueError, {"num_stages": 3}, ("num_stages is 3", "2 blocks")),
    "stages and boundaries": (
        ValueError,
        {"num_stages": 1, "boundaries": (1,)},
        ("boundaries (1,)", "1 stages"),
    ),
    "boundaries beyond": (ValueError, {"boundaries": (2,)}, ("boundaries (2,)", "between 1 and 1")),
    "boundaries as fractions": (ValueError, {"boundaries": (0.5,)}, ("boundaries (0.5,)",)),
    "boundaries as a number": (ValueError, {"boundaries": 1}, ("boundaries", "1")),
    "no microbatches": (ValueError, {"microbatches": 0}, ("microbatches is 0", "at least 1")),
    "microbatches as text": (ValueError, {"microbatches": "2"}, ("microbatches is '2'",)),
    "microbatches that do not divide": (
        ValueError,
        {"microbatches": 3},
        ("batch of 16", "3 microbatch", "1 replica"),
    ),
    "unknown schedule": (
        ValueError,
        {"schedule": "zigzag"},
        ("'zigzag'", "fit", "allowed are auto"),
    ),
    "seed as text": (ValueError, {"seed": "zero"}, ("seed", "'zero'")),
    "seed as a fraction": (ValueError, {"seed": 0.5}, ("seed", "0.5")),
    "seed of 33 bits": (ValueError, {"seed": 2**32}, ("seed is 4294967296", "0 to 4294967295")),
    "seed of 65 bits": (ValueError, {"seed": 2**64}, ("seed is", "0 to 4294967295")),
    "seed below 0": (ValueError, {"seed": -1}, ("seed is -1", "0 to 4294967295")),
    "seed as a flag": (ValueError, {"seed": True}, ("seed is True", "0 to 4294967295")),
    "stages as a flag": (ValueError, {"num_stages": True}, ("num_stages is True",)),
    "classes as a flag": (ValueError, {"num_classes": True}, ("num_classes is True",)),
    "microbatches as a flag": (ValueError, {"microbatches": True}, ("microbatches is True",)),
    "in flight as a flag": (ValueError, {"max_in_flight": True}, ("max_in_flight is True",)),
    "boundaries as flags": (ValueError, {"boundaries": (True,)}, ("boundaries (True,)",)),
    "remat as a number": (ValueError, {"remat": 1}, ("remat is 1", "auto, none")),
    "remat as text": (ValueError, {"remat": "x"}, ("remat is 'x'", "auto, none")),
    "fuse as text": (ValueError, {"fuse": "no"}, ("fuse is 'no'", "True, False or None")),
    "none in flight": (ValueError, {"max_in_flight": 0}, ("max_in_flight is 0", "at least 1")),
    "unknown dtype": (ValueError, {"dtype": "float17"}, ("dtype", "'float17'")),
    "integers as dtype": (ValueError, {"dtype": jnp.int32}, ("dtype", "int32", "float")),
    "no classes": (ValueError, {"num_classes": 0}, ("num_classes is 0", "at least 1")),
    "classes as text": (ValueError, {"num_classes": "5"}, ("num_classes is '5'",)),
    "fewer classes than labels": (ValueError, {"num_classes": 3}, ("0 to 2",)),
    "transform that is no function": (TypeError, {"transform": 5}, ("transform", "int")),
    "fuse over devices": (ValueError, {"num_stages": 2, "fuse": True}, ("fuse", "same devices")),
    "example of another type": (TypeError, {"example": [1]}, ("batch", "'x'", "'label'", "list")),
    "example without labels": (TypeError, {"example": {"x": DATA[0]["x"]}}, ("'label'", "['x']")),
    "example with a label too high": (
        ValueError,
        {"example": {**DATA[0], "label": np.full(16, 7)}},
        ("label 7", "0 to 4"),
    ),
    "example on devices with a label too high": (
        ValueError,
        {"example": {**DATA[0], "label": jnp.full(16, 7)}},
        ("label 7", "0 to 4"),
    ),
}


@pytest.mark.parametrize("name", ["bp", "deinforeg"])
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_a_bad_argument_gets_one_clear_line(case, name):
    kind, options, words = BAD_ARGUMENTS[case]
    nets.assert_clear(kind, words, lambda: nets.build(name, **options))


def test_a_method_by_name_gets_one_clear_line():
    nets.assert_clear(
        TypeError,
        ("method", "str", "Method"),
        lambda: jd.Trainer(nets.mlp(), "bp", jd.optim.sgd(0.1), example=DATA[0]),
    )


@pytest.mark.parametrize("name", ["bp", "scpl"])
def test_another_number_of_classes_than_logits_is_refused(name):
    """Labels beyond the logits would train on garbage without a word."""
    nets.assert_clear(
        ValueError, ("num_classes is 9", "5"), lambda: nets.build(name, num_classes=9)
    )


@METHODS
def test_a_data_axis_that_does_not_divide_the_batch(name):
    nets.assert_clear(
        ValueError,
        ("batch of 16", "3 replica"),
        lambda: nets.build(name, mesh=jd.make_mesh(1, 3)),
    )


@METHODS
def test_a_schedule_of_another_route_is_refused(name):
    other = "sequential" if nets.method(name).route.local else "local"
    nets.assert_clear(
        ValueError, (repr(other), name, "fit"), lambda: nets.build(name, schedule=other)
    )


@pytest.mark.parametrize(
    ("name", "other", "own"),
    [
        ("bp", "delayed", "sequential"),
        ("scpl", "delayed_locked", "local"),
        ("fdg", "delayed_locked", "delayed"),
        ("adl", "sequential", "delayed"),
        ("fr", "delayed", "delayed_locked"),
        ("ddg", "sequential", "delayed_locked"),
    ],
)
def test_a_schedule_of_another_route_says_which_fit(name, other, own):
    message = f"schedule '{other}' does not fit method {name}: allowed are auto, {own}"
    nets.assert_clear(ValueError, (message,), lambda: nets.build(name, schedule=other))


@pytest.mark.parametrize("name", nets.DELAYED)
def test_microbatches_of_a_delayed_method_are_refused(name):
    nets.assert_clear(
        ValueError,
        ("num_microbatches is 2", "schedule delayed", "takes 1"),
        lambda: nets.build(name, num_stages=2, microbatches=2),
    )


BAD_ROUTES = {
    "beta as text": ({"beta": "x"}, ("beta is 'x'", "above 0 and at most 1")),
    "beta as a flag": ({"beta": True}, ("beta is True", "above 0 and at most 1")),
    "no beta": ({"beta": None}, ("beta is None", "above 0 and at most 1")),
    "beta of 0": ({"beta": 0}, ("beta is 0", "above 0 and at most 1")),
    "beta above 1": ({"beta": 1.5}, ("beta is 1.5", "above 0 and at most 1")),
    "beta that is no number": ({"beta": math.nan}, ("beta is nan", "above 0 and at most 1")),
    "half a pass": ({"accumulate": 1.5}, ("accumulate is 1.5", "whole number of at least 1")),
    "no pass": ({"accumulate": 0}, ("accumulate is 0", "whole number of at least 1")),
    "passes as text": ({"accumulate": "2"}, ("accumulate is '2'", "whole number of at least 1")),
    "passes as a flag": ({"accumulate": True}, ("accumulate is True", "whole number")),
    "factor of 0": ({"first_stage_lr_scale": 0.0}, ("first_stage_lr_scale is 0.0", "finite")),
    "factor without end": ({"first_stage_lr_scale": math.inf}, ("lr_scale is inf", "finite")),
    "factor as text": ({"first_stage_lr_scale": "x"}, ("first_stage_lr_scale is 'x'", "finite")),
    "unknown forward": (
        {"forward_pass": "x"},
        ("forward_pass 'x' with backward_pass 'pipelined'", "locked with pipelined"),
    ),
    "unknown backward": ({"backward_pass": 3}, ("backward_pass 3", "pipelined with pipelined")),
    "only the backward locked": (
        {"backward_pass": "locked"},
        ("forward_pass 'pipelined' with backward_pass 'locked'", "locked with locked"),
    ),
    "replay of current weights": (
        {"replay": True, "current_weights": True},
        ("current_weights has no meaning with replay",),
    ),
}


@pytest.mark.parametrize("case", BAD_ROUTES)
def test_a_bad_argument_of_the_delayed_route(case):
    arguments, words = BAD_ROUTES[case]
    nets.assert_clear(
        ValueError, words, lambda: Delayed(**{"forward_pass": "pipelined", **arguments})
    )


@pytest.mark.parametrize(
    ("name", "argument", "allowed"),
    [
        ("ddg", "beta", "current_weights, init"),
        ("fr", "beta", "first_stage_lr_scale, init"),
        ("fdg", "accumulate", "beta, current_weights, init"),
        ("fr", "current_weights", "first_stage_lr_scale, init"),
        ("adl", "forward_pass", "accumulate, beta, accumulate_mean, current_weights, init"),
        ("fdg", "forward_pass", "beta, current_weights, init"),
    ],
)
def test_an_argument_of_another_method(name, argument, allowed):
    message = f"method {name} takes no argument {argument!r}: allowed are {allowed}"
    nets.assert_clear(TypeError, (message,), lambda: jd.methods.get(name, **{argument: 1}))


def test_an_optimizer_that_fails_without_weights_is_no_fault():
    def by_kind(params):
        assert params
        return {key: "bias" if key.endswith("bias") else "rest" for key in params}

    optimizer = optax.multi_transform({"bias": optax.sgd(0.1), "rest": optax.adam(0.1)}, by_kind)
    trainer = nets.build("bp", optimizer=optimizer)
    state, metrics = trainer.step(trainer.init(), DATA[0])
    assert jnp.isfinite(metrics["loss"])
    assert state.step == 1
