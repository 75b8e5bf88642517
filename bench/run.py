"""One training of a benchmark: net, method, trainer, and what is measured of them."""

import contextlib
import ctypes
import hashlib
import itertools
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jdecouple as jd

NUM_CLASSES = 10
IMAGE_SIZE = 16  # of the vgg of equal blocks, in pixels
NAMED_SHAPE = 32, 32, 3  # images of the nets from jdecouple.models
DISTINCT_BATCHES = 4
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}


def build_model(options: dict[str, Any]) -> tuple[jd.Model, tuple[int, ...]]:
    """The net, and the shape of one of its inputs."""
    name, hidden, depth = options["model"], options["hidden"], options["depth"]
    rngs = nnx.Rngs(0)
    if name == "mlp":
        model = jd.models.mlp(NUM_CLASSES, input_size=hidden, hidden=hidden, depth=depth, rngs=rngs)
        return model, (hidden,)
    if name == "vgg":
        layout = [[hidden, hidden]] * depth
        size = {"image_size": IMAGE_SIZE, "channels": hidden}
        model = jd.models.vgg(NUM_CLASSES, blocks=layout, **size, rngs=rngs)
        return model, (IMAGE_SIZE, IMAGE_SIZE, hidden)
    size = {"image_size": NAMED_SHAPE[0], "channels": NAMED_SHAPE[-1]}
    return jd.models.get(name)(NUM_CLASSES, **size, rngs=rngs), NAMED_SHAPE


def build_method(name: str, head: int) -> jd.methods.Method:
    """A method; those with heads get small ones, one dense layer to `head` features."""
    heads: dict[str, dict] = {
        "deinforeg": {"projector": (head,)},
        "scpl": {"projector": "linear", "features": head},
    }
    return jd.methods.get(name, **heads.get(name, {}))


class Run:
    """A trainer with its state and its batches.

    Args:
        options: "model", "hidden", "depth", "batch" (global), "head", "dtype", "method",
            "schedule", "stages" (K), "microbatches" (M), "chunk" (T, by default 1); "rows" and
            "data", the shape of the mesh; "fuse", as for `Trainer`, and "in_flight", its
            `max_in_flight`, which may be missing; "input": "placed" puts the batches on the devices
            beforehand, "host" uploads each while the one before it is trained on.
    """

    def __init__(self, options: dict[str, Any]):
        model, shape = build_model(options)
        rng = np.random.default_rng(0)
        size, stages, depth = options["batch"], options["stages"], options["depth"]
        batches = [
            {
                "x": rng.normal(size=(size, *shape)).astype(np.float32),
                "label": rng.integers(0, NUM_CLASSES, size).astype(np.int32),
            }
            for _ in range(DISTINCT_BATCHES)
        ]
        self.trainer = jd.Trainer(
            model,
            build_method(options["method"], options["head"]),
            jd.optim.sgd(0.01, momentum=0.9),
            num_stages=stages,
            boundaries=[stage * depth // stages for stage in range(stages)] if depth else None,
            mesh=jd.make_mesh(options["rows"], options["data"]),
            microbatches=options["microbatches"],
            schedule=options["schedule"],
            example=batches[0],
            dtype=DTYPES[options["dtype"]],
            fuse=options["fuse"],
            max_in_flight=options.get("in_flight"),
        )
        self.state = self.trainer.init()
        self._prefetcher: jd.data.Prefetcher | None = None
        chunk = self._chunk = options.get("chunk", 1)
        cycle = itertools.cycle(batches)
        groups = [list(itertools.islice(cycle, chunk)) for _ in range(DISTINCT_BATCHES)]
        groups = groups if chunk > 1 else [batch for (batch,) in groups]
        self._train = self.trainer.steps if chunk > 1 else self.trainer.step
        if options["input"] == "host":
            source = itertools.cycle(groups)
            self._prefetcher = jd.data.Prefetcher(source, self.trainer.put)
            self.chunks: Any = self._prefetcher
        else:
            self.chunks = itertools.cycle([self.trainer.put(group) for group in groups])
        placements = self.trainer.placements
        together = all(placement.devices == placements[0].devices for placement in placements)
        calls = [call.stage for call in self.trainer.calls]
        mine = sum(placements[stage].addressable for stage in (calls if chunk == 1 else set(calls)))
        self._calls = 1 if together and options["fuse"] is None else mine

    def run(self, steps: int) -> dict[str, Any]:
        """Trains; the time runs from the first dispatch to the end of the last computation.

        Args:
            steps: batches, rounded up to whole chunks.

        Returns:
            "start" and "end" in seconds of a clock that all processes of the machine share;
            "processor", seconds of all threads; "dispatch", seconds of processor time of the one
            thread that dispatches, inside the trainer, and the "calls" that it dispatched;
            "waited", seconds without input; "losses" of every batch; "cores"; and "state" and
            "peak", see `_memory`.
        """
        found, dispatch = [], 0.0
        waited, resident = self._waited, _reset_peak()
        start, processor = time.perf_counter(), time.process_time()
        rounds = -(-steps // self._chunk)
        for _ in range(rounds):
            chunk = next(self.chunks)
            began = time.thread_time()
            self.state, metrics = self._train(self.state, chunk)
            dispatch += time.thread_time() - began
            found.append(metrics)
        self.trainer.wait(self.state)
        end, processor = time.perf_counter(), time.process_time() - processor
        losses = []
        for each in found:
            rows = {name: np.ravel(each[name]) for name in each if name.endswith("/loss")}
            losses += [
                {name: float(row[t]) for name, row in rows.items()} for t in range(self._chunk)
            ]
        return {
            "start": start,
            "end": end,
            "processor": processor,
            "dispatch": dispatch,
            "calls": rounds * self._calls,
            "waited": self._waited - waited,
            "losses": losses,
            "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [],
            **self._memory(resident),
        }

    def _memory(self, before: int | None) -> dict[str, int | None]:
        """Bytes of this process.

        Args:
            before: resident set before the batches that were trained on.

        Returns:
            "state": arrays of the state on the device that has most of them. "peak": on a GPU, the
            most that was ever in use on a device; elsewhere the state and the most that the
            resident set has grown; None where neither can be had.
        """
        held: dict[Any, int] = {}
        for leaf in jax.tree.leaves(self.state.stages):
            for shard in leaf.addressable_shards:
                held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
        counted = [device.memory_stats() or {} for device in jax.local_devices()]
        peak = max((each.get("peak_bytes_in_use", 0) for each in counted), default=0) or None
        state = max(held.values())
        highest = _resident("VmHWM")
        if peak is None and before is not None and highest is not None:
            peak = state + max(0, highest - before)
        return {"state": state, "peak": peak}

    def digest(self) -> dict[str, str]:
        """A hash of everything that training changes, by block; of the blocks held here."""
        hashes = {}
        for stage, held in zip(self.trainer.stages, self.state.stages, strict=True):
            for number, unit in enumerate(stage.units if held else ()):
                leaves = jax.tree.leaves(
                    [held[part][number] for part in ("params", "stats", "opt")]
                )
                data = b"".join(np.asarray(leaf).tobytes() for leaf in leaves)
                hashes[str(unit.index)] = hashlib.sha256(data).hexdigest()
        return hashes

    def stages(self, steps: int) -> list[list[float]]:
        """Seconds of every stage for each of `steps` batches, every call waited for."""
        found = []
        for _ in range(steps):
            seconds = [0.0] * len(self.trainer.stages)
            self.state, calls = self.trainer.measure(self.state, next(self.chunks))
            for call, time_taken in calls:
                seconds[call.stage] += time_taken
            found.append(seconds)
        return found

    def costs(self, steps: int) -> dict[str, Any]:
        """Median seconds of every call over `steps` batches, and bytes of the messages."""
        self.state, costs = self.trainer.measured_costs(self.state, self.chunks, steps)
        calls = [
            [stage, "".join(kind.value for kind in kinds), seconds]
            for (stage, kinds), seconds in costs.calls.items()
        ]
        sizes = {"message_bytes": costs.message_bytes, "error_bytes": costs.error_bytes}
        return {"calls": calls, **sizes}

    @property
    def _waited(self) -> float:
        return self._prefetcher.wait_seconds if self._prefetcher else 0.0


def _resident(name: str) -> int | None:
    """VmRSS, the resident set of this process, or VmHWM, its peak, in bytes; Linux only."""
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines)
        if name in values:
            return 1024 * int(values[name].split()[0])
    return None


def _reset_peak() -> int | None:
    """Gives back what is free, and begins VmHWM anew; the resident set, or None where it cannot."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return _resident("VmRSS")
