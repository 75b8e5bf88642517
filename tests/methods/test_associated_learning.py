"""Associated Learning: the authors' numbers, and an answer that comes down through all stages."""

import functools
from types import MappingProxyType

import golden_vectors as gv
import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from flax import nnx

import jdecouple as jd
from jdecouple.methods.objectives import AssociatedLearning, BlockInfo, associated_learning
from jdecouple.methods.routes import Unit

CASES = pytest.mark.parametrize("case", gv.cases("al_component"))
BITS = pytest.mark.parametrize("bits", nets.marked((64, 32), (64,)))
DENSE = {"f": ("f",), "g": ("g.0",), "b": ("b.0", "b.2"), "inv": ("inv.0",)}


def close(found, golden, key, bits):
    """Within 1e-12 of the authors' float64 run, or 1e-5 in float32."""
    assert found.dtype == f"float{bits}"
    assert gv.relative_error(found, golden[key]) < {64: 1e-12, 32: 1e-5}[bits], key


def weights(golden, prefix="w", bits=64):
    """(kernel, bias) pairs in flax's layout, by PyTorch's names."""
    names = sorted({key.rsplit(".", 1)[0] for key in golden.group(prefix)})
    return {
        name: tuple(
            np.asarray(convert(golden[f"{prefix}.{name}.{part}"]), f"float{bits}")
            for part, convert in (("weight", gv.dense_kernel), ("bias", np.asarray))
        )
        for name in names
    }


# --- The losses -----------------------------------------------------------------------------


def forward(params, x, y, activation):
    """Features, code, bridged features and decoded code, written out by hand."""
    act = {"linear": lambda x: x, "tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid}[activation]

    def run(part, x):
        for name in DENSE[part]:
            if name in params:
                x = act(x @ params[name][0] + params[name][1])
        return x

    s = x @ params["f"][0] + params["f"][1]
    t = run("g", y)
    return s, t, run("b", s), run("inv", t)


@BITS
@CASES
def test_losses_golden(case, bits):
    golden, activation = gv.load(case), case.rsplit("__", 1)[1]
    with jax.enable_x64(bits == 64):
        x, y = (jnp.asarray(golden[f"in.{name}"], f"float{bits}") for name in "xy")

        @jax.jit
        @functools.partial(jax.jacrev, argnums=(0, 1, 2), has_aux=True)
        def gradients(params, x, y):
            _, t, bridged, decoded = forward(params, x, y, activation)
            terms = associated_learning(bridged, t, decoded, y)
            return terms, terms

        found, terms = gradients(weights(golden, bits=bits), x, y)
        close(terms["bridge"], golden, "out64.loss_b", bits)
        close(terms["autoencoder"], golden, "out64.loss_ae", bits)
        close(found["bridge"][1], golden, "grad64.x_of_loss_b", bits)
        close(found["autoencoder"][2], golden, "grad64.y_of_loss_ae", bits)
        assert not found["autoencoder"][1].any()
        assert not found["bridge"][2].any()
        for name, wanted in weights(golden, "grad64.w").items():
            for part in range(2):
                total = sum(found[term][0][name][part] for term in terms)
                assert gv.relative_error(total, wanted[part]) < {64: 1e-12, 32: 1e-5}[bits], name


def test_shapes_that_do_not_fit_are_refused():
    ones = jnp.ones((4, 3))
    words = ("equal shapes", "(4, 2)")
    nets.assert_clear(ValueError, words, lambda: associated_learning(ones[:, :2], ones, ones, ones))


# --- The head -------------------------------------------------------------------------------


class Net(nnx.Module):
    """The golden block f and the head above it."""

    def __init__(self, golden, activation):
        options = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.block = nnx.Linear(12, 10, **options)
        # Its width 7 in front of the activations; the sigmoid case has the bridge of images.
        objective = AssociatedLearning(7, 5 if activation == "sigmoid" else 0, activation)
        # Above the first block, so that the golden labels, which are no one-hot ones, fit.
        site = BlockInfo(
            0, 2, jax.ShapeDtypeStruct((8, 10), jnp.float64), 5, None, "torch", jnp.float64
        )
        self.head = objective.head(site, nnx.Rngs(1))
        for name, (kernel, bias) in weights(golden).items():
            layer = located(self, name)
            assert layer.kernel.shape == kernel.shape
            layer.kernel.set_value(jnp.asarray(kernel))
            layer.bias.set_value(jnp.asarray(bias))


def located(net, name):
    """The dense layer of a PyTorch name."""
    part, _, index = name.partition(".")
    if part == "f":
        return net.block
    module = {"g": net.head.encoder, "b": net.head.bridge, "inv": net.head.decoder}[part]
    return module.layers[int(index) + (part == "b")]  # the bridge flattens first


@CASES
def test_head_golden(case, x64):
    golden, activation = gv.load(case), case.rsplit("__", 1)[1]
    net = Net(golden, activation)
    definition, params = nnx.split(net)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradients(params, x, target):
        net = nnx.merge(definition, params)
        output = net.head(net.block(x), {"x": x, "target": target})
        return output.loss, output

    found, output = gradients(params, golden["in.x"], golden["in.y"])
    close(output.metrics["bridge"], golden, "out64.loss_b", 64)
    close(output.metrics["autoencoder"], golden, "out64.loss_ae", 64)
    close(output.carry["target"], golden, "out64.t", 64)
    assert float(output.loss) == pytest.approx(float(sum(output.metrics.values())), rel=1e-15)
    assert output.logits is None
    held = nnx.merge(definition, found)
    for name, (kernel, bias) in weights(golden, "grad64.w").items():
        layer = located(held, name)
        assert gv.relative_error(layer.kernel[...], kernel) < 1e-12, name
        assert gv.relative_error(layer.bias[...], bias) < 1e-12, name

    s = net.block(golden["in.x"])
    close(s, golden, "out64.eval_f_x", 64)
    close(net.head.descend(golden["out64.t"]), golden, "out64.eval_inv_t", 64)
    close(net.head.descend(net.head.turn(s)), golden, "out64.eval_bridge_forward", 64)


def test_labels_enter_one_hot(x64):
    net = Net(gv.load("al_component__tanh"), "tanh")
    features = net.block(gv.load("al_component__tanh")["in.x"])
    labels = jnp.array([0, 1, 2, 3, 4, 0, 1, 2])
    output = net.head(features, {"label": labels})
    wanted = net.head(features, {"target": jnp.eye(5)[labels]})
    assert output.loss == wanted.loss
    assert net.head.logits(features) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"features": 0}, ("features", "at least 1")),
        ({"expansion": -1}, ("expansion", "at least 0")),
        ({"expansion": False}, ("expansion", "at least 0")),
        ({"head_pool": 0.5}, ("head_pool", "at least 0")),
        ({"activation": "relu"}, ("activation", "sigmoid, tanh, linear", "relu")),
        ({"autoencoder_lr_scale": 0}, ("autoencoder_lr_scale", "above 0")),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    nets.assert_clear(ValueError, words, lambda: jd.methods.get("al", **arguments))


# --- The rate of the autoencoder -----------------------------------------------------------


def one_block(scale, optimizer):
    """A dense block under al, float64, and two batches for it."""
    options = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    arguments = {"features": 6, "expansion": 0, "activation": "tanh", "autoencoder_lr_scale": scale}
    data = nets.batches(2, dtype=np.float64)
    model = jd.Model([nnx.Linear(nets.FEATURES, 7, **options)])
    method = jd.methods.get("al", **arguments)
    trainer = jd.Trainer(model, method, optimizer, example=data[0], num_classes=nets.CLASSES)
    return trainer, data


def adam_by_hand(trainer, data, rate, scale):
    """Weights after a step of Adam on every batch, by their names."""
    arrays = nets.to_arrays(trainer, trainer.init())
    names = {key: key.split("/", 2)[2] for key in arrays if "/params/" in key}
    weights = {name: jnp.asarray(arrays[key]) for key, name in names.items()}
    first, second = ({name: jnp.zeros_like(w) for name, w in weights.items()} for _ in range(2))

    def loss(weights, batch):
        def dense(part, x):
            return x @ weights[f"{part}/kernel"] + weights[f"{part}/bias"]

        y = jnp.eye(nets.CLASSES)[batch["label"]]
        code = jnp.tanh(dense("head/encoder/layers/0", y))
        bridged = jnp.tanh(dense("head/bridge/layers/1", dense("block", batch["x"])))
        decoded = jnp.tanh(dense("head/decoder/layers/0", code))
        bridge = jnp.mean((bridged - jax.lax.stop_gradient(code)) ** 2)
        return bridge + jnp.mean((decoded - y) ** 2)

    for step, batch in enumerate(data, start=1):
        for name, gradient in jax.grad(loss)(weights, batch).items():
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            root = jnp.sqrt(second[name] / (1 - 0.999**step)) + 1e-8
            factor = scale if name.startswith(("head/encoder", "head/decoder")) else 1
            move = first[name] / (1 - 0.9**step) / root
            weights[name] = weights[name] - factor * rate * move
    return {key: weights[name] for key, name in names.items()}


@pytest.mark.parametrize("scale", nets.marked((1.0, 2.0), ()))
def test_two_steps_with_an_autoencoder_at_another_rate(scale, x64):
    """A factor on the gradients would leave Adam's steps as they are."""
    trainer, data = one_block(scale, jd.optim.adam(0.01))
    state, _ = nets.trained(trainer, data, 2)
    found = nets.to_arrays(trainer, state)
    for name, wanted in adam_by_hand(trainer, data, 0.01, scale).items():
        assert gv.relative_error(found[name], wanted) < 1e-13, name


def test_a_rate_of_parts_that_a_head_lacks_is_refused():
    class Head(nnx.Module):
        lr_scales = MappingProxyType({"decoder": 2.0})

    block = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    words = ("the head of block 3 has no parameters in 'decoder'",)
    nets.assert_clear(ValueError, words, lambda: Unit.build(3, block, Head(), None))


# --- Over several stages --------------------------------------------------------------------


def trainer(stages=1, data=1, **options):
    batch = nets.batches(1, dtype=np.float64)[0]
    return jd.Trainer(
        nets.user_model(dropout=0.0, param_dtype=jnp.float64),
        jd.methods.get("al", features=6, expansion=2, activation="tanh"),
        jd.optim.sgd(0.1),
        mesh=jd.make_mesh(stages, data),
        example=batch,
        **options,
    )


def by_hand(trainer, state, data):
    """Accuracy and mean cross-entropy of the path that the paper describes."""
    *blocks, _ = trainer.modules(state)
    heads = trainer.heads(state)
    for module in (*blocks, *heads):
        module.eval()
    x = jnp.concatenate([batch["x"] for batch in data])
    labels = jnp.concatenate([batch["label"] for batch in data])
    for block in blocks:
        x = block(x)
    target = heads[-1].bridge(x)
    for head in reversed(heads):
        target = head.decoder(target)
    loss = jd.objectives.cross_entropy(target, labels)
    return float(jnp.mean(target.argmax(-1) == labels)), float(loss)


@pytest.mark.parametrize(
    ("stages", "data", "options"),
    [
        pytest.param(1, 1, {}, marks=pytest.mark.slow),
        pytest.param(1, 1, {"fuse": False}, marks=pytest.mark.slow),
        pytest.param(2, 1, {"max_in_flight": 1}, marks=pytest.mark.slow),
        pytest.param(4, 1, {}, marks=pytest.mark.slow),
        pytest.param(2, 2, {"boundaries": (1,)}, marks=pytest.mark.slow),
        (4, 1, {"engine": "auto"}),
    ],
)
def test_the_answer_comes_down_through_all_stages(stages, data, options, x64):
    train = nets.batches(3, dtype=np.float64)
    # More batches than are on their way at once, and a last one that is padded.
    test = nets.batches(11, 8, dtype=np.float64)
    test[-1] = {name: value[:5] for name, value in test[-1].items()}
    built = trainer(stages, data, **options)
    state, _ = nets.trained(built, train, 3)
    found = built.evaluate(state, test)
    again = built.evaluate(state, test)
    accuracy, loss = by_hand(built, state, test)
    assert list(found) == ["loss", "accuracy", "exit_3/accuracy", "exit_3/loss"]
    assert found["accuracy"] == found["exit_3/accuracy"] == pytest.approx(accuracy)
    assert found["loss"] == found["exit_3/loss"] == pytest.approx(loss, rel=1e-6)
    assert found == again


def test_an_answer_from_nothing_is_refused(x64):
    built = trainer(2)
    with pytest.raises(ValueError, match="no examples"):
        built.evaluate(built.init(), [])


@pytest.mark.slow
def test_training_reports_losses_and_no_accuracy(x64):
    """Which would need the way down, too."""
    built = trainer(2)
    _, metrics = built.step(built.init(), nets.batches(1, dtype=np.float64)[0])
    whole = built.gather_metrics(metrics)
    terms = ("loss", "bridge", "autoencoder")
    assert set(whole) == {"loss"} | {f"block_{i}/{term}" for i in range(4) for term in terms}
    assert whole["loss"] == pytest.approx(sum(whole[f"block_{i}/loss"] for i in range(4)))
