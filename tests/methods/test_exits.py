"""Cross-entropy at every block, joined or cut apart."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
import sequence_nets
from flax import nnx

import jdecouple as jd
from jdecouple import methods
from jdecouple.methods.objectives import BlockInfo, Exits
from jdecouple.train import config

pytestmark = pytest.mark.usefixtures("module_x64")

STEPS = 6
WEIGHTS = (0.1, 0.0, 0.5, 2.0)


@functools.cache
def trained(name: str = "early_exit", stages: int = 1, weights: Any = None, **options: Any):
    """Trainer, weights after six steps, metrics of each."""
    batches = nets.batches(dtype=np.float64)
    arguments = {} if weights is None else {"weights": weights}
    trainer = jd.Trainer(
        nets.mlp(param_dtype=jnp.float64),
        jd.methods.get(name, **arguments),
        jd.optim.sgd(0.05, momentum=0.9),
        mesh=jd.make_mesh(stages),
        example=batches[0],
        **options,
    )
    state, metrics = nets.trained(trainer, batches, STEPS)
    return trainer, nets.weights(trainer, state), metrics


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "schedule"),
    [
        (4, "sequential"),
        (4, "gpipe"),
        (4, "1f1b"),
        (2, "interleaved_1f1b"),
    ],
)
def test_every_schedule_trains_alike(rows, schedule):
    batches = nets.batches(dtype=np.float64)
    trainer = jd.Trainer(
        nets.mlp(param_dtype=jnp.float64),
        jd.methods.get("early_exit", weights=WEIGHTS),
        jd.optim.sgd(0.05, momentum=0.9),
        mesh=jd.make_mesh(rows),
        num_stages=4,
        microbatches=4,
        schedule=schedule,
        example=batches[0],
    )
    state, metrics = nets.trained(trainer, batches, STEPS)
    _, arrays, wanted = trained(weights=WEIGHTS)
    assert nets.largest_error(nets.weights(trainer, state), arrays) < 1e-12
    for found, each in zip(metrics, wanted, strict=True):
        assert found == pytest.approx(each, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", nets.marked(["early_exit", "greedy_exit"]))
def test_one_program_for_all_stages(name):
    trainer, arrays, _ = trained(name, 4, engine="spmd")
    assert trainer.engine == "spmd"
    assert nets.largest_error(arrays, trained(name)[1]) < 1e-12


def test_the_last_exit_alone_is_backpropagation():
    _, arrays, metrics = trained(weights=(0.0, 0.0, 0.0, 1.0))
    _, wanted, backpropagation = trained("bp")
    assert nets.largest_error({key: arrays[key] for key in wanted}, wanted) < 1e-12
    for found, each in zip(metrics, backpropagation, strict=True):
        assert found["loss"] == each["loss"]
        assert found["block_0/loss"] == 0


def test_loss_is_the_weighted_sum():
    _, _, metrics = trained(weights=WEIGHTS)
    for step in metrics:
        terms = [step[f"block_{i}/cross_entropy"] for i in range(4)]
        assert min(terms) > 0
        assert step["loss"] == pytest.approx(np.dot(WEIGHTS, terms), rel=1e-6)


@pytest.mark.slow
def test_a_number_is_the_weight_of_all():
    for weights in (0.5, [0.5], (0.5,), (0.5,) * 4):
        assert methods.get("early_exit", weights=weights).objective.weights[-1] == 0.5
    (once, twice) = (trained(weights=weights)[2][0]["loss"] for weights in (0.5, 1))
    assert twice == pytest.approx(2 * once, rel=1e-6)


def test_cut_boundaries_change_what_lower_blocks_learn():
    """The first step starts from the same heads, and has the same losses."""
    _, joined, one = trained("early_exit")
    _, cut, other = trained("greedy_exit")
    assert one[0] == other[0]
    key = "block_0/params/block/layers/1/kernel"
    assert np.abs(joined[key] - cut[key]).max() > 1e-4
    assert set(joined) == set(cut)


# --- The exits ------------------------------------------------------------------------------


def head(
    objective: Exits, features: tuple, index: int = 0, classifier: Any = None, blocks: int = 2
) -> Any:
    shape = jax.ShapeDtypeStruct(features, jnp.float64)
    return objective.head(
        BlockInfo(index, blocks, shape, 5, classifier, "torch", jnp.float64), nnx.Rngs(index)
    )


@pytest.mark.parametrize(
    ("head_pool", "features", "size"),
    [(1, (2, 4, 4, 3), 3), (0, (2, 4, 4, 3), 48), (1, (2, 7), 7), (1, (2, 7, 3), 21)],
)
def test_an_exit_reads_pooled_or_flattened_features(head_pool, features, size):
    found = head(Exits(head_pool=head_pool), features)
    x = jnp.asarray(np.random.default_rng(0).normal(size=features))
    kernel = found.classifier.layers[-1].kernel[...]
    assert kernel.shape == (size, 5)
    read = x.mean((1, 2)) if size == 3 else x.reshape(2, -1)
    bias = found.classifier.layers[-1].bias[...]
    np.testing.assert_allclose(found.logits(x), read @ kernel + bias, rtol=1e-12)


def branch_by_definition(params: dict, x: np.ndarray) -> np.ndarray:
    """Convolutions with ReLU, and the largest of 2 x 2 pixels, written out for maps."""
    for number in sorted(params):
        kernel, (_, height, width, _) = params[number]["kernel"], x.shape
        around = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        places = itertools.product(range(3), repeat=2)
        parts = [around[:, i : i + height, j : j + width] @ kernel[i, j] for i, j in places]
        x = np.maximum(0, sum(parts) + params[number]["bias"])
    even = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    batch, height, width, channels = even.shape
    return even.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


@pytest.mark.parametrize(("index", "convolutions"), [(0, 2), (1, 1)])
@pytest.mark.parametrize(("head_pool", "size"), [(0, 2 * 3 * 32), (1, 32)])
def test_a_branch_by_its_definition(index, convolutions, head_pool, size):
    objective, shape = Exits(head_pool=head_pool, branch="conv"), (2, 5, 6, 3)
    found = head(objective, shape, index, blocks=3)
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(found, nnx.Param)))
    stack = params["branch"]["stack"]["layers"]
    wanted = [(3, 3, 3, 32), (3, 3, 32, 32)][:convolutions]
    assert [layer["kernel"].shape for _, layer in sorted(stack.items())] == wanted
    dense = params["classifier"]["layers"][1]
    assert dense["kernel"].shape == (size, 5)
    x = np.random.default_rng(0).normal(size=shape)
    read = branch_by_definition(stack, x)
    read = read.mean((1, 2)) if head_pool else read.reshape(2, -1)
    logits = nnx.jit(lambda net, x: net.logits(x))(found, x)
    np.testing.assert_allclose(logits, read @ dense["kernel"] + dense["bias"], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("features", "size"),
    [((2, 1, 1, 3), 32), ((2, 1, 4, 3), 128), ((2, 2, 2, 3), 32), ((2, 7), 7), ((2, 7, 3), 21)],
)
def test_a_branch_of_small_maps_and_of_none(features, size):
    found = nnx.eval_shape(lambda: head(Exits(head_pool=0, branch="conv"), features))
    assert found.classifier.layers[1].kernel.shape == (size, 5)
    assert len(jax.tree.leaves(nnx.state(found.branch))) == (4 if len(features) == 4 else 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["early_exit", "greedy_exit"])
def test_branches_train_alike_on_one_stage_and_on_two(name):
    data = [{**each, "x": each["x"] / 255.0} for each in nets.images(2)]
    options = {"image_size": 8, "channels": 1, "param_dtype": jnp.float64}
    ends = []
    for stages in (1, 2):
        model = jd.models.vgg(nets.CLASSES, blocks="3,M|3|3", rngs=nnx.Rngs(0), **options)
        method, mesh = jd.methods.get(name, branch="conv"), jd.make_mesh(stages)
        trainer = jd.Trainer(model, method, jd.optim.sgd(0.1), mesh=mesh, example=data[0])
        before = nets.weights(trainer, trainer.init())
        after = nets.weights(trainer, nets.trained(trainer, data, 2)[0])
        assert all((before[key] != after[key]).any() for key in before if "/branch/" in key)
        ends.append(after)
    assert nets.largest_error(*ends) < 1e-12


def test_the_last_exit_is_the_classifier():
    classifier = nnx.Linear(7, 5, rngs=nnx.Rngs(0))
    assert head(Exits(), (2, 7), 1, classifier).classifier is classifier
    x = jnp.ones((2, 5))
    assert head(Exits(), (2, 5), 1).logits(x) is x
    nets.assert_clear(ValueError, ("logits", "[batch, 5]"), lambda: head(Exits(), (2, 7), 1))


@pytest.mark.parametrize("name", ["early_exit", "greedy_exit"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weights": -1.0}, ("weights", "at least 0", "-1.0")),
        ({"weights": (1.0, float("nan"))}, ("weights", "finite")),
        ({"weights": "1"}, ("weights", "'1'")),
        ({"weights": ()}, ("weights", "above 0")),
        ({"weights": (0, 0.0)}, ("weights", "above 0")),
        ({"head_pool": -1}, ("head_pool", "at least 0", "-1")),
        ({"branch": "dense"}, ("branch is 'dense'", "linear, conv")),
    ],
)
def test_bad_arguments_are_refused(name, arguments, words):
    nets.assert_clear(ValueError, words, lambda: methods.get(name, **arguments))


def test_weights_are_as_many_as_blocks():
    words = ("weights has 3", "4 blocks")
    nets.assert_clear(ValueError, words, lambda: trained(weights=(1.0, 1.0, 1.0)))


def test_weights_of_a_configuration():
    chosen = config.default()
    chosen.method.name = "early_exit"
    chosen.method.weights = (0.3, 1)
    complete = config.validate(chosen)
    given = config.chosen(complete, "method")
    assert methods.get("early_exit", **given).objective.weights == (0.3, 1)


@pytest.mark.slow  # pipeline/test_sequence_training.py has a fast one
@pytest.mark.parametrize("name", ["early_exit", "greedy_exit", "al"])
@pytest.mark.parametrize("kind", ["lstm", "vit"])
def test_sequences(name, kind):
    """Heads read the summary of a sequence; over two stages as over one."""
    found = []
    for stages in (1, 2):
        model = sequence_nets.model(kind, param_dtype=jnp.float64)
        data = sequence_nets.batches(kind)
        options = {"mesh": jd.make_mesh(stages), "example": data[0]}
        trainer = jd.Trainer(model, nets.method(name), jd.optim.sgd(0.05), **options)
        state, metrics = nets.trained(trainer, data, 3)
        found.append((nets.weights(trainer, state), trainer.evaluate(state, data)))
        assert all(np.isfinite(list(each.values())).all() for each in metrics)
    assert nets.largest_error(found[0][0], found[1][0]) < 1e-12
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
