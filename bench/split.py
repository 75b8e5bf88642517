"""What a backward costs in two parts: the input gradient, and the weight gradient.

    python bench/split.py --output runs/split.json

Three stages on one core train by 1f1b and by zb_h1 in turns, every call alone. Columns, of one
microbatch at the stage in the middle, in ms:

    forward        F
    whole          the backward of 1f1b
    input          B of zb_h1, whose error leaves at its end
    weight         W
    split / whole  B and W together over the whole
    for backward   MiB that wait for the backward, weights among them, which have no copies
    for weight     MiB that wait from B to W
"""

import functools
import statistics
import sys
from argparse import Namespace
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import runner
from flax import nnx
from runner import Columns, Spread

import jdecouple as jd
from jdecouple.methods.routes.splitting import defer
from jdecouple.pipeline.memory import num_bytes
from jdecouple.schedules import Kind

MIB = 2**20
STAGES, MIDDLE, MICROBATCHES, NUM_CLASSES = 3, 1, 4, 10
NETS = {
    "vgg8": lambda rngs: jd.models.vgg8(num_classes=NUM_CLASSES, width=0.25, rngs=rngs),
    "mlp": lambda rngs: jd.models.mlp(
        NUM_CLASSES, input_size=1024, hidden=1024, depth=20, rngs=rngs
    ),
}
SHAPES = {"vgg8": (32, 32, 3), "mlp": (1024,)}
CALLS = {
    "forward": ("zb_h1", (Kind.FORWARD,)),
    "whole": ("1f1b", (Kind.BACKWARD,)),
    "input": ("zb_h1", (Kind.BACKWARD,)),
    "weight": ("zb_h1", (Kind.WEIGHT,)),
}


def build(net: str, remat: str, schedule: str, batch: dict[str, np.ndarray]) -> jd.Trainer:
    """A trainer whose stages are calls apart, on one device."""
    return jd.Trainer(
        NETS[net](nnx.Rngs(0)),
        jd.methods.get("bp"),
        jd.optim.sgd(0.01, momentum=0.9),
        num_stages=STAGES,
        microbatches=MICROBATCHES,
        schedule=schedule,
        mesh=jd.make_mesh(devices=jax.devices()[:1]),
        fuse=False,
        remat=remat,
        example=batch,
    )


def waiting(trainer: jd.Trainer) -> dict[str, int]:
    """Bytes of a microbatch that wait at the stage in the middle for the backward, and for W."""
    stage, route = trainer.stages[MIDDLE], trainer.method.route
    state, step_id = jax.eval_shape(stage.initial), jax.ShapeDtypeStruct((2,), jnp.int32)
    forward = functools.partial(route.forward, stage)
    _, _, residuals, sent = jax.eval_shape(forward, state, stage.carry, step_id)
    backward = functools.partial(defer, functools.partial(route.backward, stage))
    _, later = jax.eval_shape(backward, state, residuals, sent["x"], step_id)
    leaves = {"for_backward": residuals, "for_weight": later}
    return {name: num_bytes(tree) for name, tree in leaves.items()}


def measure(net: str, remat: str, options: Namespace) -> dict[str, Any]:
    """The row of a net."""
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(options.batch, *SHAPES[net])).astype(np.float32),
        "label": rng.integers(0, NUM_CLASSES, options.batch).astype(np.int32),
    }
    trainers = {name: build(net, remat, name, batch) for name in ("1f1b", "zb_h1")}
    states = {name: trainer.init() for name, trainer in trainers.items()}

    def turn(name: str) -> dict[str, Any]:
        states[name], found = trainers[name].measure(states[name], batch)
        times: dict[Any, list[float]] = defaultdict(list)
        for call, seconds in found:
            if call.stage == MIDDLE:
                times[call.kinds].append(1e3 * seconds)
        medians = {kinds: statistics.median(own) for kinds, own in times.items()}
        return {"ms": 1e3 * sum(seconds for _, seconds in found), "calls": medians}

    arms = {name: functools.partial(turn, name) for name in trainers}
    runner.turns(arms, 1)  # compiles
    segments = runner.turns(arms, options.repeats)
    row = {
        name: [segment["calls"][kinds] for segment in segments[schedule]]
        for name, (schedule, kinds) in CALLS.items()
    }
    both = zip(row["input"], row["weight"], row["whole"], strict=True)
    row["ratio"] = [(now + later) / whole for now, later, whole in both]
    spreads = {name: Spread.of(values) for name, values in row.items()}
    return {"net": net, "remat": remat, **spreads, **waiting(trainers["zb_h1"])}


COLUMNS: Columns = {
    "net": lambda r: r["net"],
    "remat": lambda r: r["remat"],
    "forward": lambda r: r["forward"].show(),
    "whole": lambda r: r["whole"].show(),
    "input": lambda r: r["input"].show(),
    "weight": lambda r: r["weight"].show(),
    "split / whole": lambda r: r["ratio"].show(2),
    "for backward": lambda r: f"{r['for_backward'] / MIB:.1f}",
    "for weight": lambda r: f"{r['for_weight'] / MIB:.1f}",
}


def main() -> int:
    parser = runner.flags(__doc__)
    parser.add_argument("--nets", nargs="+", choices=tuple(NETS), default=list(NETS))
    parser.add_argument("--remats", nargs="+", default=["elementwise", "none"], metavar="REMAT")
    parser.add_argument("--batch", type=runner.count, default=512)
    parser.add_argument("--repeats", type=runner.count, default=9)
    options = parser.parse_args()
    setup = runner.describe(devices=[jax.devices()[0].device_kind])
    with runner.pinned(runner.cores()[:1]):
        rows = [measure(net, remat, options) for net in options.nets for remat in options.remats]
    text = f"{runner.options_line(vars(options) | {'output': None}, 'split.py')}\n"
    runner.publish(setup, text + runner.columns(COLUMNS, rows), options.output, results=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
