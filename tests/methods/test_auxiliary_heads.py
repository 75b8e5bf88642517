"""Heads of dgl (see also test_auxiliary_net.py), predsim and infopro, and `head_pool`."""

import dataclasses
import functools
import itertools

import chex
import golden_vectors as gv
import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from flax import nnx
from heads import CLASSES, IMAGES, LABELS, MAPS, VECTORS, run, site

from jdecouple import models
from jdecouple.methods import objectives
from jdecouple.methods.objectives import (
    AuxiliaryNet,
    BlockInfo,
    InformationPropagation,
    InformationRegularization,
    PredictionSimilarity,
    SupervisedContrastive,
    cross_entropy,
)
from jdecouple.models import layers
from jdecouple.models.resampling import adaptive_average_pool

OBJECTIVES = {
    "dgl": AuxiliaryNet(),
    "dgl-cnn": AuxiliaryNet("cnn"),
    "dgl-linear": AuxiliaryNet("linear"),
    "predsim": PredictionSimilarity(),
    "predsim-features": PredictionSimilarity(statistic="features"),
    "infopro": InformationPropagation((1, 0.5), (0.5, 1), hidden=7, features=6),
    "infopro-ce": InformationPropagation((1, 0.5), (0.5, 1), "cross_entropy", hidden=7),
    "deinforeg-pool": InformationRegularization("6-4", head_pool=2),
    "scpl-pool": SupervisedContrastive(hidden=6, features=4, head_pool=2),
    "dgl-pool": AuxiliaryNet("linear", head_pool=2),
}
KINDS = ("dgl", "predsim", "infopro", "deinforeg-pool")  # one of each, and one that pools
FEW = pytest.mark.parametrize("name", nets.marked(OBJECTIVES, KINDS))
PLACES = [  # of a head, and what it reads: maps or vectors
    pytest.param(name, index, kind, marks=[] if fast else [pytest.mark.slow])
    for name in OBJECTIVES
    for index, kind, fast in (
        (0, "maps", name == "infopro"),  # whose first block reconstructs the image
        (1, "maps", name in KINDS),
        (3, "maps", False),
        (0, "vectors", False),
        (1, "vectors", name in ("dgl", "infopro")),
        (3, "vectors", False),
    )
]


@pytest.mark.parametrize(("name", "index", "kind"), PLACES)
def test_heads_keep_the_contract(name, index, kind):
    objective, features = OBJECTIVES[name], {"maps": MAPS, "vectors": VECTORS}[kind]
    assert isinstance(objective, objectives.Objective)
    size = int(np.prod(features.shape[1:]))
    classifier = layers.perceptron(size, (CLASSES,), rngs=nnx.Rngs(7))
    where = site(features, index, classifier=classifier)
    head = objective.head(where, nnx.Rngs(0))
    assert isinstance(head, objectives.Head)
    output, in_features, in_params = run(head, features)
    chex.assert_shape([output.loss, *output.metrics.values()], ())
    chex.assert_tree_all_finite((in_features, in_params))
    evaluated = nnx.jit(type(head).logits)(head, features)
    if output.logits is None:
        assert evaluated is None
    else:
        chex.assert_shape([output.logits, evaluated], (8, CLASSES))
    holds = getattr(head, "classifier", None) is classifier
    assert holds == (objective.trains_classifier and index == 3)
    again = objective.head(where, nnx.Rngs(0))
    assert nnx.graphdef(head) == nnx.graphdef(again)
    hash(nnx.graphdef(head))


@pytest.mark.slow
@FEW
def test_heads_lose_in_float32(name):
    objective = OBJECTIVES[name]
    features = MAPS.astype(jnp.bfloat16)
    output, in_features, _ = run(objective.head(site(features), nnx.Rngs(0)), features)
    assert output.loss.dtype == jnp.float32
    assert output.logits is None or output.logits.dtype == jnp.bfloat16
    assert in_features.dtype == jnp.bfloat16


EDGES = {
    "constant examples": jnp.ones((8, 6, 6, 3)),
    "zeros": jnp.zeros((8, 6, 6, 3)),
    "one flat map": MAPS.at[..., 1].set(2.0),
    "one pixel": MAPS[:, :1, :1],
    "one row": MAPS[:, :1],
    "one example": MAPS[:1],
    "one example of one pixel": MAPS[:1, :1, :1],
    "constant vectors": jnp.ones((8, 7)),
    "one vector": VECTORS[:1],
}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        # Shapes of their own are compiled for each: one kind of head stands for the others.
        pytest.param(name, case, marks=[] if fast else [pytest.mark.slow])
        for name in OBJECTIVES
        for case, features in EDGES.items()
        for fast in [name == "predsim" or (features.shape == MAPS.shape and name in KINDS)]
    ],
)
def test_gradients_are_finite_at_the_edges(name, case):
    objective, features = OBJECTIVES[name], EDGES[case]
    batch = features.shape[0]
    if batch == 1 and isinstance(objective, InformationRegularization):
        pytest.skip("its variance needs two examples")
    head = objective.head(site(features), nnx.Rngs(0))
    image = jnp.ones_like(IMAGES[:batch]) if "constant" in case else IMAGES[:batch]
    output, in_features, in_params = run(head, features, LABELS[:batch], image)
    chex.assert_tree_all_finite((output.loss, output.metrics, in_features, in_params))


@FEW
def test_a_sequence_is_read_through_its_summary(name):
    objective = OBJECTIVES[name]
    features = {"h": MAPS[:, 0], "mask": jnp.ones(MAPS.shape[:2]), "summary": VECTORS}
    shapes = jax.eval_shape(lambda: features)
    where = dataclasses.replace(site(VECTORS), features=shapes)
    found, in_features, _ = run(objective.head(where, nnx.Rngs(0)), features)
    expected, in_vectors, _ = run(objective.head(site(VECTORS), nnx.Rngs(0)), VECTORS)
    assert float(found.loss) == float(expected.loss)
    np.testing.assert_array_equal(in_features["summary"], in_vectors)
    assert not in_features["h"].any()


@pytest.mark.parametrize("objective", [AuxiliaryNet(), InformationPropagation()])
def test_the_last_block_has_the_models_own_end(objective):
    head = objective.head(site(VECTORS[:, :5], index=3), nnx.Rngs(0))
    output, _, _ = run(head, VECTORS[:, :5])
    assert float(output.loss) == float(cross_entropy(VECTORS[:, :5], LABELS))
    with pytest.raises(ValueError, match=r"outputs .* logits \[batch, 5\] are needed"):
        objective.head(site(VECTORS, index=3), nnx.Rngs(0))


# predsim


SIMILARITY = gv.cases("predsim_similarity__b")


@pytest.mark.parametrize("case", nets.marked(SIMILARITY, SIMILARITY[:1]))
def test_predsim_golden_through_the_head(case, x64):
    golden = gv.load(case)
    x, labels = jnp.asarray(golden["in.x"]), jnp.asarray(golden["in.labels"])
    where = site(x, num_classes=int(golden["in.num_classes_onehot"]))
    head = PredictionSimilarity(prediction=0.0).head(where, nnx.Rngs(0))
    head.layer.layers[-1].kernel.set_value(jnp.eye(x.shape[1]))
    output, in_x, _ = run(head, x, labels)
    error = functools.partial(gv.relative_error)
    assert error(output.metrics["similarity"], golden["out64.loss_sim_unscaled"]) < 1e-10
    assert error(output.loss, golden["out64.loss_sim_x0.99"]) < 1e-10
    assert error(in_x, golden["grad64.x_of_x0.99"]) < 1e-10


@pytest.mark.parametrize("prediction", nets.marked([0.01, 2.0], [2.0]))
def test_predsim_of_maps_through_the_head(prediction, x64):
    golden = gv.load("predsim_similarity__scpl_4d")
    x = jnp.asarray(gv.images(golden["in.x"]))
    head = PredictionSimilarity(prediction).head(site(x), nnx.Rngs(0))
    channels = x.shape[-1]
    kernel = jnp.zeros((3, 3, channels, channels)).at[1, 1].set(jnp.eye(channels))
    head.layer.kernel.set_value(kernel)
    output, _, _ = run(head, x)
    onehot = np.eye(CLASSES)[LABELS] - 1 / CLASSES
    onehot /= np.linalg.norm(onehot, axis=1, keepdims=True) + 1e-8
    expected = np.mean((golden["out64.R"] - onehot @ onehot.T) ** 2)
    assert gv.relative_error(output.metrics["similarity"], expected) < 1e-10
    logits = np.tile(head.decoder.layers[-1].bias[...], (8, 1))  # its weight starts at zero
    np.testing.assert_array_equal(output.logits, logits)
    loss = 0.99 * expected + prediction * cross_entropy(jnp.asarray(logits), LABELS)
    assert gv.relative_error(output.loss, loss) < 1e-10


def test_predsim_of_all_features(x64):
    x = jnp.asarray(MAPS, jnp.float64)
    head = PredictionSimilarity(statistic="features").head(site(x), nnx.Rngs(0))
    output, _, _ = run(head, x)
    flat = np.asarray(head.layer(x)).reshape(8, -1)
    expected = np.mean((np.corrcoef(flat) - np.corrcoef(np.eye(CLASSES)[LABELS])) ** 2)
    assert float(output.metrics["similarity"]) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("shape", "most", "pooled"),
    [
        ((32, 32, 128), 4096, (4, 8)),
        ((32, 32, 128), 2048, (4, 4)),
        ((16, 16, 16), 4096, (16, 16)),
        ((5, 5, 3), 30, (3, 3)),
        ((5, 5, 3), 45, (3, 5)),
        ((4, 4, 8), 1, (1, 1)),
    ],
)
def test_the_decoder_reads_at_most_so_many_numbers(shape, most, pooled):
    features = jnp.zeros((2, *shape))
    head = PredictionSimilarity(dim_in_decoder=most).head(site(features), nnx.Rngs(0))
    assert head.pooled == pooled
    assert head.decoder.layers[-1].in_features == np.prod(pooled) * shape[-1]


def test_the_decoder_averages_and_the_classifier_reads_detached_features():
    classifier = layers.perceptron(108, (CLASSES,), rngs=nnx.Rngs(7))
    assert PredictionSimilarity().classifier == 1
    objective = PredictionSimilarity(1.0, 0.0, dim_in_decoder=12, classifier=0.25)
    first = objective.head(site(), nnx.Rngs(0))
    last = objective.head(site(index=3, classifier=classifier), nnx.Rngs(0))
    for head in (first, last):
        kernel = head.decoder.layers[-1].kernel
        kernel.set_value(jax.random.normal(jax.random.key(5), kernel.shape))
    pooled = adaptive_average_pool(MAPS, 2, 2).reshape(8, 12)
    found = run(first)
    np.testing.assert_allclose(
        found[0].logits, first.decoder.layers[-1](pooled), rtol=1e-5, atol=1e-6
    )
    (output, in_features, in_params) = run(last)
    np.testing.assert_allclose(in_features, found[1], rtol=1e-5, atol=1e-7)
    expected = cross_entropy(classifier(MAPS), LABELS)
    assert float(output.metrics["classifier"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(output.loss) == pytest.approx(float(found[0].loss + expected / 4), rel=1e-5)
    np.testing.assert_allclose(output.logits, classifier(MAPS), rtol=1e-5, atol=1e-6)
    assert in_params["classifier"]["layers"][1]["kernel"][...].any()


# head_pool

POOLING = [
    functools.partial(InformationRegularization, "6-4"),
    functools.partial(InformationRegularization, "6-4", mode="unmerge"),
    functools.partial(SupervisedContrastive, hidden=6, features=4),
    functools.partial(AuxiliaryNet, "linear"),
]
FAST_POOLING = [(POOLING[3], 0)]


@pytest.mark.parametrize(
    ("objective", "index"),
    [
        pytest.param(*case, marks=[] if case in FAST_POOLING else [pytest.mark.slow])
        for case in itertools.product(POOLING, (0, 3))
    ],
)
def test_head_pool(objective, index):
    """0 is off, as many bins as pixels change nothing, fewer are a head on the means."""
    classifier = layers.perceptron(108, (CLASSES,), rngs=nnx.Rngs(7))

    def head(features=MAPS, **arguments):
        where = site(features, index, classifier=classifier)
        return objective(**arguments).head(where, nnx.Rngs(0))

    def bits(result):
        output, *gradients = result
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((output, gradients))]

    assert objective().head_pool == 0
    off = bits(run(head()))
    assert bits(run(head(head_pool=0))) == off
    assert bits(run(head(head_pool=6))) == bits(run(head(head_pool=99))) == off
    if index == 0:
        assert bits(run(head(VECTORS, head_pool=2), VECTORS)) == bits(run(head(VECTORS), VECTORS))
        pooled = adaptive_average_pool(MAPS, 4, 4)
        found, expected = run(head(head_pool=4))[0], run(head(pooled), pooled)[0]
        np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
        sizes = [
            sum(leaf.size for leaf in jax.tree.leaves(nnx.state(each, nnx.Param)))
            for each in (head(head_pool=2), head(pooled), head())
        ]
        assert sizes[0] < sizes[1] < sizes[2]
        logits = nnx.jit(lambda net, x: net.logits(x))
        if found.logits is not None:
            np.testing.assert_allclose(
                logits(head(head_pool=4), MAPS), logits(head(pooled), pooled), rtol=1e-4, atol=1e-5
            )


def test_the_papers_projector_of_vgg8_has_134_million_weights_and_a_pooled_one_fewer():
    vgg = nnx.eval_shape(lambda: models.vgg8(10, rngs=nnx.Rngs(0)).blocks[0])
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    features = nnx.eval_shape(lambda block, x: block(x), vgg, x)

    def first_layer(**arguments):
        where = BlockInfo(0, 4, features, 10)
        objective = InformationRegularization(**arguments)
        head = nnx.eval_shape(lambda: objective.head(where, nnx.Rngs(0)))
        return head.projector.layers[1].kernel.shape

    assert first_layer() == (65536, 2048)  # 134 217 728
    assert first_layer(head_pool=4) == (4096, 2048)


# errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AuxiliaryNet("conv"), "aux is 'conv': allowed are mlp_sr, mlp, cnn, linear"),
        (lambda: AuxiliaryNet(hidden=-1), "hidden is -1: a whole number of at least 0"),
        (
            lambda: AuxiliaryNet(hidden=False),
            "hidden is False: a whole number",
        ),
        (lambda: AuxiliaryNet(head_pool=-2), "head_pool is -2: a whole number"),
        (lambda: InformationRegularization(head_pool=1.5), "head_pool is 1.5: a whole number"),
        (lambda: SupervisedContrastive(head_pool=True), "head_pool is True: a whole number"),
        (
            lambda: PredictionSimilarity(prediction=-1),
            "prediction is -1: a finite number of at least 0",
        ),
        (lambda: PredictionSimilarity(0.0, 0.0), "both 0: a weight above 0"),
        (lambda: PredictionSimilarity(similarity="1"), "similarity is '1': a finite number"),
        (
            lambda: PredictionSimilarity(statistic="std"),
            "statistic is 'std': allowed are deviation, features",
        ),
        (lambda: PredictionSimilarity(classifier=0), "classifier is 0: a finite number above 0"),
        (
            lambda: PredictionSimilarity(dim_in_decoder=0),
            "dim_in_decoder is 0: a whole number of at least 1",
        ),
    ],
)
def test_bad_arguments_get_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
