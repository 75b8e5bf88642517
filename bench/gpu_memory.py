"""Peak memory of a training step of every method, by the device's own statistics.

    python bench/gpu_memory.py --output memory.json
    python bench/gpu_memory.py --methods bp deinforeg --stages 8 --batch 1024

ResNet-18 on one device, a process a method and stages that are one call. "Peak" is the most that
was ever in use, the compiler's trials of kernels included; "state" is what is held between steps,
and the batch. CPUs tell neither.
"""

import json
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import runner
import worker
from flax import nnx
from runner import Columns

import jdecouple as jd

STEPS = 3
IMAGE_SIZE = 32
REMAT = "bp, remat"


def measure(name: str, options: Namespace) -> dict[str, Any]:
    """Trains for some steps; what this process's device says."""
    rng, size = np.random.default_rng(0), options.batch
    batch = {
        "x": rng.normal(size=(size, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32),
        "label": rng.integers(0, worker.NUM_CLASSES, size).astype(np.int32),
    }
    method = name.partition(",")[0]
    images = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
    own = {x: images[x] for x in images if x in jd.methods.arguments(method)}
    trainer = jd.Trainer(
        jd.models.resnet18(worker.NUM_CLASSES, width=options.width, rngs=nnx.Rngs(0)),
        jd.methods.get(method, **own),
        jd.optim.sgd(0.01, momentum=0.9),
        num_stages=options.stages,
        mesh=jd.make_mesh(devices=jax.devices()[:1]),
        example=batch,
        num_classes=worker.NUM_CLASSES,
        remat="stages" if name == REMAT else "auto",
    )
    training = worker.Repeated(trainer, batch)
    training.run(STEPS)
    statistics = jax.devices()[0].memory_stats() or {}
    return {
        "method": name,
        "peak": statistics.get("peak_bytes_in_use"),
        "state": statistics.get("bytes_in_use") if training.state else None,  # and not freed yet
        "device": jax.devices()[0].device_kind,
    }


def in_process(name: str, words: list[str]) -> dict[str, Any]:
    """`measure` in a process of its own; a failure is a result."""
    command = [sys.executable, __file__, *words, "--one", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"method": name, "peak": None, "state": None, "error": lines[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def megabytes(value: int | None) -> str:
    return "not measured" if value is None else f"{value / 1e6:.0f}"


COLUMNS: Columns = {
    "method": lambda r: r["method"],
    "peak MB": lambda r: megabytes(r["peak"]),
    "state MB": lambda r: megabytes(r["state"]),
    "failed": lambda r: r.get("error", ""),
}


def main() -> int:
    names = [REMAT, *jd.methods.names()]
    parser = runner.flags(__doc__)
    parser.add_argument("--methods", nargs="+", choices=names, default=names, metavar="METHOD")
    parser.add_argument("--width", type=runner.at_least(0.01), default=1.0, help="of channels")
    parser.add_argument("--batch", type=runner.count, default=128)
    parser.add_argument("--stages", type=runner.count, default=4)
    parser.add_argument("--at-once", type=runner.count, default=4, help="processes")
    parser.add_argument("--tiny", action="store_true", help="two methods at a tiny size")
    parser.add_argument("--one", choices=names, help="measure in this process, and print JSON")
    options = parser.parse_args()
    if options.tiny:
        options.methods, options.width, options.batch = ["bp", "greedy_exit"], 1 / 16, 4
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return 0
    words = [f"--{x}={getattr(options, x)}" for x in ("width", "batch", "stages")]
    results: list[dict[str, Any]] = []
    with ThreadPoolExecutor(options.at_once) as pool:
        for result in pool.map(lambda name: in_process(name, words), options.methods):
            results.append(result)  # published at once, as this process may be stopped
            kinds = [x["device"] for x in results if "device" in x][:1]
            text = f"ResNet-18, {' '.join(words)}\n\n{runner.columns(COLUMNS, results)}"
            runner.publish(runner.describe(devices=kinds), text, options.output, results=results)
    if failed := [f"{x['method']}: {x['error']}" for x in results if "error" in x]:
        print("; ".join(failed), file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
