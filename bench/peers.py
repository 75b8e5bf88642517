"""A training step of ours against the same step in plain PyTorch.

    python bench/peers.py --output runs/peers.json
    python bench/peers.py --device cuda --width 1 --projector 2048-2048-2048

VGG-8 in DeInfoReg's layout, trained by DeInfoReg with LARS and by BP with SGD and momentum, on one
batch that is on the device beforehand:

    jdecouple   all blocks in one compiled call
    eager       `peers_torch.py`, NCHW
    compiled    the same under `torch.compile`

All begin from the same weights; if the losses of the first step differ by more than 1e-3 (relative,
1e-2 on GPUs) the exit code is 1. The set-ups take turns in one process, and a segment is timed from
its first dispatch until all its work is done, so that its median ratios are those of neighbours.
"Processor" is the time that all threads of the process spent: on a CPU that others share it tells
more than the time that passed. On a CPU the process is pinned to the first --threads cores.

Needs PyTorch: pip install 'jdecouple[bench]'.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from common import Spread, describe, heading, save, table
from flax import nnx
from peers_torch import Peer, configure, torch

import jdecouple as jd
from jdecouple.models import layers
from jdecouple.models.vgg import LAYOUTS

SET_UPS = ("jdecouple", "eager", "compiled")
METHODS = {"deinforeg": 0.2, "bp": 0.05}  # learning rates
NUM_CLASSES = 10
IMAGE_SIZE = 32
WARM_UP = 2
PAUSE = 0.05  # seconds, in which threads that spin for more work give up
TOLERANCE = {"cpu": 1e-3, "cuda": 1e-2}


class SetUp(Protocol):
    """What is measured."""

    def run(self, steps: int) -> float:
        """Trains, waits for all work, and returns the last loss."""
        ...


class Ours:
    """A trainer with its state, and a batch that is on the device."""

    def __init__(self, method: str, options: dict[str, Any], batch: dict[str, np.ndarray]):
        rate = METHODS[method]
        model = jd.models.vgg8(NUM_CLASSES, width=options["width"], rngs=nnx.Rngs(0))
        heads = {"projector": options["projector"]} if method == "deinforeg" else {}
        optimizer = jd.optim.sgd(rate, momentum=0.9) if method == "bp" else jd.optim.lars(rate)
        self._trainer = jd.Trainer(
            model,
            jd.methods.get(method, **heads),
            optimizer,
            mesh=jd.make_mesh(devices=jax.devices()[:1]),
            example=batch,
            num_classes=NUM_CLASSES,
        )
        self._state = self._trainer.init()
        self._batch = self._trainer.put(batch)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All state by name, on the host."""
        return {name: np.asarray(v) for name, v in self._trainer.to_arrays(self._state).items()}

    def run(self, steps: int) -> float:
        """Trains, waits for all work, and returns the last loss."""
        for _ in range(steps):
            self._state, metrics = self._trainer.step(self._state, self._batch)
        self._trainer.wait(self._state)
        return float(metrics["loss"])


def build(method: str, options: dict[str, Any], names: Sequence[str]) -> dict[str, SetUp]:
    """The set-ups, with equal weights."""
    rng = np.random.default_rng(0)
    size = options["batch"]
    batch = {
        "x": rng.normal(size=(size, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32),
        "label": rng.integers(0, NUM_CLASSES, size).astype(np.int32),
    }
    ours = Ours(method, options, batch)
    blocks = [
        [each if each == "M" else layers.scaled(int(each), options["width"]) for each in block]
        for block in (text.split(",") for text in LAYOUTS["deinforeg"].split("|"))
    ]
    set_ups: dict[str, SetUp] = {"jdecouple": ours}
    for name in names:
        peer = Peer(
            method,
            blocks,
            [int(each) for each in options["projector"].split("-")],
            batch,
            num_classes=NUM_CLASSES,
            learning_rate=METHODS[method],
            device=options["device"],
            compiled=name == "compiled",
        )
        peer.load(ours.arrays())
        set_ups[name] = peer
    return set_ups


def segment(set_up: SetUp, steps: int) -> dict[str, float]:
    """One measurement: "ms" and "processor_ms" of a step, and the last loss."""
    time.sleep(PAUSE)
    start, processor = time.perf_counter(), time.process_time()
    loss = set_up.run(steps)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    return {"ms": 1e3 * seconds / steps, "processor_ms": 1e3 * processor / steps, "loss": loss}


def measure(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Lets the set-ups take turns.

    Returns:
        By set-up: "first" (the first step, with compilation) and "segments".
    """
    set_ups = build(method, options, options["peers"])
    found: dict[str, Any] = {}
    for name, set_up in set_ups.items():
        found[name] = {"first": segment(set_up, 1), "segments": []}
        set_up.run(WARM_UP)
    for repeat in range(options["repeats"]):
        for name, set_up in set_ups.items():
            each = segment(set_up, options["steps"])
            found[name]["segments"].append(each)
            print(f"{method} {repeat + 1}: {name}, {each['ms']:.1f} ms a step", file=sys.stderr)
    return found


def compare(method: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """What the segments say: times, and ratios of neighbours."""
    results = []
    for name, each in found.items():
        mine, ours = each["segments"], found["jdecouple"]["segments"]
        result = {"method": method, "set_up": name, "first_loss": each["first"]["loss"]}
        result["first_seconds"] = each["first"]["ms"] / 1e3
        for what in ("ms", "processor_ms"):
            result[what] = Spread.of(segment[what] for segment in mine)
            result[f"ours_over_{what}"] = Spread.of(
                a[what] / b[what] for a, b in zip(ours, mine, strict=True)
            )
        results.append(result)
    return results


def report(options: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    shown = ", ".join(f"{k} {v}" for k, v in options.items() if not isinstance(v, list))
    header = ("method", "set-up", "ms a step", "processor ms", "ours / its", "of processor ms")
    header = (*header, "first step s", "first loss")
    rows = []
    for each in results:
        peer = each["set_up"] != "jdecouple"
        rows.append(
            (
                each["method"],
                each["set_up"],
                each["ms"].show(),
                each["processor_ms"].show(),
                each["ours_over_ms"].show(2) if peer else "",
                each["ours_over_processor_ms"].show(2) if peer else "",
                f"{each['first_seconds']:.1f}",
                f"{each['first_loss']:.6f}",
            )
        )
    return f"{shown}; medians (lowest to highest)\n\n{table(header, rows)}"


def agree(results: list[dict[str, Any]], tolerance: float) -> bool:
    """Whether the first losses of each method are equal but for rounding."""
    for method in {each["method"] for each in results}:
        losses = [each["first_loss"] for each in results if each["method"] == method]
        if not max(losses) - min(losses) <= tolerance * abs(losses[0]):
            return False
    return True


def parse() -> argparse.Namespace:
    cores = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=float, default=0.25, help="factor on all channels")
    parser.add_argument("--projector", default="512-512-512", help="widths of its layers")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--peers", nargs="+", choices=SET_UPS[1:], default=list(SET_UPS[1:]))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=len(cores), help="of PyTorch, and cores")
    parser.add_argument("--steps", type=int, default=5, help="steps of a segment")
    parser.add_argument("--repeats", type=int, default=9, help="segments of each set-up")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if min(options.steps, options.repeats) < 1:
        parser.error("--steps and --repeats must be at least 1")
    if options.batch < 2:
        parser.error(f"--batch is {options.batch}: at least 2 is needed")
    if not 1 <= options.threads <= len(cores):
        parser.error(f"--threads is {options.threads}: 1 to {len(cores)} is allowed")
    if not all(each.isdecimal() and int(each) for each in options.projector.split("-")):
        parser.error(f"--projector is {options.projector}: widths as in 512-512-512 are needed")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda: this PyTorch finds no GPU")
    return options


def main() -> int:
    options = vars(parse())
    output, device = options.pop("output"), options["device"]
    if device == "cpu":  # before XLA counts the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options["threads"]])
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory, too
    jax.config.update("jax_platforms", device)
    configure(device, options["threads"])
    setup = {**describe(), "devices": [jax.devices()[0].device_kind]}
    setup["versions"]["torch"] = metadata.version("torch")
    found = {method: measure(method, options) for method in options["methods"]}
    results = [row for method in found for row in compare(method, found[method])]
    print(heading(setup))
    print(report(options, results))
    if output:
        save(output, {"setup": setup, "options": options, "found": found, "results": results})
    if agree(results, TOLERANCE[device]):
        return 0
    print("the first losses differ: the set-ups do not do the same work", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
