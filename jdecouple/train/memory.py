"""Whether a run can fit into memory: what must lie there, counted before it is made."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from jdecouple._errors import gigabytes, machine_bytes
from jdecouple.data import Dataset
from jdecouple.methods import Method
from jdecouple.methods.routes import Carry, accumulating
from jdecouple.models import Model
from jdecouple.pipeline import build
from jdecouple.pipeline.design import same_keys
from jdecouple.pipeline.optimizing import Optimizer, told_delay
from jdecouple.train.config import ConfigError, chosen
from jdecouple.train.options import options
from jdecouple.trainer import Trainer

_DIGITS = 1797
_SYNTHETIC_SIDE = 32
_PIXEL_BYTES = _WORD_BYTES = 4  # of what the device reads
_EXAMPLE_BYTES = 32  # of a label and its places in random orders
_WIDEST = 2048  # layer of a built-in model whose option is a factor on its widths
_MACHINE = "this machine"
_SMALL = 1e-4  # share of the memory, for one layer, below which nothing is counted


def check_data(config: ConfigDict) -> None:
    """Raises ConfigError where the images in memory and one batch are more than the host has."""
    have = machine_bytes()
    for key, value, size in _data_bytes(config):
        if size > have:
            raise ConfigError(
                f"config.data.{key} is {value}: the data need {gigabytes(size)} in memory, but "
                f"this machine has {gigabytes(have)}"
            )


def _data_bytes(config: ConfigDict) -> Iterator[tuple[str, Any, int]]:
    section, batch = config.data, config.batch_size
    synthetic = section.name == "synthetic"
    length = section.buckets[-1] if section.buckets else section.max_length
    if section.parts:
        yield "parts", section.parts, _WORD_BYTES * batch * sum(section.parts)
    elif length:
        yield "buckets" if section.buckets else "max_length", length, _WORD_BYTES * batch * length
    if synthetic:
        yield "synthetic_size", section.synthetic_size, _EXAMPLE_BYTES * section.synthetic_size
    if side := section.image_size or (_SYNTHETIC_SIDE if synthetic else 0):
        rows = {"digits": _DIGITS, "synthetic": 1}.get(section.name, 0)
        channels = min(section.channels, 3) if synthetic else 1
        batch = min(batch, section.synthetic_size if synthetic else rows or batch)
        yield "image_size", side, side**2 * channels * (rows + _PIXEL_BYTES * batch)


def check_state(
    config: ConfigDict,
    make_model: Callable[[nnx.Rngs], Model],
    method: Method,
    optimizer: Optimizer,
    dataset: Dataset,
    carry: Carry,
) -> None:
    """Raises ConfigError where weights and the optimiser's state are more than the devices have.

    Averages of the weights are part of the state. All is counted in an abstract pass over what
    `make_model` and the method's heads would hold; what fails there fails when it is made, with a
    better message.

    Args:
        config: the complete configuration.
        make_model: the model of a source of keys.
        method: gives the heads.
        optimizer: has a state of every block.
        dataset: what is trained on.
        carry: shapes of a batch as the first block reads it.
    """
    have, where, count = _device_bytes()
    if _layer_bytes(config, dataset) < _SMALL * have:
        return

    told = told_delay(optimizer, delay=1.0)
    told = accumulating(told, max(config.accumulate, method.route.accumulate))

    def make() -> tuple[Any, Any]:
        model = make_model(same_keys(config.seed))
        units = build.build_units(model, method, carry, None, config.seed, None).units
        pairs = [unit.initial() for unit in units]
        averages = [] if config.ema is None else pairs
        return pairs, ([told.init(params) for params, _ in pairs], averages)

    try:
        pairs, state = jax.eval_shape(make)
    except (ArithmeticError, RuntimeError, TypeError, ValueError):
        return
    weights, states = _bytes(pairs), _bytes(state)
    # Initial weights are made on one device; what is trained spreads over all.
    if weights <= have and weights + states <= have * count:
        return
    given = " and ".join(f"config.{key} is {config[key].to_dict()}" for key in ("model", "method"))
    raise ConfigError(
        f"{given}: with inputs of {list(carry['x'].shape)} and {dataset.num_classes} classes "
        f"weights need {gigabytes(weights)} and the optimizer's state {gigabytes(states)}, but "
        f"{where} has {gigabytes(have)}"
    )


def check_stages(trainer: Trainer) -> None:
    """Raises ConfigError where the states of stages are more than their devices have.

    Unlike `check_state` it knows which stages share a device, and what waits in queues between two
    steps. What calls need while they run does not count: `jdecouple plan` estimates that.
    """
    have, where, count = _device_bytes()
    held: Counter[jax.Device] = Counter()
    queues = 0
    states = trainer.abstract().stages
    for stage, placement, state in zip(trainer.stages, trainer.placements, states, strict=True):
        shardings = placement.state_shardings(state, stage.carry["label"].shape[0])
        pairs = zip(*map(jax.tree.leaves, (state, shardings)), strict=True)
        size = sum(math.prod(x.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, x in pairs)
        held.update(dict.fromkeys(placement.devices, size))
        queues += _bytes(state.get("queues", ()))
    together = where == _MACHINE
    need, have = (held.total(), have * count) if together else (max(held.values()), have)
    if need > have:
        what = "states of all stages" if together else "states of a device's stages"
        raise ConfigError(
            f"the {what} need {gigabytes(need)}, but {where} has {gigabytes(have)}; of all stages "
            f"{gigabytes(queues)} are what waits in queues: `jdecouple plan` says what fits"
        )


def _layer_bytes(config: ConfigDict, dataset: Dataset) -> float:
    """Bytes of a dense layer of the largest sizes that are given, about."""
    given: dict[str, Any] = {}
    for section in ("model", "method"):
        known = options(section, config[section].name)
        given |= {key: value for key, (_, value) in known.items()} | chosen(config, section)
    factor = max(given.get("width", 0), given.get("widen", 0) / 16)
    numbers = [float(n) for value in given.values() for n in re.findall(r"\d+", str(value))]
    inputs = dataset.model_arguments()
    size = inputs.get("vocabulary_size", 1) * inputs.get("image_size", 1) ** 2
    return 4 * size * max(dataset.num_classes, _WIDEST * factor, *numbers) ** 2


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _device_bytes() -> tuple[int, str, int]:
    """Memory of a device, what to call it, and how many there are; on CPUs of a machine."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return machine_bytes(), _MACHINE, jax.process_count()
    return limit, "each device", len(jax.devices())
