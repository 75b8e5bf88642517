"""Heads: the contract that routes rely on, and the golden blocks."""

import dataclasses
import functools

import chex
import golden_vectors as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdecouple import methods, models
from jdecouple.methods import objectives
from jdecouple.methods.objectives import (
    BlockInfo,
    CrossEntropy,
    InformationRegularization,
    SupervisedContrastive,
)
from jdecouple.models import layers

BITS = pytest.mark.parametrize("bits", [64, pytest.param(32, marks=pytest.mark.slow)])


def site(features=(8, 6), index=0, num_blocks=2, classifier=None, dtype=jnp.float32):
    shape = jax.ShapeDtypeStruct(features, dtype)
    return BlockInfo(index, num_blocks, shape, 5, classifier, "torch", dtype)


class Net(nnx.Module):
    """A block and its head, under one state."""

    def __init__(self, block, head):
        self.block, self.head = block, head

    def loss(self, x, labels):
        output = self.head(self.block(x), {"label": labels})
        return output.loss, output


def gradients(net, x, labels):
    """Head output, net holding gradients in place of parameters, gradient of x, net afterwards."""
    graphdef, params, rest = nnx.split(net, nnx.Param, ...)

    @jax.jit
    def run(params, x):
        def loss(params, x):
            merged = nnx.merge(graphdef, params, rest, copy=True)
            value, output = merged.loss(x, labels)
            return value, (output, nnx.split(merged, nnx.Param, ...)[2])

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (in_params, in_x), (output, after) = run(params, x)
    return (
        output,
        nnx.merge(graphdef, in_params, rest),
        in_x,
        nnx.merge(graphdef, params, after),
    )


IMAGE = (4, 4, 4)  # the golden block's output, C H W
ATTRIBUTES = {"running_mean": "mean", "running_var": "var"}


def locate(net, key):
    """Variable of `net` that a key of the golden block names, and how to turn the array over.

    Layers have PyTorch's indices: layer.0.INDEX, loss.projector.INDEX, classifier.classifier.INDEX.
    """
    part, _, index, name = key.split(".")
    parts = {"layer": net.block, "loss": net.head.projector, "classifier": net.head.classifier}
    layer = parts[part].layers[int(index)]
    if name != "weight":
        return getattr(layer, ATTRIBUTES.get(name, name)), np.asarray
    if isinstance(layer, nnx.Conv):
        return layer.kernel, gv.conv_kernel
    if isinstance(layer, nnx.Linear):
        image = IMAGE if layer.in_features == np.prod(IMAGE) else None
        return layer.kernel, functools.partial(gv.dense_kernel, image=image)
    return layer.scale, np.asarray


def golden_block(golden, mode, dtype):
    vgg = models.vgg(5, blocks="4,M", image_size=8, param_dtype=dtype, rngs=nnx.Rngs(0))
    objective = InformationRegularization("20-18-12", mode)
    head = objective.head(site((8, 4, 4, 4), dtype=dtype), nnx.Rngs(1))
    net = Net(vgg.blocks[0], head)
    for key, weight in golden.group("w").items():
        variable, convert = locate(net, key)
        assert variable.shape == convert(weight).shape, key
        variable.set_value(jnp.asarray(convert(weight), dtype))
    return net


@BITS
@pytest.mark.parametrize("mode", ["merge", "unmerge"])
def test_deinforeg_block_golden(mode, bits):
    golden = gv.load(f"deinforeg_block__vision_{mode}")
    limit = {64: 1e-10, 32: 1e-5}[bits]
    with jax.enable_x64(bits == 64):
        net = golden_block(golden, mode, jnp.dtype(f"float{bits}"))
        x, labels = jnp.asarray(gv.images(golden["in.x"]), f"float{bits}"), golden["in.labels"]
        output, in_params, in_x, after = gradients(net, x, jnp.asarray(labels))

        terms = output.metrics
        local = terms["variance"] + terms["invariance"] + terms["covariance"]
        classifier = 0.001 * terms["cross_entropy"]
        assert gv.relative_error(local, golden["out64.local_loss"]) < limit
        assert gv.relative_error(classifier, golden["out64.classifier_loss_x0.001"]) < limit
        assert gv.relative_error(output.loss, local + classifier) < limit
        assert output.loss.dtype == f"float{bits}"

        weights = golden.group("w")
        assert gv.relative_error(in_x, gv.images(golden["grad64.x"])) < limit
        for key in weights:
            variable, convert = locate(in_params, key)
            expected = convert(golden[f"grad64.w.{key}"])
            scale = None
            if key.endswith("bias") and np.max(np.abs(expected)) < 1e-15:
                # Zero in exact arithmetic (BatchNorm takes a bias out again): what is left is
                # rounding, measured against the gradient of the same layer's weight.
                scale = np.max(np.abs(golden[f"grad64.w.{key.removesuffix('bias')}weight"]))
            assert gv.relative_error(variable[...], expected, scale) < limit, key

        for key, statistic in golden.group("after64.bn").items():
            variable, _ = locate(after, key)
            actual = np.asarray(variable[...], np.float64)
            if key.endswith("running_var"):  # ours is biased, PyTorch's is not
                count = 8 * 8 * 8 if key.startswith("layer") else 8
                actual = 0.9 + (actual - 0.9) * count / (count - 1)
                variable.set_value(jnp.asarray(statistic, variable.dtype))
            assert gv.relative_error(actual, statistic) < limit, key

        after.eval()
        features = after.block(x)
        expected = gv.images(golden["out64.eval_block_output"])
        assert gv.relative_error(features, expected) < limit
        logits = after.head.logits(features)
        assert gv.relative_error(logits, golden["out64.eval_classifier_out"]) < limit


@BITS
def test_contrastive_projector_golden(bits):
    golden = gv.load("contrastive__vision_projector")
    limit = {64: 1e-10, 32: 1e-5}[bits]
    with jax.enable_x64(bits == 64):
        dtype = jnp.dtype(f"float{bits}")
        objective = SupervisedContrastive("mlp", hidden=16, features=9)
        head = objective.head(site((8, 2, 2, 3), dtype=dtype), nnx.Rngs(0))
        places = {}
        for index, image in ((1, (3, 2, 2)), (3, None)):
            layer = head.projector.layers[index]
            places[f"{index}.weight"] = "kernel", functools.partial(gv.dense_kernel, image=image)
            places[f"{index}.bias"] = "bias", np.asarray
            for name in ("weight", "bias"):
                attribute, convert = places[f"{index}.{name}"]
                weight = convert(golden[f"w.linear.{index}.{name}"])
                getattr(layer, attribute).set_value(jnp.asarray(weight, dtype))
        x = jnp.asarray(gv.images(golden["in.x"]), dtype)
        net = Net(nnx.Sequential(), head)
        output, in_params, in_x, _ = gradients(net, x, jnp.asarray(golden["in.labels"]))
        assert output.logits is None
        assert gv.relative_error(output.loss, golden["out64.loss"]) < limit
        assert gv.relative_error(in_x, gv.images(golden["grad64.x"])) < limit
        for key, (attribute, convert) in places.items():
            layer = in_params.head.projector.layers[int(key[0])]
            actual, expected = getattr(layer, attribute)[...], golden[f"grad64.w.linear.{key}"]
            assert gv.relative_error(actual, convert(expected)) < limit, key


TEXTS = {"activation": "tanh", "batch_norm": False}  # DeInfoReg's heads for texts
CLASSIFIER = nnx.Linear(6, 5, rngs=nnx.Rngs(7))
LABELS = jnp.array([0, 1, 2, 3, 4, 0, 1, 2])
FEATURES = jax.random.normal(jax.random.key(3), (8, 6))

OBJECTIVES = [
    InformationRegularization("12-10"),
    InformationRegularization("12-10", mode="unmerge"),
    InformationRegularization("identity"),
    InformationRegularization("identity", mode="unmerge"),
    InformationRegularization("identity", mode="unmerge", hidden="7-9", **TEXTS),
    SupervisedContrastive(hidden=7, features=9),
    SupervisedContrastive("linear", features=9),
    SupervisedContrastive("identity"),
    CrossEntropy(),
]


@nnx.jit
def run_head(head, features=FEATURES):
    return head(features, {"label": LABELS}), head.logits(features)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("index", [0, 1])
def test_heads_keep_the_contract(objective, index):
    assert isinstance(objective, objectives.Objective)
    head = objective.head(site(index=index, classifier=CLASSIFIER), nnx.Rngs(0))
    if head is None:
        assert index == 0
        return
    assert isinstance(head, objectives.Head)
    output, evaluated = run_head(head)
    chex.assert_shape([output.loss, *output.metrics.values()], ())
    if output.logits is None:
        assert evaluated is None
    else:
        chex.assert_shape([output.logits, evaluated], (8, 5))
    holds = getattr(head, "classifier", None) is CLASSIFIER
    assert holds == (objective.trains_classifier and index == 1)
    again = objective.head(site(index=index, classifier=CLASSIFIER), nnx.Rngs(0))
    assert nnx.graphdef(head) == nnx.graphdef(again)
    hash(nnx.graphdef(head))


@pytest.mark.parametrize("mode", ["merge", "unmerge"])
def test_the_classifier_reaches_the_block_in_merge_mode_only(mode):
    off = {"variance": 0.0, "invariance": 0.0, "covariance": 0.0}
    head = InformationRegularization("6-4", mode, **off, alpha=1.0).head(site(), nnx.Rngs(0))
    _, in_params, in_x, _ = gradients(Net(nnx.Sequential(), head), FEATURES, LABELS)
    reaches = mode == "merge"
    assert bool(in_x.any()) == reaches
    assert bool(in_params.head.projector.layers[1].kernel[...].any()) == reaches
    assert in_params.head.classifier.layers[-1].kernel[...].any()


@pytest.mark.parametrize(
    ("mode", "hidden", "widths"),
    [
        ("merge", "projector", (6, 5)),
        ("unmerge", "projector", (6, 5)),
        ("unmerge", "7-9", (6, 7, 9, 5)),
        ("unmerge", (4,), (6, 4, 5)),
    ],
)
def test_deinforeg_heads_for_texts(mode, hidden, widths):
    """Dense layers with tanh between them; merged, tanh before the only one."""
    objective = InformationRegularization("identity", mode, hidden=hidden, **TEXTS)
    head = objective.head(site(), nnx.Rngs(0))
    dense = [each for each in head.classifier.layers if isinstance(each, nnx.Linear)]
    assert (*(each.in_features for each in dense), dense[-1].out_features) == widths
    assert not nnx.state(head, nnx.BatchStat)
    x = np.tanh(FEATURES) if mode == "merge" else FEATURES
    for layer in dense[:-1]:
        x = np.tanh(x @ layer.kernel[...] + layer.bias[...])
    wanted = x @ dense[-1].kernel[...] + dense[-1].bias[...]
    np.testing.assert_allclose(head.logits(FEATURES), wanted, rtol=1e-5, atol=1e-6)


def test_weights_of_the_terms():
    weights = {"variance": 2.0, "invariance": 3.0, "covariance": 5.0, "alpha": 7.0}
    head = InformationRegularization("6-4", **weights).head(site(), nnx.Rngs(0))
    output, _ = run_head(head)
    terms = output.metrics
    expected = 2 * terms["variance"] + 3 * terms["invariance"] + 5 * terms["covariance"]
    assert float(output.loss) == pytest.approx(float(expected + 7 * terms["cross_entropy"]))


def test_normalize_is_passed_on():
    losses = [
        run_head(
            InformationRegularization("identity", normalize=normalize).head(site(), nnx.Rngs(0))
        )[0].metrics["covariance"]
        for normalize in (True, False)
    ]
    assert losses[0] < losses[1] / 2


def test_the_contrastive_classifier_does_not_reach_the_block():
    objective = SupervisedContrastive("identity")
    results = [
        gradients(
            Net(
                nnx.Sequential(), objective.head(site(index=i, classifier=CLASSIFIER), nnx.Rngs(0))
            ),
            FEATURES,
            LABELS,
        )
        for i in (0, 1)
    ]
    (first, _, in_first, _), (last, in_params, in_last, _) = results
    np.testing.assert_allclose(in_first, in_last, rtol=1e-5, atol=1e-7)
    assert in_params.head.classifier.kernel[...].any()
    expected = objectives.cross_entropy(CLASSIFIER(FEATURES), LABELS)
    assert float(last.metrics["cross_entropy"]) == pytest.approx(float(expected))
    assert float(last.loss) == pytest.approx(float(first.loss + expected))


def test_cross_entropy_without_a_classifier_takes_features_as_logits():
    head = CrossEntropy().head(site((8, 5), index=1), nnx.Rngs(0))
    logits = FEATURES[:, :5]
    output = head(logits, {"label": LABELS})
    assert float(output.loss) == float(objectives.cross_entropy(logits, LABELS))
    np.testing.assert_array_equal(output.logits, logits)


def test_the_divisor_of_the_contrastive_loss_is_passed_on():
    arguments = {"projector": "identity", "count_self": False}
    output, _ = run_head(SupervisedContrastive(**arguments).head(site(), nnx.Rngs(0)))
    expected = objectives.supervised_contrastive(FEATURES, LABELS, count_self=False)
    assert float(output.loss) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.slow
def test_heads_compute_in_bfloat16_but_lose_in_float32():
    for objective in OBJECTIVES[:-1]:
        head = objective.head(site(dtype=jnp.bfloat16), nnx.Rngs(0))
        output, _ = run_head(head, FEATURES.astype(jnp.bfloat16))
        assert output.loss.dtype == jnp.float32
        assert output.logits is None or output.logits.dtype == jnp.bfloat16


def test_initial_weights_follow_the_site():
    def head(init):
        where = dataclasses.replace(site((8, 4, 4, 6)), init=init)
        return InformationRegularization("12-10").head(where, nnx.Rngs(0))

    assert not head("flax").projector.layers[1].bias[...].any()
    kernel = head("torch").projector.layers[1].kernel[...]
    assert np.sqrt(1 / 96) * 0.9 < np.abs(kernel).max() <= np.sqrt(1 / 96)


def test_heads_take_the_inits_of_the_models():
    method = methods.get("infopro", init="he_out")
    where = dataclasses.replace(site((8, 4, 4, 6)), init=method.init)
    images = dataclasses.replace(where, input=jax.ShapeDtypeStruct((8, 4, 4, 3), jnp.float32))
    convolution = method.objective.head(images, nnx.Rngs(0)).decoder.net.layers[0]
    kernel = np.asarray(convolution.kernel[...])
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * kernel.shape[-1])), rel=0.1)
    assert convolution.bias[...].all()  # PyTorch's
    assert {methods.get("infopro", init=init).init for init in layers.INITS} == {*layers.INITS}


@pytest.mark.parametrize(
    ("projector", "expected"),
    [
        ("2048-2048-2048", (2048, 2048, 2048)),
        ("64", (64,)),
        ((8, 4), (8, 4)),
        ([8, 4], (8, 4)),
        (16, (16,)),
        ("identity", ()),
        ((), ()),
    ],
)
def test_projector_widths(projector, expected):
    objective = InformationRegularization(projector)
    assert objective.widths == expected
    hash(objective)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: InformationRegularization("64-x"), "projector is '64-x': 'identity' or positive"),
        (
            lambda: InformationRegularization("64--8"),
            "projector is '64--8': 'identity' or positive",
        ),
        (lambda: InformationRegularization(""), "projector is '': 'identity' or positive"),
        (
            lambda: InformationRegularization((8, 0)),
            r"projector is \(8, 0\): 'identity' or positive",
        ),
        (lambda: InformationRegularization(None), "projector is None: 'identity' or positive"),
        (
            lambda: InformationRegularization(mode="join"),
            "mode is 'join': allowed are merge, unmerge",
        ),
        (lambda: InformationRegularization(alpha=-1), "alpha is -1: a finite number of at least 0"),
        (lambda: InformationRegularization(variance="1"), "variance is '1': a finite number"),
        (
            lambda: InformationRegularization(covariance=float("inf")),
            "covariance is inf: a finite number",
        ),
        (lambda: InformationRegularization(normalize=1), "normalize is 1: True or False is needed"),
        (lambda: InformationRegularization(batch_norm="no"), "batch_norm is 'no': True or False"),
        (lambda: InformationRegularization(hidden="0"), "hidden is '0': 'projector' or positive"),
        (
            lambda: InformationRegularization(activation="elu"),
            "activation is 'elu': allowed are gelu, relu, sigmoid, tanh",
        ),
        (
            lambda: SupervisedContrastive("deep"),
            "projector is 'deep': allowed are mlp, linear, identity",
        ),
        (
            lambda: SupervisedContrastive(count_self=1),
            "count_self is 1: True or False is needed",
        ),
        (lambda: SupervisedContrastive(hidden=0), "hidden is 0: a whole number of at least 1"),
        (lambda: SupervisedContrastive(temperature=0), "temperature is 0: a finite number above 0"),
        (
            lambda: SupervisedContrastive().head(site(index=1), nnx.Rngs(0)),
            "needs a model with a classifier",
        ),
        (
            lambda: CrossEntropy().head(site(index=1), nnx.Rngs(0)),
            r"outputs \(8, 6\): .* logits \[batch, 5\] are needed",
        ),
    ],
)
def test_bad_arguments_get_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_features_of_several_arrays_are_refused():
    where = dataclasses.replace(site(), features={"a": site().features})
    for objective in (InformationRegularization("8"), SupervisedContrastive()):
        with pytest.raises(TypeError, match=r"output of block 0 is of type dict: .* one array"):
            objective.head(where, nnx.Rngs(0))
