"""Host time to dispatch one stage's call, by the number of arrays in its state, joined or not.

    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 python bench/dispatch.py

Two stages of one tiny dense layer. `devices`: a device each (of one process), messages moved by
`device_put`; `apart`: both on one device; `fused`: one call for both, divided by two. Nothing is in
flight before a step. The trainers with joined arrays and with single ones take turns in one
process. Microseconds a stage, medians (lowest to highest) of the segments' medians: until the call
returns, and until its batch is trained on. `bare` is a compiled call alone, which adds one to as
many arrays as a stage's call takes and gives where all are joined.
"""

import statistics
import sys
import time
from unittest import mock

import jax
import numpy as np
import rows
import runner
from rows import APART, TOGETHER
from runner import Spread
from worker import Run

from jdecouple.pipeline.mpmd import flat_state

NET = {"model": "arrays", "depth": 2, "batch": 8, "head": 0}
ARRAYS = 5  # state, three of a carry, and numbers of microbatches or metrics
PLACES = {"devices": "", "apart": f",{APART}", "fused": f",{TOGETHER}"}


def build(arrays: int, method: str, place: str, joins: bool) -> Run:
    """A run of stages with so many arrays of state, which are joined or not."""
    row = rows.parse(f"{method},K=2{PLACES[place]}")
    limits = flat_state.STAGE_BYTES if joins else {}
    with mock.patch.object(flat_state, "STAGE_BYTES", limits):
        return Run(NET | {"hidden": arrays} | row.options())


def bare(calls: int) -> dict[str, float]:
    """Median microseconds of a compiled call with the arrays of a stage, and nothing around it."""
    call = jax.jit(lambda *arrays: tuple(array + 1 for array in arrays))
    given = [jax.device_put(np.zeros(310, np.float32)) for _ in range(ARRAYS)]
    dispatched, done = [], []
    for _ in range(calls + 1):
        start = time.perf_counter()
        out = call(*given)
        dispatched.append(time.perf_counter() - start)
        jax.block_until_ready(out)
        done.append(time.perf_counter() - start)
    medians = (statistics.median(seconds[1:]) for seconds in (dispatched, done))
    return {
        "arrays": ARRAYS,
        **dict(zip(("dispatched", "done"), (1e6 * x for x in medians), strict=True)),
    }


def main() -> int:
    parser = runner.flags(__doc__)
    parser.add_argument("--arrays", nargs="+", type=runner.count, default=[8, 64, 256])
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--method", default="deinforeg")
    parser.add_argument("--calls", type=runner.count, default=200, help="of a segment")
    parser.add_argument("--repeats", type=runner.count, default=7, help="segments of each")
    options = vars(parser.parse_args())
    if "devices" in options["places"] and len(jax.devices()) < 2:
        parser.error(f"--places devices needs 2 devices, JAX has {len(jax.devices())}")
    try:
        rows.parse(f"{options['method']},K=2")
    except ValueError as error:
        parser.error(str(error))
    lines, results = [], []
    start = time.perf_counter()
    for place in options["places"]:
        for arrays in options["arrays"]:
            runs = {x: build(arrays, options["method"], place, x) for x in (False, True)}
            segments: dict[bool, list[dict[str, float]]] = {False: [], True: []}
            for _ in range(options["repeats"]):
                for joins, run in runs.items():
                    segments[joins].append(run.dispatch(options["calls"]))
            spreads = [
                Spread.of(segment[name] for segment in segments[joins])
                for joins in runs
                for name in ("dispatched", "done")
            ]
            results.append({"place": place, "arrays": arrays, "segments": list(segments.values())})
            lines.append([place, arrays, *(spread.show(0) for spread in spreads)])
            print(*lines[-1], sep=" | ", file=sys.stderr)
    segments = {True: [bare(options["calls"]) for _ in range(options["repeats"])]}
    spreads = [Spread.of(x[name] for x in segments[True]) for name in ("dispatched", "done")]
    results.append({"place": "bare", "arrays": ARRAYS, "segments": list(segments.values())})
    lines.append(["bare", ARRAYS, "", "", *(spread.show(0) for spread in spreads)])
    header = ["place", "arrays of a stage", "single: dispatched", "done", "joined: dispatched"]
    text = runner.table([*header, "done"], lines)
    values = {"results": results, "seconds": time.perf_counter() - start}
    output = options.pop("output")
    runner.publish(runner.describe(), text, output, options=options, **values)
    return 0


if __name__ == "__main__":
    sys.exit(main())
