"""Memory and time of a training step in one program, by method and number of modules.

    python bench/memory.py --nets resnet110 --modules 1 2 4 8 16 --output runs/memory.json
    python bench/memory.py --nets resnet110 --rows bp bp,blocks greedy_exit --limit 1024

A module is a run of equal numbers of blocks, each of which has its own loss under a local method. A
row is METHOD or METHOD,REMAT. "Temporaries" are what the compiled program needs beside the state
and the batch, by XLA's own count; "of bp" is their share of backpropagation's in the same net.
`--limit` finds the largest batch, in steps of 8, whose whole memory is at most so many MiB.
`--repeats` also times steps, turn by turn; by default nothing runs.
"""

import functools
import itertools
import sys
import time
from argparse import Namespace
from typing import Any

import jax
import numpy as np
import runner
from flax import nnx
from runner import Columns, Spread

import jdecouple as jd

MIB = 2**20
IMAGE_SIZE, NUM_CLASSES = 32, 10
VGG8 = "128|128|128|256,M|256|512,M|512|512,M|512,M"  # a convolution a block
NETS = {
    "resnet110": lambda width, rngs: jd.models.resnet(10, depth=110, width=width, rngs=rngs),
    "resnet20": lambda width, rngs: jd.models.resnet(10, depth=20, width=width, rngs=rngs),
    "vgg8": lambda width, rngs: jd.models.vgg(10, blocks=VGG8, width=width, rngs=rngs),
}
ROWS = (
    "bp",
    "bp,elementwise",
    "bp,blocks",
    "greedy_exit",
    "early_exit",
    "dgl",
    "predsim",
    "infopro",
    "deinforeg",
)
NOTHING: dict[str, dict] = {"carries": {}, "residuals": {}, "errors": {}}


def modules(model: jd.Model, count: int) -> jd.Model:
    """The model with its blocks in `count` runs."""
    parts = np.array_split(range(len(model.blocks)), count)
    return model.cut([0, *np.cumsum([len(part) for part in parts[:-1]]).tolist()])


class Step:
    """The compiled step of a training, and its arguments; the trainer itself is let go."""

    def __init__(self, trainer: Any, data: dict):
        executor = trainer._engine._executor
        self._states, self._parts = trainer.init().stages.arrays, trainer.put(data).parts
        self._ids = executor.step_ids(executor.calls, 0)
        given = self._states, NOTHING, self._parts, self._ids
        self._compiled = executor._fused.lower(*given).compile()

    def bytes(self) -> dict[str, float]:
        """What it needs beside state and batch, "temporaries", and the "whole" of it."""
        found = self._compiled.memory_analysis()
        whole = found.temp_size_in_bytes + found.argument_size_in_bytes + found.output_size_in_bytes
        whole -= found.alias_size_in_bytes
        return {"temporaries": found.temp_size_in_bytes, "whole": whole}

    def timed(self) -> dict[str, float]:
        """Takes one more step: its "ms"."""
        start = time.perf_counter()
        given = self._states, NOTHING, self._parts, self._ids
        self._states, _, _, self._ids = jax.block_until_ready(self._compiled(*given))
        return {"ms": 1e3 * (time.perf_counter() - start)}


def build(row: str, net: str, count: int, batch: int, options: Namespace) -> Step:
    """The step of a row, one program, on batches of that size."""
    name, _, remat = row.partition(",")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)
    data = {"x": x, "label": rng.integers(0, NUM_CLASSES, batch).astype(np.int32)}
    own = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
    own |= {"head_pool": options.head_pool}
    if name == "deinforeg":
        own["projector"] = options.projector
    arguments = jd.methods.arguments(name)
    model = NETS[net](options.width, nnx.Rngs(0))
    trainer = jd.Trainer(
        modules(model, count) if count else model,
        jd.methods.get(name, **{key: own[key] for key in own if key in arguments}),
        jd.optim.sgd(0.01, momentum=0.9),
        mesh=jd.make_mesh(devices=jax.devices()[:1]),
        example=data,
        num_classes=NUM_CLASSES,
        remat=remat or "auto",
    )
    return Step(trainer, data)


def largest_batch(limit: float, whole: Any) -> int:
    """Largest batch, in steps of 8, for which `whole(batch)` is at most `limit`."""
    low, high = whole(64), whole(128)
    batch = (
        int(64 + 64 * (limit - low) / (high - low)) // 8 * 8
    )  # memory is linear, but for padding
    while batch > 8 and whole(batch) > limit:
        batch -= 8
    while whole(batch + 8) <= limit:
        batch += 8
    return batch


def measure(net: str, options: Namespace) -> list[dict[str, Any]]:
    """All rows of a net; those of one module are those of the whole net."""
    results: list[dict[str, Any]] = []
    arms: dict[int, Any] = {}
    for row, count in itertools.product(options.rows, options.modules):
        has_modules = row.partition(",")[0] != "bp"
        if not has_modules and count != options.modules[0]:
            continue
        count = count if has_modules else 0
        step_of = functools.partial(build, row, net, count, options=options)
        step = step_of(options.batch)
        result: dict[str, Any] = {"net": net, "row": row, "modules": count or ""} | step.bytes()
        if options.repeats:
            arms[len(results)] = step.timed
        if options.limit:
            whole = functools.cache(lambda batch, step_of=step_of: step_of(batch).bytes()["whole"])
            result["largest_batch"] = largest_batch(options.limit * MIB, whole)
        results.append(result)
        print(result, file=sys.stderr, flush=True)
    if options.repeats:
        for take_step in arms.values():
            take_step()
        segments = runner.turns(arms, options.repeats)
        for number, result in enumerate(results):
            result["ms"] = Spread.of(x["ms"] for x in segments[number])
            result["ratio"] = runner.ratios(segments[number], segments[0])
    for result in results:
        result["of_bp"] = result["temporaries"] / results[0]["temporaries"]
    return results


COLUMNS: Columns = {
    "net": lambda r: r["net"],
    "row": lambda r: f"`{r['row']}`",
    "modules": lambda r: r["modules"],
    "temporaries MiB": lambda r: f"{r['temporaries'] / MIB:.0f}",
    "of the first row's": lambda r: f"{r['of_bp']:.2f}",
    "whole MiB": lambda r: f"{r['whole'] / MIB:.0f}",
    "largest batch": lambda r: r.get("largest_batch", ""),
    "ms a step": lambda r: r["ms"].show() if "ms" in r else "",
    "x the first row's": lambda r: r["ratio"].show(2) if "ratio" in r else "",
}


def main() -> int:
    parser = runner.flags(__doc__)
    parser.add_argument("--nets", nargs="+", choices=tuple(NETS), default=["resnet20"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW")
    parser.add_argument("--modules", nargs="+", type=runner.count, default=[1, 2, 4, 8])
    parser.add_argument("--width", type=runner.at_least(0.01), default=1.0, help="of channels")
    parser.add_argument("--batch", type=runner.count, default=128)
    parser.add_argument("--projector", default="512-512-512", help="of deinforeg")
    parser.add_argument("--head-pool", type=runner.count, default=4, help="of its map")
    parser.add_argument("--limit", type=runner.at_least(1), help="MiB")
    parser.add_argument("--repeats", type=int, default=0, help="timed steps of every row")
    options = parser.parse_args()
    setup = runner.describe(devices=[jax.devices()[0].device_kind])
    results: list[dict[str, Any]] = []
    for net in options.nets:
        try:
            results += measure(net, options)
        except ValueError as error:  # no such method or remat, or more modules than blocks
            parser.error(str(error))
        text = f"{runner.options_line(vars(options) | {'output': None}, 'memory.py')}\n"
        runner.publish(
            setup, text + runner.columns(COLUMNS, results), options.output, results=results
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
