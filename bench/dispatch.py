"""Host time to dispatch one stage's call, by the number of arrays in its state, joined or not.

    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 python bench/dispatch.py

Two stages of one tiny dense layer. `devices`: a device each (of one process), messages moved by
`device_put`; `apart`: both on one device; `fused`: one call for both, divided by two. Nothing is in
flight before a step. The trainers with joined arrays and with single ones take turns in one
process. Microseconds a stage, medians (lowest to highest) of the segments' medians: until the call
returns, and until its batch is trained on.
"""

import sys
import time
from typing import Any
from unittest import mock

import jax
import runner
from runner import Spread
from worker import Run

from jdecouple.pipeline.mpmd import flat_state

BATCH, STAGES = 8, 2
PLACES: dict[str, dict[str, Any]] = {
    "devices": {"groups": 2, "fuse": None},
    "apart": {"groups": 1, "fuse": False},
    "fused": {"groups": 1, "fuse": True},
}


def build(arrays: int, method: str, place: str, joins: bool) -> Run:
    """A run of stages with so many arrays of state, which are joined or not."""
    options = {
        "model": "arrays",
        "hidden": arrays,
        "depth": STAGES,
        "batch": BATCH,
        "head": 0,
        "method": method,
        "stages": STAGES,
        "data": 1,
        "chunk": 1,
        "microbatches": 1,
        "schedule": "auto",
        "engine": "mpmd",
        **PLACES[place],
    }
    limits = flat_state.STAGE_BYTES if joins else {}
    with mock.patch.object(flat_state, "STAGE_BYTES", limits):
        return Run(options)


def segment(run: Run, calls: int) -> dict[str, float]:
    """Median microseconds of a stage, "dispatched" and "done", after some calls to warm up."""
    found = run.dispatch(calls)
    return {name: found[name] for name in ("dispatched", "done")}


def main() -> int:
    parser = runner.flags(__doc__)
    parser.add_argument("--arrays", nargs="+", type=runner.count, default=[8, 64, 256])
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--method", default="deinforeg")
    parser.add_argument("--calls", type=runner.count, default=200, help="of a segment")
    parser.add_argument("--repeats", type=runner.count, default=7, help="segments of each")
    options = vars(parser.parse_args())
    if "devices" in options["places"] and len(jax.devices()) < STAGES:
        parser.error(f"--places devices needs {STAGES} devices, JAX has {len(jax.devices())}")
    lines, results = [], []
    start = time.perf_counter()
    for place in options["places"]:
        for arrays in options["arrays"]:
            runs = {x: build(arrays, options["method"], place, x) for x in (False, True)}
            segments: dict[bool, list[dict[str, float]]] = {False: [], True: []}
            for _ in range(options["repeats"]):
                for joins, run in runs.items():
                    segments[joins].append(segment(run, options["calls"]))
            spreads = {
                (joins, name): Spread.of(one[name] for one in segments[joins])
                for joins in runs
                for name in ("dispatched", "done")
            }
            results.append({"place": place, "arrays": arrays, "segments": list(segments.values())})
            lines.append([place, arrays, *(spread.show(0) for spread in spreads.values())])
            print(*lines[-1], sep=" | ", file=sys.stderr)
    header = ["place", "arrays of a stage", "single: dispatched", "done", "joined: dispatched"]
    text = runner.table([*header, "done"], lines)
    seconds = time.perf_counter() - start
    runner.publish(
        runner.describe(),
        text,
        options.pop("output"),
        options=options,
        results=results,
        seconds=seconds,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
