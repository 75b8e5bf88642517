"""One process of a benchmark: does what it is told and says what it measured.

The argument is JSON: null, or arguments of `distributed.initialize` for one of several processes.
Commands come on standard input, one JSON list a line, and each is answered by one line of JSON on
standard output:

    ["devices"]                 kinds of all devices
    ["link", SIZES, N]          see `link`
    ["build", NAME, OPTIONS]    begins a `Run` from the initial weights
    [METHOD, NAME, ...]         a method of that run: run, dispatch, costs, digest
"""

import hashlib
import itertools
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from runner import cores

import jdecouple as jd
from jdecouple.pipeline import distributed
from jdecouple.pipeline.mesh import StageDevices
from jdecouple.pipeline.transfer import transfer

NUM_CLASSES = 10
IMAGE_SIZE = 16  # in pixels
VOCABULARY, LENGTH = 256, 128  # of tokens, and of a row of them
DISTINCT_BATCHES = 4
WARM_UP_CALLS = 10
PAUSE = 0.05  # seconds, in which threads that spin for more work give up
TINY = 4  # width of a net of arrays
OTHER_ARRAYS = 4  # of a block of it: kernels and biases of its dense layer and its head's
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}


def upload(trainer: jd.Trainer, batches: Sequence[dict]) -> Any:
    """Puts T batches on the devices of the first stage; one goes alone."""
    return trainer.put(batches if len(batches) > 1 else batches[0])


def train(trainer: jd.Trainer, state: Any, batches: Any) -> tuple[Any, dict[str, Any]]:
    """Trains on what `upload` returned: the new state, and metrics ([T] where T > 1)."""
    return (trainer.step if batches.count is None else trainer.steps)(state, batches)


class Repeated:
    """A training on one batch that is on the devices already."""

    def __init__(self, trainer: jd.Trainer, batch: dict[str, np.ndarray]):
        self._trainer, self._batch = trainer, trainer.put(batch)
        self.state = trainer.init()

    def run(self, steps: int) -> float:
        """Trains, waits for all work, and returns the last loss."""
        for _ in range(steps):
            self.state, metrics = self._trainer.step(self.state, self._batch)
        self._trainer.wait(self.state)
        return float(metrics["loss"])


def timed(training: Any, steps: int) -> dict[str, float]:
    """Lets a training `run`: "ms" and "processor_ms" of a step, and the last "loss"."""
    time.sleep(PAUSE)
    start, processor = time.perf_counter(), time.process_time()
    loss = training.run(steps)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    return {"ms": 1e3 * seconds / steps, "processor_ms": 1e3 * processor / steps, "loss": loss}


class Arrays(nnx.Module):
    """A tiny dense layer with `extra` more biases, all of them trained: arrays without work."""

    def __init__(self, extra: int, rngs: nnx.Rngs):
        self.dense = nnx.Linear(TINY, TINY, rngs=rngs)
        self.biases = nnx.List([nnx.Param(jnp.zeros(TINY)) for _ in range(extra)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, TINY] -> [batch, TINY]`."""
        return nnx.relu(sum((bias[...] for bias in self.biases), self.dense(x)))


def build_model(
    name: str, hidden: int, depth: int, modules: int | None = None
) -> tuple[jd.Model, tuple[int, ...]]:
    """The net of so many equal modules, by default of all blocks, and the shape of an input."""
    rngs, modules = nnx.Rngs(0), modules or depth
    if name == "gpt":  # the first part has the embedding as well
        size = {"hidden": hidden, "depth": depth, "context": LENGTH}
        return jd.models.gpt(VOCABULARY, **size, cut=modules, rngs=rngs), (LENGTH,)
    model, shape = _uncut(name, hidden, depth, rngs)
    return model.cut([module * depth // modules for module in range(modules)]), shape


def _uncut(name: str, hidden: int, depth: int, rngs: nnx.Rngs) -> tuple[jd.Model, tuple[int, ...]]:
    """The net of all its blocks, and the shape of one of its inputs."""
    if name == "arrays":
        blocks = [Arrays(hidden - OTHER_ARRAYS, rngs) for _ in range(depth)]
        return jd.Model(blocks, nnx.Linear(TINY, NUM_CLASSES, rngs=rngs)), (TINY,)
    if name in ("mlp", "reversible"):
        sizes = {"input_size": hidden, "hidden": hidden, "depth": depth}
        model = jd.models.mlp(NUM_CLASSES, **sizes, reversible=name == "reversible", rngs=rngs)
        return model, (hidden,)
    size: dict[str, Any] = {"image_size": IMAGE_SIZE, "channels": hidden}
    model = jd.models.vgg(NUM_CLASSES, blocks=[[hidden, hidden]] * depth, **size, rngs=rngs)
    return model, (IMAGE_SIZE, IMAGE_SIZE, hidden)


def build_batches(
    size: int, shape: tuple[int, ...], of_tokens: bool = False
) -> list[dict[str, np.ndarray]]:
    """The distinct batches of a run; of tokens every row is a part of one document."""
    rng = np.random.default_rng(0)
    if of_tokens:
        rows = rng.integers(1, VOCABULARY, (DISTINCT_BATCHES, size, shape[0] + 1)).astype(np.int32)
        return [{"x": batch[:, :-1].copy(), "label": batch[:, 1:].copy()} for batch in rows]
    return [
        {
            "x": rng.normal(size=(size, *shape)).astype(np.float32),
            "label": rng.integers(0, NUM_CLASSES, size).astype(np.int32),
        }
        for _ in range(DISTINCT_BATCHES)
    ]


def build_method(name: str, head: int, of_tokens: bool = False) -> jd.methods.Method:
    """A method; its projectors, if it has any, are a dense layer to `head` features, or nothing."""
    none: dict[str, dict] = {"deinforeg": {"projector": "identity", "mode": "unmerge"}}
    small = {"deinforeg": {"projector": (head,)}, "scpl": {"projector": "linear", "features": head}}
    arguments = (small if head else none).get(name, {})
    if of_tokens:  # without BatchNorm
        arguments |= {"dgl": {"aux": "norm"}, "deinforeg": {"batch_norm": False}}.get(name, {})
    return jd.methods.get(name, **arguments)


class Run:
    """A trainer with its state, and batches that are on the devices already.

    The options are those of `rows.Row.options` and `runner.NET`, of which "modules" may be left
    out, and perhaps "dtype", "wire" and "in_flight", the Trainer's `max_in_flight`.
    """

    def __init__(self, options: dict[str, Any]):
        name, depth, stages = options["model"], options["depth"], options["stages"]
        count = options.get("modules", depth)
        starts = [stage * count // stages for stage in range(stages)]
        if blocks := options.get("blocks"):
            starts = [sum(blocks[:stage]) for stage in range(stages)]
        model, shape = build_model(name, options["hidden"], depth, count)
        self._batches = build_batches(options["batch"], shape, name == "gpt")
        self._trainer = trainer = jd.Trainer(
            model,
            build_method(options["method"], options["head"], name == "gpt"),
            jd.optim.sgd(0.01, momentum=0.0 if name == "arrays" else 0.9),
            num_stages=stages,
            boundaries=starts,
            mesh=jd.make_mesh(options["groups"], options["data"]),
            example=self._batches[0],
            dtype=DTYPES[options.get("dtype", "float32")],
            max_in_flight=options.get("in_flight"),
            wire=options.get("wire"),
            **{name: options[name] for name in ("microbatches", "schedule", "fuse", "engine")},
        )
        self._state = trainer.init()
        self._chunk = options["chunk"]
        cycle = itertools.cycle(self._batches)
        groups = [list(itertools.islice(cycle, self._chunk)) for _ in range(DISTINCT_BATCHES)]
        self._uploaded = itertools.cycle([upload(trainer, group) for group in groups])

    def run(self, steps: int) -> dict[str, Any]:
        """Trains on so many batches, rounded up to whole chunks.

        Returns:
            "start" (the first dispatch) and "end" (of the last computation) in seconds of a clock
            that all processes of the machine share; "processor", seconds of all threads; "losses"
            of every batch by name; "cores"; and bytes: "state", of the device with most of it, and
            "peak", ever in use on a device, if known.
        """
        history = []
        start, processor = time.perf_counter(), time.process_time()
        for _ in range(-(-steps // self._chunk)):
            self._state, metrics = train(self._trainer, self._state, next(self._uploaded))
            history.append(metrics)
        self._trainer.wait(self._state)
        end, processor = time.perf_counter(), time.process_time() - processor
        state_bytes: Counter = Counter()
        for leaf in jax.tree.leaves(self._state.stages):
            for shard in leaf.addressable_shards:
                state_bytes[shard.device] += shard.data.nbytes
        in_use = [device.memory_stats() or {} for device in jax.local_devices()]
        return {
            "start": start,
            "end": end,
            "processor": processor,
            "losses": {
                name: np.concatenate([np.ravel(metrics[name]) for metrics in history]).tolist()
                for name in history[0]
                if name.endswith("/loss")
            },
            "cores": cores(),
            "state": max(state_bytes.values()),
            "peak": max(stats.get("peak_bytes_in_use", 0) for stats in in_use) or None,
        }

    def dispatch(self, samples: int) -> dict[str, float]:
        """Trains with nothing in flight before a call.

        Returns:
            "arrays" in the state of the fullest stage; median microseconds a stage and batch until
            a call returns, "dispatched", and until its batches are trained on, "done".
        """
        dispatched, done = [], []
        for _ in range(WARM_UP_CALLS + samples):
            batches = next(self._uploaded)
            self._trainer.wait(self._state)
            start = time.perf_counter()
            self._state, _ = train(self._trainer, self._state, batches)
            dispatched.append(time.perf_counter() - start)
            self._trainer.wait(self._state)
            done.append(time.perf_counter() - start)
        scale = 1e6 / (len(self._trainer.stages) * self._chunk)
        return {
            "arrays": max(len(jax.tree.leaves(stage)) for stage in self._state.stages),
            "dispatched": scale * statistics.median(dispatched[WARM_UP_CALLS:]),
            "done": scale * statistics.median(done[WARM_UP_CALLS:]),
        }

    def costs(self, steps: int) -> dict[str, Any]:
        """Median seconds of every call over `steps` batches, and bytes of the messages."""
        batches = [self._trainer.put(batch) for batch in self._batches]
        self._state, costs = self._trainer.measured_costs(self._state, batches, steps)
        calls = costs.calls.items()
        return {
            "calls": [[stage, [x.value for x in kinds], time] for (stage, kinds), time in calls],
            "message_bytes": costs.message_bytes,
            "error_bytes": costs.error_bytes,
        }

    def digest(self) -> dict[str, str]:
        """SHA-256 of everything that training changes, by name; of the blocks held here."""
        return {
            name: hashlib.sha256(np.asarray(array).tobytes()).hexdigest()
            for name, array in self._trainer.to_arrays(self._state).items()
        }


def link(sizes: list[int], repeats: int) -> list[float]:
    """Median seconds that messages of these bytes take to the second process and back."""
    here, there = (StageDevices.on((device,)) for device in jax.devices()[:2])
    medians = []
    for size in sizes:
        shape = {"x": jax.ShapeDtypeStruct((size,), np.uint8)}
        message = here.place({"x": np.zeros(size, np.uint8)}) if here.addressable else None
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            moved = transfer(message, shape, here, there)
            message = jax.block_until_ready(transfer(moved, shape, there, here))
            seconds.append(time.perf_counter() - start)
        medians.append(statistics.median(seconds[1:]))
    return medians


def devices() -> list[str]:
    """Kinds of all devices."""
    return [f"{device.platform}: {device.device_kind}" for device in jax.devices()]


def answer(runs: dict[str, Any], make: Callable[..., Any], command: str, *arguments: Any) -> Any:
    """Does one command; `runs` are those begun so far, `make` begins one."""
    if command in ("devices", "link"):
        return {"devices": devices, "link": link}[command](*arguments)
    name, *others = arguments
    if command == "build":
        runs[name] = make(*others)
        return None
    return getattr(runs[name], command)(*others)


def serve(initialize: Callable[..., Any], make: Callable[..., Any]) -> None:
    """Answers commands until there are no more."""
    # Whatever else prints on standard output goes to standard error.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    arguments = json.loads(sys.argv[1])
    if arguments:
        initialize(**arguments)
    runs: dict[str, Any] = {}
    for line in sys.stdin:
        print(json.dumps(answer(runs, make, *json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    serve(distributed.initialize, Run)
