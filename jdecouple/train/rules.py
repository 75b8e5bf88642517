"""Rules of a configuration's values: those that nothing refuses which is built from them."""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from jdecouple.pipeline.wire import WIRES
from jdecouple.train.tracking.table import chosen

DTYPES = {"float32": None, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
MOST = 2**31 - 1  # of whole numbers, but for the seed
ELASTIC = ("wait", "replay")
APART = ("keep", "gather")  # parts of checkpoints, when the run has ended
_MOST_PARTS = 4096  # blocks and stages, of which lists are made
_MOST_WIDTH = 10**6  # as a factor
# Keys that stages on their own cannot have: they need all stages at once, or batches of one shape.
_NOT_ELASTIC = (
    *("chunk", "engine", "schedule", "profile", "sufficient_direction", "early_stopping.patience"),
    *("growth.blocks", "data.buckets", "mesh.replicas", "mesh.propose"),
)

# Keys of `optimizer` that say how a schedule moves the learning rate, by its name.
SCHEDULE_KEYS = {
    "constant": (),
    "cosine": ("end_learning_rate", "per_epoch"),
    "step_decay": ("decay_epochs", "decay_factor", "per_epoch"),
}


def _rises(values: tuple, kind: Any, least: int) -> bool:
    numbers = all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
    rising = numbers and all(a < b for a, b in itertools.pairwise((least - 1, *values)))
    return rising and all(value < math.inf for value in values)


# Keys whose values nothing else refuses, a test, and what is allowed. None passes.
RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("dtype", lambda value: value in DTYPES, f"allowed are {', '.join(DTYPES)}"),
    ("wire", lambda value: value in WIRES, f"allowed are {', '.join(WIRES)}"),
    ("mesh.elastic", lambda value: value in ELASTIC, f"allowed are {', '.join(ELASTIC)}"),
    ("checkpoint.apart", lambda value: value in APART, f"allowed are {', '.join(APART)}"),
    ("seed", lambda n: 0 <= n < 2**32, f"a whole number from 0 to {2**32 - 1} is needed"),
    (
        "epochs steps eval_every log_every profile checkpoint.every checkpoint.keep "
        "accumulate early_stopping.patience mesh.elastic_buffer",
        lambda n: 0 < n <= MOST,
        f"a whole number from 1 to {MOST} is needed",
    ),
    (
        "optimizer.learning_rate optimizer.decay_factor",
        lambda x: 0 < x < math.inf,
        "a finite number above 0 is needed",
    ),
    (
        "optimizer.end_learning_rate optimizer.warmup_epochs",
        lambda x: 0 <= x < math.inf,
        "a finite number of at least 0 is needed",
    ),
    (
        # The noise is refused by the data, too, but only when a sweep over it has come there.
        "optimizer.warmup_start data.label_noise early_stopping.min_delta",
        lambda x: 0 <= x <= 1,
        "a finite number of at least 0 and at most 1 is needed",
    ),
    (
        "optimizer.decay_epochs growth.epochs",
        lambda x: _rises(x, (int, float), 0),
        "increasing numbers from 0 on are needed",
    ),
    ("ema", lambda x: 0 < x < 1, "a number above 0 and below 1 is needed"),
    ("model.width", lambda x: x < _MOST_WIDTH, f"a number below {_MOST_WIDTH} is needed"),
    (
        "model.depth mesh.stages num_stages",
        lambda n: n <= _MOST_PARTS,
        f"a whole number of at most {_MOST_PARTS} is needed",
    ),
    ("boundaries", lambda n: _rises(n, int, 0), "increasing whole numbers from 0 on are needed"),
    ("data.buckets", lambda n: _rises(n, int, 1), "increasing whole numbers from 1 on are needed"),
    (
        "growth.blocks",
        lambda n: n and _rises(n, int, 1),
        "increasing whole numbers from 1 on are needed",
    ),
    (
        "data.parts",
        lambda n: n and all(_rises((part,), int, 1) for part in n),
        "whole numbers of at least 1 are needed",
    ),
    ("growth.steps", lambda n: _rises(n, int, 0), "increasing whole numbers from 0 on are needed"),
)


def clashes(config: ConfigDict, defaults: ConfigDict) -> Iterator[str]:
    """What there is to say of keys of a complete configuration that exclude each other.

    A key counts as set where its value is not that of `defaults`.
    """
    try:
        chosen(config.tracking)
    except ValueError as error:
        yield str(error)
    yield from _rates(config.optimizer, defaults.optimizer)
    mesh, profile = config.mesh, config.profile
    buckets, length = config.data.buckets, config.data.max_length
    cuts = sum(config[key] is not None for key in ("boundaries", "split"))
    uneven = mesh.replicas is not None
    if cuts == 2:
        yield "split and config.boundaries are both set: give one of them"
    if uneven and (mesh.stages not in (None, len(mesh.replicas)) or mesh.data != 1):
        yield "mesh.replicas is set: leave config.mesh.stages and config.mesh.data alone"
    if mesh.propose and (uneven or cuts):
        keys = "config.boundaries, config.split and config.mesh.replicas"
        yield f"mesh.propose chooses boundaries and replicas: leave {keys} alone"
    if profile and config.engine == "spmd":
        yield "profile shows the calls of stages: config.engine 'spmd' has none, 'mpmd' has"
    if profile and config.chunk > 1:
        yield "profile shows single batches: leave config.chunk at 1"
    if config.early_stopping.min_delta and config.early_stopping.patience is None:
        reason = "config.early_stopping.patience is None: set it, too"
        yield f"early_stopping.min_delta is set, but {reason}"
    yield from _growth(config)
    yield from _elastic(config, defaults)
    if not buckets:
        return
    if config.data.parts is not None:
        yield "data.buckets is set, which pads to several lengths: leave config.data.parts at None"
    if length not in (None, buckets[-1]):
        yield f"data.buckets is {buckets}: its last must be config.data.max_length, {length}"
    for key, least in (("chunk", 1), ("profile", None)):
        if config[key] != least:
            reason = f"config.{key} is {config[key]}, which needs batches of one length"
            yield f"data.buckets is set: {reason}: leave it at {least}"


def _growth(config: ConfigDict) -> Iterator[str]:
    """What there is to say of the keys that let a model grow."""
    section = config.growth
    begins = {key: section[key] for key in ("epochs", "steps") if section[key] is not None}
    if section.blocks is None:
        for key in (*begins, *(() if section.freeze else ("freeze",))):
            yield f"growth.{key} is set, but config.growth.blocks is None: set it, too"
        return
    if len(begins) != 1:
        given = "set" if begins else "None"
        yield f"growth.epochs and config.growth.steps are both {given}: give one of them"
    for key, values in begins.items():
        if len(values) != len(section.blocks) or values[0] != 0:
            wanted = f"as many numbers as config.growth.blocks, {section.blocks}, the first 0"
            yield f"growth.{key} is {values}: {wanted}, are needed"
    if config.init_from is not None:
        yield "init_from holds all blocks of a network: leave config.growth.blocks at None"
    if config.schedule == "interleaved":
        yield "schedule 'interleaved' has queues of one net: leave config.growth.blocks at None"
    if config.profile:
        yield "profile shows one and the same net: leave config.growth.blocks at None"


def _elastic(config: ConfigDict, defaults: ConfigDict) -> Iterator[str]:
    """What there is to say of keys that stages on their own have no use for."""
    if config.mesh.elastic is None:
        return
    for key in _NOT_ELASTIC:
        *path, last = key.split(".")
        given, usual = (functools.reduce(operator.getitem, path, of) for of in (config, defaults))
        if given[last] not in (usual[last], "local"):
            reason = f"config.{key} is {given[last]}, which stages on their own cannot have"
            yield f"mesh.elastic is {config.mesh.elastic!r}: {reason}: leave it at {usual[last]}"


def _rates(section: ConfigDict, defaults: ConfigDict) -> Iterator[str]:
    """What there is to say of keys of the learning rate that its schedule does not read."""
    known = dict.fromkeys(itertools.chain(*SCHEDULE_KEYS.values()))
    taken = SCHEDULE_KEYS.get(section.schedule, tuple(known))  # an unknown one is refused later
    for key in known:
        if key not in taken and section[key] != defaults[key]:
            allowed = ", ".join(("learning_rate", *taken))
            yield f"optimizer.{key} is set, but schedule {section.schedule!r} takes only: {allowed}"
    if section.schedule == "step_decay" and not section.decay_epochs:
        yield "optimizer.decay_epochs is (): schedule 'step_decay' needs at least one epoch"
    if section.schedule == "cosine" and section.end_learning_rate > section.learning_rate:
        reason = f"at most config.optimizer.learning_rate, {section.learning_rate}, is allowed"
        yield f"optimizer.end_learning_rate is {section.end_learning_rate}: {reason}"
    if section.warmup_start != defaults.warmup_start and not section.warmup_epochs:
        yield "optimizer.warmup_start is set, but config.optimizer.warmup_epochs is 0: set it, too"
