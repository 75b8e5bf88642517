"""A training step of ours against the same step in plain PyTorch.

    python bench/peers.py --output runs/peers.json
    python bench/peers.py --nets resnet20 vit mlp --threads 1
    python bench/peers.py --nets vgg8 resnet18 --device cuda --width 1 --batch 1024 \
        --projector 2048-2048-2048 --precision bfloat16

Every net is trained by DeInfoReg with LARS and by BP with SGD and momentum, on one batch that is on
the device beforehand:

    jdecouple   all blocks in one compiled call
    eager       `torch_nets.py` under `peers_torch.py`
    compiled    the same under `torch.compile`

VGG-8 is in DeInfoReg's layout, texts have no padding, which ours masks nevertheless, and the MLP
reads vectors of its own width. --width, --hidden and --depth change the nets that have them.

All begin from the same weights; if the losses of the first step differ by more than 1e-3 (relative;
1e-2 in TF32 and bfloat16) the exit code is 1. The set-ups take turns in one process; a segment is
timed from its first dispatch until all its work is done. "Processor" is the time of all threads: on
a CPU that others share it tells more. On a CPU the process is pinned to the first --threads cores.

Needs PyTorch: pip install 'jdecouple[bench]'.
"""

import functools
import itertools
import os
import re
import sys
from argparse import Namespace
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import runner
from flax import nnx
from peers_torch import Peer, configure, torch
from runner import Columns, Spread
from worker import Repeated, timed

import jdecouple as jd

OURS, PEERS = "jdecouple", ("eager", "compiled")
METHODS = {"deinforeg": 0.2, "bp": 0.05}  # learning rates
NUM_CLASSES = 10
IMAGE_SIZE = 32
WARM_UP = 2
# By precision, with what `jax.default_matmul_precision` calls it and the Trainer's dtype.
PRECISIONS = {
    "float32": (1e-3, "highest", None),
    "tf32": (1e-2, "tensorfloat32", None),
    "bfloat16": (1e-2, "tensorfloat32", jnp.bfloat16),
}


class Net(NamedTuple):
    """A net of the table: its builder's name and options, what it reads, and its usual batch."""

    builder: str
    options: dict[str, Any]
    reads: str = "images"  # or "texts" or "vectors"
    batch: int = 128


TEXTS = {"vocabulary_size": 10_000, "max_length": 60, "hidden": 300, "depth": 4}
NETS = {
    "vgg8": Net("vgg8", {"width": 0.25}),
    "resnet18": Net("resnet18", {"width": 0.25}),
    "resnet20": Net("resnet", {"width": 1.0, "depth": 20}),
    "wrn": Net("wide_resnet", {"depth": 16, "widen": 2}),
    "lstm": Net("lstm", TEXTS, "texts"),
    "transformer": Net("transformer", TEXTS | {"heads": 6}, "texts"),
    "vit": Net("vit", {"hidden": 192, "depth": 4, "heads": 3, "patch": 4}),
    "mlp": Net("mlp", {"hidden": 1024, "depth": 20}, "vectors", 256),
}
CHANGED = ("width", "hidden", "depth")  # by flags


def chosen(name: str, options: dict[str, Any]) -> Net:
    """A net of the table as the flags change it."""
    net = NETS[name]
    changed = {key: options[key] for key in CHANGED if options[key] and key in net.options}
    return net._replace(options=net.options | changed, batch=options["batch"] or net.batch)


def build(name: str, method: str, options: dict[str, Any]) -> dict[str, Repeated | Peer]:
    """The set-ups, with equal weights."""
    rng, rate, net = np.random.default_rng(0), METHODS[method], chosen(name, options)
    size, ours, theirs = net.batch, dict(net.options), dict(net.options)
    if net.reads == "texts":
        x = rng.integers(1, ours["vocabulary_size"], (size, ours["max_length"]), np.int32)
    elif net.reads == "vectors":
        ours["input_size"] = theirs["input_size"] = ours["hidden"]
        x = rng.normal(size=(size, ours["hidden"])).astype(np.float32)
    else:
        x = rng.normal(size=(size, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)
    batch = {"x": x, "label": rng.integers(0, NUM_CLASSES, size).astype(np.int32)}
    heads = {"projector": options["projector"]} if method == "deinforeg" else {}
    trainer = jd.Trainer(
        jd.models.get(net.builder)(NUM_CLASSES, **ours, rngs=nnx.Rngs(0)),
        jd.methods.get(method, **heads),
        jd.optim.sgd(rate, momentum=0.9) if method == "bp" else jd.optim.lars(rate),
        mesh=jd.make_mesh(devices=jax.devices()[:1]),
        example=batch,
        num_classes=NUM_CLASSES,
        dtype=PRECISIONS[options["precision"]][2],
    )
    repeated = Repeated(trainer, batch)
    set_ups: dict[str, Repeated | Peer] = {OURS: repeated}
    for peer in options["peers"]:
        set_ups[peer] = Peer(
            method,
            (net.builder, theirs),
            [int(width) for width in options["projector"].split("-")],
            batch,
            num_classes=NUM_CLASSES,
            learning_rate=rate,
            device=options["device"],
            compiled=peer == "compiled",
            precision=options["precision"],
        )
        set_ups[peer].load(trainer.to_arrays(repeated.state))
    return set_ups


def measure(name: str, method: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Lets the set-ups take turns: times, and ratios of neighbours."""
    set_ups, first = build(name, method, options), {}
    for set_up, training in set_ups.items():  # compiles
        first[set_up] = timed(training, 1)
        training.run(WARM_UP)
    arms = {
        (name, method, x): functools.partial(timed, set_ups[x], options["steps"]) for x in set_ups
    }
    segments_of = runner.turns(arms, options["repeats"])
    ours = segments_of[name, method, OURS]
    return [
        {
            "net": name,
            "method": method,
            "set_up": set_up,
            "first_loss": first[set_up]["loss"],
            "first_seconds": first[set_up]["ms"] / 1e3,
            **{key: Spread.of(x[key] for x in segments) for key in ("ms", "processor_ms")},
            "ours_over_ms": runner.ratios(ours, segments),
            "ours_over_processor_ms": runner.ratios(ours, segments, "processor_ms"),
            "segments": segments,
        }
        for (_, _, set_up), segments in segments_of.items()
    ]


COLUMNS: Columns = {
    "net": lambda result: result["net"],
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
    """Whether the first losses of each net and method are equal but for rounding."""
    ours = {(x["net"], x["method"]): x["first_loss"] for x in results if x["set_up"] == OURS}
    return all(abs(x["first_loss"] / ours[x["net"], x["method"]] - 1) <= tolerance for x in results)


def parse() -> Namespace:
    cores = len(runner.cores())
    parser = runner.flags(__doc__)
    parser.add_argument("--nets", nargs="+", choices=tuple(NETS), default=["vgg8"])
    parser.add_argument("--width", type=runner.at_least(0.01), help="factor on channels")
    parser.add_argument("--hidden", type=runner.count, help="width of MLP, LSTM, encoders")
    parser.add_argument("--depth", type=runner.count, help="layers or blocks")
    parser.add_argument("--projector", default="512-512-512", help="widths of its layers")
    parser.add_argument("--batch", type=runner.at_least(2, int), help="128; of the MLP 256")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), help="float32; TF32 on GPUs")
    parser.add_argument("--threads", type=runner.count, default=cores, help="of PyTorch, and cores")
    parser.add_argument("--steps", type=runner.count, default=5, help="steps of a segment")
    parser.add_argument("--repeats", type=runner.count, default=9, help="segments of each set-up")
    options = parser.parse_args()
    options.precision = options.precision or {"cpu": "float32", "cuda": "tf32"}[options.device]
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
    tolerance, matmul, _ = PRECISIONS[options["precision"]]
    jax.config.update("jax_platforms", device)
    jax.config.update("jax_default_matmul_precision", matmul)
    configure(device, options["threads"], options["precision"])
    setup = runner.describe(devices=[jax.devices()[0].device_kind])
    setup["versions"]["torch"] = metadata.version("torch")
    results: list[dict[str, Any]] = []
    for name, method in itertools.product(options["nets"], options["methods"]):
        results += measure(name, method, options)
        text = f"{runner.options_line(options, 'peers.py')}\n{runner.columns(COLUMNS, results)}"
        runner.publish(setup, text, output, options=options, results=results)
    if agree(results, tolerance):
        return 0
    print("the first losses differ: the set-ups do not do the same work", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
