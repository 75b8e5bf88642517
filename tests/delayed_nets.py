"""Nets of given layers and the recorded runs, for the tests of the delayed route."""

import functools
import itertools
import re
from typing import Any, NamedTuple

import golden_vectors as gv
import jax
import jax.numpy as jnp
import numpy as np
from delayed_simulation import Layer, Layers
from flax import nnx

import jdecouple as jd


class Stack(nnx.Module):
    """Dense layers with tanh after each; `linear_end` leaves out the last tanh."""

    def __init__(self, layers: Layers, *, linear_end: bool):
        self.layers = nnx.List([dense(*layer) for layer in layers])
        self.linear_end = linear_end

    def __call__(self, x: jax.Array) -> jax.Array:
        for number, layer in enumerate(self.layers):
            linear = self.linear_end and number == len(self.layers) - 1
            x = layer(x) if linear else jnp.tanh(layer(x))
        return x


def dense(kernel: np.ndarray, bias: np.ndarray) -> nnx.Linear:
    zeros = nnx.initializers.zeros_init()  # quick to compile
    options = {"kernel_init": zeros, "rngs": nnx.Rngs(0)}
    layer = nnx.Linear(*kernel.shape, param_dtype=jnp.float64, **options)
    layer.kernel.set_value(jnp.asarray(kernel))
    layer.bias.set_value(jnp.asarray(bias))
    return layer


def model(blocks: list[Layers]) -> jd.Model:
    """Blocks of the given layers, of which the last outputs logits."""
    last = len(blocks) - 1
    return jd.Model([Stack(layers, linear_end=i == last) for i, layers in enumerate(blocks)])


def layers_of(trainer: jd.Trainer, state: Any) -> list[Layers]:
    """Current layers of every block."""
    return [
        [(np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])) for layer in block.layers]
        for block in trainer.modules(state)
    ]


def batch(x: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    return {"x": x, "label": labels.astype(np.int32)}


def largest_error(found: list[Layers], wanted: list[Layers]) -> float:
    """Largest relative error of any array; both hold as many layers, however they are grouped."""
    flat = (itertools.chain.from_iterable(layers) for layers in (found, wanted))
    return max(
        gv.relative_error(*arrays)
        for pair in zip(*flat, strict=True)
        for arrays in zip(*pair, strict=True)
    )


class Recorded(NamedTuple):
    """A run of the authors' code: which case and variant, and what the JSON says of it."""

    case: str
    variant: str
    method: str
    arguments: dict[str, Any]
    nesterov: bool

    @property
    def golden(self) -> gv.Golden:
        return gv.load(self.case)

    @property
    def sgd(self) -> dict[str, Any]:
        """Settings of the optimiser, the learning rate as "lr"."""
        names = ("lr", "momentum", "weight_decay")
        return {**{name: self.golden.settings[name] for name in names}, "nesterov": self.nesterov}

    @property
    def batches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Images and labels of every iteration."""
        return list(zip(self.golden["in.x"], self.golden["in.labels"], strict=True))

    @property
    def num_stages(self) -> int:
        return self.golden.settings["K"]

    @property
    def prefix(self) -> str:
        return f"out64.{self.variant}".removesuffix(".")

    @property
    def losses(self) -> np.ndarray | None:
        """Loss that became known in each iteration, or NaN; None where it was not recorded."""
        return self.golden[f"{self.prefix}.loss_at_iter"]

    def initial(self) -> list[Layers]:
        return self._layers("w.init")

    def after(self, iteration: int) -> list[Layers]:
        return self._layers(f"{self.prefix}.weights_after_iter", iteration)

    def comparable(self, history: list[list[Layers]]) -> list[Layers]:
        """The latest of the layers after every iteration, in the recording's terms.

        FDG's code, and ADL's, steps its last module at the start of the next iteration, before the
        forward.
        """
        if self.method not in ("fdg", "adl"):
            return history[-1]
        return [*history[-1][:-1], history[-2][-1]]

    def _layers(self, prefix: str, index: Any = ...) -> list[Layers]:
        """From PyTorch's (out, in), under "prefix.m0.l0.weight" and so on."""

        def layer(name: str) -> Layer:
            weight, bias = (self.golden[f"{prefix}.{name}.{part}"] for part in ("weight", "bias"))
            return weight[index].T, bias[index]

        return [
            [layer(f"m{module}.l{number}") for number in range(len(sizes) - 1)]
            for module, sizes in enumerate(self.golden.settings["arch"])
        ]


class RecordedByLayer(Recorded):
    """One of ADL or DDG, of three stages of two layers, in arrays of "VARIANT/ITERATION/...".

    Its settings are not recorded: the first update of the last module tells them.
    """

    @property
    def sgd(self) -> dict[str, Any]:
        lr = 0.05 if self.method == "ddg" else 0.1
        return {"lr": lr, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": self.nesterov}

    @property
    def batches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return list(zip(self.golden["x"], self.golden["y"], strict=True))

    @property
    def num_stages(self) -> int:
        return 3

    @property
    def losses(self) -> None:
        return None

    def initial(self) -> list[Layers]:
        return self.after(-1)

    def after(self, iteration: int) -> list[Layers]:
        def layer(name: str) -> Layer:
            prefix = f"{self.variant}/{iteration + 1}/{name}"
            return self.golden[f"{prefix}/w"], self.golden[f"{prefix}/b"]

        return [[layer(f"{module}/{number}") for number in range(2)] for module in range(3)]


def recorded_by_layer() -> list[RecordedByLayer]:
    """All recorded variants of ADL and DDG."""
    (case,) = gv.cases("delayed__adl_ddg")
    variants = sorted({key.split("/")[0] for key in gv.load(case).arrays if "/" in key})
    runs = []
    for variant in variants:
        method, *words = variant.split("_")
        arguments: dict[str, Any] = {"current_weights": True}
        if method == "adl":
            accumulate, beta = words
            arguments |= {"accumulate": int(accumulate[1:]), "beta": float(beta[1:])}
        runs.append(RecordedByLayer(case, variant, method, arguments, nesterov=method == "ddg"))
    return runs


def recorded(prefix: str) -> list[Recorded]:
    """All recorded variants of the cases that start with `prefix`."""
    return [
        read(case, variant)
        for case in gv.cases(prefix)
        for variant in sorted(
            {
                key.removeprefix("out64.").removesuffix("loss_at_iter").rstrip(".")
                for key in gv.load(case).arrays
                if key.startswith("out64.") and key.endswith("loss_at_iter")
            }
        )
    ]


def read(case: str, variant: str) -> Recorded:
    if case.startswith("bp_same_mlp"):
        nesterov = "no nesterov" not in gv.load(case).settings["component"]
        return Recorded(case, variant, "bp", {}, nesterov)
    if case.startswith("fdg"):
        beta, weights = re.fullmatch(r"beta([0-9.]+)\.(current|forward)_weights", variant).groups()
        arguments = {"beta": float(beta), "current_weights": weights == "current"}
        return Recorded(case, variant, "fdg", arguments, nesterov=False)
    # "main_py: nesterov=True, module 0 uses 2*lr (...), others lr. nesterov_same_lr: ..."
    modes = dict(part.split(": ", 1) for part in gv.load(case).settings["modes"].split(". "))
    arguments = {"first_stage_lr_scale": 2.0 if "module 0 uses 2*lr" in modes[variant] else 1.0}
    return Recorded(case, variant, "fr", arguments, "nesterov=False" not in modes[variant])


@functools.cache
def layers(sizes: tuple[int, ...]) -> list[Layers]:
    """One dense layer a block, between so many features."""
    rng = np.random.default_rng(0)
    return [
        [(rng.normal(size=(inputs, outputs)) / inputs**0.5, rng.normal(size=outputs) / 5)]
        for inputs, outputs in itertools.pairwise(sizes)
    ]


@functools.cache
def examples(
    count: int, *, size: int, inputs: int, classes: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of vectors, and their labels."""
    rng = np.random.default_rng(1)
    return [(rng.normal(size=(size, inputs)), rng.integers(0, classes, size)) for _ in range(count)]
