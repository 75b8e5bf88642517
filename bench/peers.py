"""A training step of ours against the same step in plain PyTorch.

    python bench/peers.py --output runs/peers.json
    python bench/peers.py --device cuda --width 1 --projector 2048-2048-2048

VGG-8 in DeInfoReg's layout, trained by DeInfoReg with LARS and by BP with SGD and momentum, on one
batch that is on the device beforehand:

    jdecouple   all blocks in one compiled call
    eager       `peers_torch.py`, NCHW
    compiled    the same under `torch.compile`

All begin from the same weights; if the losses of the first step differ by more than 1e-3 (relative,
1e-2 on GPUs) the exit code is 1. The set-ups take turns in one process; a segment is timed from its
first dispatch until all its work is done. "Processor" is the time of all threads: on a CPU that
others share it tells more. On a CPU the process is pinned to the first --threads cores.

Needs PyTorch: pip install 'jdecouple[bench]'.
"""

import functools
import os
import re
import sys
from argparse import Namespace
from importlib import metadata
from typing import Any

import jax
import numpy as np
import runner
from flax import nnx
from peers_torch import Peer, configure, torch
from runner import Columns, Spread
from worker import Repeated, timed

import jdecouple as jd
from jdecouple.models import layers
from jdecouple.models.vgg import LAYOUTS

OURS, PEERS = "jdecouple", ("eager", "compiled")
METHODS = {"deinforeg": 0.2, "bp": 0.05}  # learning rates
NUM_CLASSES = 10
IMAGE_SIZE = 32
WARM_UP = 2
TOLERANCE = {"cpu": 1e-3, "cuda": 1e-2}


def build(method: str, options: dict[str, Any]) -> dict[str, Repeated | Peer]:
    """The set-ups, with equal weights."""
    rng, rate, size = np.random.default_rng(0), METHODS[method], options["batch"]
    batch = {
        "x": rng.normal(size=(size, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32),
        "label": rng.integers(0, NUM_CLASSES, size).astype(np.int32),
    }
    heads = {"projector": options["projector"]} if method == "deinforeg" else {}
    trainer = jd.Trainer(
        jd.models.vgg8(NUM_CLASSES, width=options["width"], rngs=nnx.Rngs(0)),
        jd.methods.get(method, **heads),
        jd.optim.sgd(rate, momentum=0.9) if method == "bp" else jd.optim.lars(rate),
        mesh=jd.make_mesh(devices=jax.devices()[:1]),
        example=batch,
        num_classes=NUM_CLASSES,
    )
    ours = Repeated(trainer, batch)
    set_ups: dict[str, Repeated | Peer] = {OURS: ours}
    for name in options["peers"]:
        set_ups[name] = peer = Peer(
            method,
            [
                [x if x == "M" else layers.scaled(int(x), options["width"]) for x in block]
                for block in (text.split(",") for text in LAYOUTS["deinforeg"].split("|"))
            ],
            [int(width) for width in options["projector"].split("-")],
            batch,
            num_classes=NUM_CLASSES,
            learning_rate=rate,
            device=options["device"],
            compiled=name == "compiled",
        )
        arrays = trainer.to_arrays(ours.state).items()
        peer.load({name: np.asarray(array) for name, array in arrays})
    return set_ups


def measure(method: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Lets the set-ups take turns: times, and ratios of neighbours."""
    set_ups, first = build(method, options), {}
    for name, set_up in set_ups.items():  # compiles
        first[name] = timed(set_up, 1)
        set_up.run(WARM_UP)
    arms = {(method, x): functools.partial(timed, set_ups[x], options["steps"]) for x in set_ups}
    segments_of = runner.turns(arms, options["repeats"])
    ours = segments_of[method, OURS]
    return [
        {
            "method": method,
            "set_up": name,
            "first_loss": first[name]["loss"],
            "first_seconds": first[name]["ms"] / 1e3,
            **{key: Spread.of(x[key] for x in segments) for key in ("ms", "processor_ms")},
            "ours_over_ms": runner.ratios(ours, segments),
            "ours_over_processor_ms": runner.ratios(ours, segments, "processor_ms"),
            "segments": segments,
        }
        for (_, name), segments in segments_of.items()
    ]


COLUMNS: Columns = {
    "method": lambda result: result["method"],
    "set-up": lambda result: result["set_up"],
    "ms a step": lambda result: result["ms"].show(),
    "processor ms": lambda result: result["processor_ms"].show(),
    "ours / its": lambda r: r["ours_over_ms"].show(2),
    "of processor ms": lambda r: r["ours_over_processor_ms"].show(2),
    "first step s": lambda result: f"{result['first_seconds']:.1f}",
    "first loss": lambda result: f"{result['first_loss']:.6f}",
}


def agree(results: list[dict[str, Any]], tolerance: float) -> bool:
    """Whether the first losses of each method are equal but for rounding."""
    ours = {x["method"]: x["first_loss"] for x in results if x["set_up"] == OURS}
    return all(abs(x["first_loss"] / ours[x["method"]] - 1) <= tolerance for x in results)


def parse() -> Namespace:
    cores = len(runner.cores())
    parser = runner.flags(__doc__)
    parser.add_argument(
        "--width", type=runner.at_least(0.01), default=0.25, help="factor on channels"
    )
    parser.add_argument("--projector", default="512-512-512", help="widths of its layers")
    parser.add_argument("--batch", type=runner.count, default=128, help="at least 2 examples")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=runner.count, default=cores, help="of PyTorch, and cores")
    parser.add_argument("--steps", type=runner.count, default=5, help="steps of a segment")
    parser.add_argument("--repeats", type=runner.count, default=9, help="segments of each set-up")
    options = parser.parse_args()
    if options.threads > cores:
        parser.error(f"--threads is {options.threads}: 1 to {cores} is allowed")
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", options.projector):
        parser.error(f"--projector is {options.projector}: widths as in 512-512-512 are needed")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda: this PyTorch finds no GPU")
    return options


def main() -> int:
    options = vars(parse())
    output, device = options.pop("output"), options["device"]
    if device == "cpu":  # before XLA counts the cores
        os.sched_setaffinity(0, runner.cores()[: options["threads"]])
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory, too
    jax.config.update("jax_platforms", device)
    configure(device, options["threads"])
    setup = runner.describe(devices=[jax.devices()[0].device_kind])
    setup["versions"]["torch"] = metadata.version("torch")
    results = [result for method in options["methods"] for result in measure(method, options)]
    text = f"{runner.options_line(options, 'peers.py')}\n{runner.columns(COLUMNS, results)}"
    runner.publish(setup, text, output, options=options, results=results)
    if agree(results, TOLERANCE[device]):
        return 0
    print("the first losses differ: the set-ups do not do the same work", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
