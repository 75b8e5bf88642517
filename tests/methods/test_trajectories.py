"""The Trainer follows the authors' PyTorch code step by step (golden vectors, float64)."""

import dataclasses
import functools
from typing import Any

import golden_vectors as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jdecouple as jd
from jdecouple.methods.objectives import InformationRegularization

TOLERANCE = 1e-10
STAGES = pytest.mark.parametrize("stages", [pytest.param(1, marks=pytest.mark.slow), 2])


def error(found: Any, wanted: np.ndarray) -> float:
    found = np.asarray(found, np.float64)
    assert found.shape == wanted.shape
    return float(np.max(np.abs(found - wanted)))


# --- SCPL: a user's own modules -------------------------------------------------------------


class TanhPair(nnx.Module):
    """Linear-tanh-Linear-tanh with given weights."""

    def __init__(self, weights: dict[str, np.ndarray]):
        self.l0 = dense(weights["l0.weight"], weights["l0.bias"])
        self.l1 = dense(weights["l1.weight"], weights["l1.bias"])

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.l1(jnp.tanh(self.l0(x))))


def dense(weight: np.ndarray, bias: np.ndarray) -> nnx.Linear:
    zeros = nnx.initializers.zeros_init()  # quick to compile
    options = {"kernel_init": zeros, "rngs": nnx.Rngs(0)}
    layer = nnx.Linear(*weight.shape[::-1], param_dtype=jnp.float64, **options)
    layer.kernel.set_value(jnp.asarray(weight.T))
    layer.bias.set_value(jnp.asarray(bias))
    return layer


@STAGES
def test_scpl_trajectory(stages, x64):
    golden = gv.load("scpl_trajectory")
    initial = golden.group("w.init")
    blocks = [TanhPair(part_of(initial, f"m{i}.")) for i in range(3)]
    model = jd.Model(blocks, dense(initial["classifier.weight"], initial["classifier.bias"]))
    data = [
        {"x": x, "label": label.astype(np.int32)}
        for x, label in zip(golden["in.x"], golden["in.labels"], strict=True)
    ]
    trainer = jd.Trainer(
        model,
        jd.methods.get("scpl", projector="identity", temperature=golden.settings["temperature"]),
        jd.optim.sgd(0.1, momentum=0.9, weight_decay=5e-4),
        mesh=jd.make_mesh(stages=stages),
        example=data[0],
    )
    state = trainer.init()
    expected = golden.group("out64.weights_after_iter")
    losses = golden["out64.loss_per_block_then_classifier"]
    worst = 0.0
    for step, batch in enumerate(data):
        state, metrics = trainer.step(state, batch)
        modules = trainer.modules(state)
        for key, values in expected.items():
            part, *layer, name = key.split(".")
            module = modules[3] if part == "classifier" else modules[int(part[1:])]
            module = getattr(module, layer[0]) if layer else module
            found, wanted = (
                (module.kernel, values[step].T) if name == "weight" else (module.bias, values[step])
            )
            worst = max(worst, error(found[...], wanted))
        terms = [metrics[f"block_{i}/contrastive"] for i in range(3)]
        terms.append(metrics["block_2/cross_entropy"])
        np.testing.assert_allclose(terms, losses[step], rtol=1e-6)  # metrics are float32
        np.testing.assert_allclose(metrics["loss"], losses[step].sum(), rtol=1e-6)
    assert worst < TOLERANCE


def part_of(tree: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in tree.items() if k.startswith(prefix)}


# --- DeInfoReg: the built-in VGG and heads ----------------------------------------------------

IMAGE_SIZE = 16
CLASSES = 5
LAYERS_OF_BLOCK = (2, 1)
MAPS = ((8, 8, 8), (10, 4, 4))  # output of each block, C H W
ATTRIBUTES = {"running_mean": "mean", "running_var": "var"}


def locate(block: nnx.Module, head: nnx.Module, key: str) -> tuple[nnx.Variable, Any]:
    """Variable that a golden key names, and the function that turns the array over.

    Keys end in PyTorch's indices: layer.BLOCK.LAYER.{0: conv, 1: BatchNorm}.NAME,
    loss.BLOCK.projector.INDEX.NAME, classifier.BLOCK.classifier.INDEX.NAME.
    """
    part, number, first, second, name = key.split(".")
    if part == "layer":
        layer = block.layers[3 * int(first) + int(second)]  # conv, BatchNorm, ReLU
    else:
        stack = head.projector if part == "loss" else head.classifier
        layer = stack.layers[int(second)]
    if name != "weight":
        return getattr(layer, ATTRIBUTES.get(name, name)), np.asarray
    if isinstance(layer, nnx.BatchNorm):
        return layer.scale, np.asarray
    if isinstance(layer, nnx.Conv):
        return layer.kernel, gv.conv_kernel
    reads_image = part == "loss" and second == "1"
    image = MAPS[int(number)] if reads_image else None
    return layer.kernel, functools.partial(gv.dense_kernel, image=image)


@dataclasses.dataclass(frozen=True)
class GoldenHeads(InformationRegularization):
    """The objective with the golden initial weights in its heads."""

    def head(self, site, rngs):
        head = super().head(site, rngs)
        for key, value in gv.load("deinforeg_trajectory").group("w.init").items():
            if not key.startswith("layer.") and key.split(".")[1] == str(site.index):
                variable, turn = locate(None, head, key)
                variable.set_value(jnp.asarray(turn(value)))
        return head


def vgg() -> jd.Model:
    model = jd.models.vgg(
        CLASSES,
        blocks="6,8,M|10,M",
        image_size=IMAGE_SIZE,
        init="torch",
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    for key, value in gv.load("deinforeg_trajectory").group("w.init").items():
        if key.startswith("layer."):
            variable, turn = locate(model.blocks[int(key.split(".")[1])], None, key)
            variable.set_value(jnp.asarray(turn(value)))
    return model


def samples(key: str, batch: int) -> int:
    """Numbers that a channel's statistics in BatchNorm are taken over."""
    part, number, *_ = key.split(".")
    return batch * (IMAGE_SIZE >> int(number)) ** 2 if part == "layer" else batch


def unbiased(running: np.ndarray, steps: int, count: int) -> np.ndarray:
    """PyTorch's running variance (unbiased, from 1) from flax's (biased, from 1)."""
    start = 0.9**steps
    return (running - start) * count / (count - 1) + start


@STAGES
def test_deinforeg_trajectory(stages, x64):
    golden = gv.load("deinforeg_trajectory")
    batch_size = golden.settings["batch"]
    data = [
        {"x": gv.images(x), "label": label.astype(np.int32)}
        for x, label in zip(golden["in.x_nchw"], golden["in.labels"], strict=True)
    ]
    options = {"projector": "20-18-12", "mode": "merge"}
    method = jd.methods.get("deinforeg", init="torch", **options)  # quick to compile
    trainer = jd.Trainer(
        vgg(),
        dataclasses.replace(method, objective=GoldenHeads(**options)),
        jd.optim.lars(0.2, weight_decay=1e-4),
        mesh=jd.make_mesh(stages=stages),
        example=data[0],
    )
    state = trainer.init()
    expected = golden.group("out64.after_step")
    errors = {}
    for step, batch in enumerate(data):
        state, metrics = trainer.step(state, batch)
        np.testing.assert_allclose(metrics["loss"], golden["out64.loss_total"][step], rtol=1e-6)
        blocks, heads = trainer.modules(state), trainer.heads(state)
        for key, values in expected.items():
            number = int(key.split(".")[1])
            variable, turn = locate(blocks[number], heads[number], key)
            value = np.asarray(variable.get_value())
            assert value.dtype == np.float64
            if key.endswith("running_var"):
                value = unbiased(value, step + 1, samples(key, batch_size))
            errors[step, key] = error(value, turn(values[step]))
    assert len(errors) == len(data) * len(expected)
    worst = max(errors, key=errors.get)
    assert errors[worst] < TOLERANCE, (worst, errors[worst])
    check_exits(blocks, heads, golden, len(data), batch_size)


def check_exits(blocks, heads, golden, steps, batch_size):
    """The exits' logits in evaluation, with the running variances as PyTorch keeps them."""
    for key in golden.group("out64.after_step"):
        if key.endswith("running_var"):
            number = int(key.split(".")[1])
            variable, _ = locate(blocks[number], heads[number], key)
            value = unbiased(np.asarray(variable[...]), steps, samples(key, batch_size))
            variable.set_value(jnp.asarray(value))
    x = jnp.asarray(gv.images(golden["in.x_nchw"][0]))
    for number, (block, head) in enumerate(zip(blocks[:2], heads, strict=True), start=1):
        block.eval()
        head.eval()
        x = block(x)
        wanted = golden[f"out64.eval_logits_of_batch0.exit{number}"]
        assert error(head.logits(x), wanted) < TOLERANCE
