"""The time of a batch as `jdecouple plan` has it, against the time that a training takes.

    python bench/plan.py --output runs/plan.json
    python bench/plan.py --methods scpl fdg --config vision:synthetic,resnet18,{method}

Two stages on two processes, each pinned to a core that is its only device, train the net as
`jdecouple train` does, on random images. The plan is made beforehand on one of these cores, for two
of them and the link between them, which is measured: once with `--measure`, by the time of every
call, and once by operations alone. Measured are the batches after the first line of the log, which
tells of those that compile. Columns:

    measured    ms of a batch, of the training
    plan        ms by `plan --measure`, and its error
    operations  ms by `plan` for devices as fast as one is found to be, and its error
    bubble      share of the devices' time that waits, by `plan --measure`

--least-accurate P ends with code 1 where the error of `plan --measure` is above P percent.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import runner
from runner import Columns, Processes

METHODS = ("deinforeg", "bp", "fdg")
CONFIG = "vision:synthetic,vgg8,{method}"
STAGES = 2
SECONDS = 3600  # after which a training that does not end is a failure
OWN = {"bp": {"schedule": "1f1b", "microbatches": 4}}  # else its stages take turns


def keys(method: str, options: Namespace) -> list[str]:
    """The configuration of a row, as arguments."""
    config = options.config.format(method=method)
    values = {
        "mesh.stages": STAGES,
        "batch_size": options.batch,
        "steps": options.steps * (options.repeats + 1),
        "log_every": options.steps,
        "eval_every": 10**6,
        "data.synthetic_size": 8 * options.batch,
        "data.validation": 0,
        "data.std": None,
        **OWN.get(method, {}),
    }
    given = [f"--config.{key}={value}" for key, value in values.items()]
    return ["--config", config, *given]


def planned(method: str, options: Namespace, link: dict[str, float], *more: str) -> dict[str, Any]:
    """What the command says of a row, on one pinned core."""
    speed = [f"--link={link['bandwidth']:.0f}B/s"] if "bandwidth" in link else []
    arguments = ["plan", *keys(method, options), f"--devices={STAGES}", "--format=json"]
    arguments += [*speed, f"--latency={1e6 * link['latency']:.3f}us", *more]
    process = start(arguments, runner.cores()[0])
    out, _ = process.communicate(timeout=SECONDS)
    if process.returncode:
        raise RuntimeError("`jdecouple plan` failed: its message is above")
    return json.loads(out)


def measured(method: str, options: Namespace) -> list[float]:
    """Seconds of a batch in every part of a training."""
    with tempfile.TemporaryDirectory() as folder:
        port = runner.distributed_arguments(1)[0]["coordinator"]
        place = ["--coordinator", port, "--num_processes", str(STAGES)]
        command = ["train", *keys(method, options), "--workdir", folder, *place]
        processes = [
            start([*command, "--process_index", str(index)], core)
            for index, core in enumerate(runner.cores()[:STAGES])
        ]
        for process in processes:
            process.communicate(timeout=SECONDS)
        if any(process.returncode for process in processes):
            raise RuntimeError("`jdecouple train` failed: its message is above")
        lines = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
        rates = [x["examples_per_second"] for x in lines if x["split"] == "train"]
    return [options.batch / rate for rate in rates[1:]]


def start(arguments: Sequence[str], core: int) -> subprocess.Popen:
    """A command of jdecouple on one core; its stdout is read."""
    environment = {**os.environ, **runner.ON_CPU}
    with runner.pinned([core]):
        command = [sys.executable, "-m", "jdecouple", *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def compare(method: str, options: Namespace, link: dict[str, float]) -> dict[str, Any]:
    """One row."""
    by_calls = planned(method, options, link, "--measure")
    by_operations = planned(method, options, link)
    parts = measured(method, options)
    taken = statistics.median(parts)
    print(f"{method}: {1e3 * taken:.0f} ms", file=sys.stderr)
    calls, operations = (found["times"][0] for found in (by_calls, by_operations))
    return {
        "method": method,
        "schedule": calls["schedule"],
        "seconds": parts,
        "plan": calls["seconds"],
        "plan_error": calls["seconds"] / taken - 1,
        "operations": operations["seconds"],
        "operations_error": operations["seconds"] / taken - 1,
        "bubble": calls["bubble"],
        "speed": by_operations["speed"],
    }


COLUMNS: Columns = {
    "method": lambda r: f"`{r['method']}`",
    "schedule": lambda r: r["schedule"],
    "measured ms": lambda r: runner.Spread.of(1e3 * x for x in r["seconds"]).show(0),
    "plan ms": lambda r: f"{1e3 * r['plan']:.0f} ({r['plan_error']:+.1%})",
    "operations ms": lambda r: f"{1e3 * r['operations']:.0f} ({r['operations_error']:+.1%})",
    "bubble": lambda r: f"{r['bubble']:.1%}",
}


def parse() -> Namespace:
    parser = runner.flags(__doc__)
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD")
    parser.add_argument("--config", default=CONFIG, help="preset, with {method} in it")
    parser.add_argument("--batch", type=runner.count, default=16, help="examples of a batch")
    parser.add_argument("--steps", type=runner.count, default=20, help="batches of a measurement")
    parser.add_argument("--repeats", type=runner.count, default=3, help="measurements")
    parser.add_argument("--least-accurate", type=runner.at_least(0), metavar="P")
    options = parser.parse_args()
    if len(runner.cores()) < STAGES:
        parser.error(f"{STAGES} cores are needed")
    return options


def main() -> int:
    options = parse()
    setup = runner.describe()
    with Processes(runner.cores()[:STAGES]) as processes:
        link = processes.link()
    results = [compare(method, options, link) for method in options.methods]
    text = f"{runner.columns(COLUMNS, results)}\n- Link: {runner.link_text(link)}.\n"
    text += "".join(f"- {result['method']}: {result['speed']}.\n" for result in results)
    runner.publish(
        setup, text, options.output, options=vars(options) | {"output": None}, rows=results
    )
    worst = max(abs(result["plan_error"]) for result in results)
    return int(options.least_accurate is not None and 100 * worst > options.least_accurate)


if __name__ == "__main__":
    sys.exit(main())
