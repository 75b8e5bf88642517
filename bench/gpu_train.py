"""Accuracy on CIFAR-10 after equal times of training, by deinforeg and by bp.

    python bench/gpu_train.py DATA --seconds 15 --output training.json

DATA is a folder with the set as TFDS prepares it, or with the folder `cifar-10-batches-py` of the
archive of its authors. VGG-8 is trained for equal wall times, from the first step that is compiled
on, in batches of 128 with crops and flips; deinforeg by LARS, bp by Adam, at a constant learning
rate. Images are decoded beforehand, and epochs are shuffled.

The exit code is 77 if data or a library that reads them is not there.
"""

import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import runner
import worker
from flax import nnx
from gpu import MISSING
from runner import Columns

import jdecouple as jd

METHODS = ("deinforeg", "bp")
BATCH, TEST_BATCH = 128, 500
AT_ONCE = 20  # steps between looks at the clock


def load(folder: Path) -> jd.data.ImageDataset:
    """CIFAR-10, decoded."""
    if (archive := folder / "cifar-10-batches-py").is_dir():
        parts = [unpickled(archive / f"data_batch_{i}") for i in range(1, 6)]
        train = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        test = unpickled(archive / "test_batch")
    else:
        dataset = jd.data.load("cifar10", data_dir=folder, validation=0.02)
        train, test = (
            tuple(split.gather(np.arange(len(split))).values())
            for split in (dataset.train, dataset.test)
        )
    splits = [jd.data.from_arrays(*arrays, num_classes=10) for arrays in (train, test)]
    mean, std = jd.data.channel_statistics(splits[0])
    shape = train[0].shape[1:]
    return jd.data.ImageDataset("cifar10", splits[0], splits[1], splits[1], 10, shape, mean, std)


def unpickled(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a file of the archive."""
    values = pickle.loads(path.read_bytes(), encoding="bytes")
    images = values[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(values[b"labels"], np.int32)


def batches(split: jd.data.Split) -> Iterator[dict[str, np.ndarray]]:
    """Full batches without end, in a new order in each epoch."""
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(split))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            yield split.gather(order[start : start + BATCH])


def train(name: str, dataset: jd.data.ImageDataset, options: Any) -> dict[str, Any]:
    """Trains by a method for the time, and evaluates."""
    local = name == "deinforeg"
    heads = {"projector": options.projector} if local else {}
    stream = batches(dataset.train)
    trainer = jd.Trainer(
        jd.models.vgg8(10, width=options.width, rngs=nnx.Rngs(0)),
        jd.methods.get(name, **heads),
        jd.optim.lars(0.2) if local else jd.optim.adam(1e-3),
        mesh=jd.make_mesh(devices=jax.devices()[:1]),
        example=next(stream),
        num_classes=10,
        transform=dataset.transform("basic"),
    )
    state, steps = trainer.init(), 0
    with jd.data.Prefetcher(stream, trainer.put, depth=4) as placed:
        state, _ = trainer.step(state, next(placed))  # compiles
        trainer.wait(state)
        start = time.perf_counter()
        while time.perf_counter() - start < options.seconds:
            for _ in range(AT_ONCE):
                state, metrics = trainer.step(state, next(placed))
            trainer.wait(state)
            steps += AT_ONCE
        seconds = time.perf_counter() - start
    rows = np.arange(min(len(dataset.test), options.tests))
    parts = np.array_split(rows, -(-len(rows) // TEST_BATCH))
    accuracies = trainer.evaluate(state, map(dataset.test.gather, parts))
    exits = [accuracies[x] for x in accuracies if x.endswith("/accuracy")]
    return {
        "method": name,
        "seconds": seconds,
        "steps": steps,
        "examples_per_second": steps * BATCH / seconds,
        "loss": float(metrics["loss"]),
        "accuracy": accuracies["accuracy"],
        "best_exit": max([*exits, accuracies["accuracy"]]),
    }


COLUMNS: Columns = {
    "method": lambda r: r["method"],
    "seconds": lambda r: f"{r['seconds']:.1f}",
    "steps": lambda r: r["steps"],
    "examples a second": lambda r: f"{r['examples_per_second']:.0f}",
    "training loss": lambda r: f"{r['loss']:.4f}",
    "test accuracy": lambda r: f"{r['accuracy']:.2%}",
    "best exit on the test set": lambda r: f"{r['best_exit']:.2%}",
}


def main() -> int:
    parser = runner.flags(__doc__)
    parser.add_argument("data", type=Path, nargs="?", help="folder with CIFAR-10")
    parser.add_argument("--seconds", type=runner.at_least(0.01), default=15.0, help="of a method")
    parser.add_argument("--width", type=runner.at_least(0.01), default=1.0, help="of channels")
    parser.add_argument("--projector", default="2048-2048-2048", help="widths of its layers")
    parser.add_argument("--tests", type=runner.count, default=10_000, help="test examples")
    parser.add_argument("--tiny", action="store_true", help="a tiny net, for a moment")
    options = parser.parse_args()
    if options.tiny:
        options.seconds, options.width, options.projector, options.tests = 0.1, 1 / 16, "8-8", 64
    if options.data is None or not options.data.is_dir():
        print(f"no data: {options.data or 'no folder was given'}", file=sys.stderr)
        return MISSING
    try:
        dataset = load(options.data)
    except (ImportError, ValueError, OSError) as error:
        print(f"no data: {str(error).splitlines()[0]}", file=sys.stderr)
        return MISSING
    setup = runner.describe(devices=worker.devices())
    results = [train(name, dataset, options) for name in METHODS]
    text = f"VGG-8, {options.seconds:g} s of training\n\n{runner.columns(COLUMNS, results)}"
    runner.publish(setup, text, options.output, results=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
