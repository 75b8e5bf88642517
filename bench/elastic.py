"""Three stages in three processes, the middle one killed again and again: what the others lose.

    python bench/elastic.py --data digits fashion_mnist --data_dir DIR --output runs/elastic

Each stage has a core of its own; where there are two, stages 1 and 2 share one. Undisturbed runs
of several seeds give the spread of the accuracy. In a disturbed run of the first seed the middle
process is killed at random moments, up to `--gap` seconds after its stage has come (back), and is
started again at once. All processes are forked from one that has imported what they need, so that a
start takes no time for that. The throughput of the first stage is that of its own metrics, without
the first line. A run by backpropagation, before all others, has the same process killed once.
"""

import argparse
import itertools
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

SETS = {
    "digits": {
        "model.blocks": "48,48|48,M|48",
        "steps": 3400,
        "log_every": 25,
        "checkpoint.every": 25,
    },
    "fashion_mnist": {
        "model.blocks": "12,12|12,M|12",
        "steps": 1000,
        "log_every": 25,
        "checkpoint.every": 25,
    },
}
SECONDS = 1800  # after which a run that has not ended is a failure


def arguments(folder: Path, method: str, data: str, given: dict[str, Any]) -> list[str]:
    """Command line of a process but for its place."""
    values = {**SETS[data], "mesh.stages": 3, "checkpoint.keep": 2, **given}
    values["eval_every"] = values["steps"]
    config = ["--config", f"equal:{data},vgg,{method}", "--workdir", str(folder)]
    return config + [f"--config.{key}={value}" for key, value in values.items()]


class Processes:
    """Three processes of a run, of which any may be killed and started again."""

    def __init__(self, folder: Path, words: list[str], cores: list[int]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
        folder.mkdir(parents=True)
        self.folder, self._cores = folder, cores
        self._words = [*words, coordinator, "--num_processes=3"]
        self.pids = [self._start(index) for index in range(3)]
        self.codes: dict[int, int] = {}

    def _start(self, index: int) -> int:
        if pid := os.fork():
            return pid
        try:
            os.sched_setaffinity(0, {self._cores[index]})
            for number, suffix in ((1, "out"), (2, "err")):
                path = self.folder.with_name(f"{self.folder.name}-{index}.{suffix}")
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            from jdecouple.train import cli

            cli.main(["jdecouple train", *self._words, f"--process_index={index}"])
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def kill(self, index: int) -> None:
        """Kills one."""
        os.kill(self.pids[index], signal.SIGKILL)
        os.waitpid(self.pids[index], 0)

    def again(self, index: int) -> None:
        """Starts one again."""
        self.pids[index] = self._start(index)

    def running(self) -> bool:
        """Whether one has yet to end."""
        for index in {*range(3)} - self.codes.keys():
            pid, status = os.waitpid(self.pids[index], os.WNOHANG)
            if pid:
                self.codes[index] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < 3

    def end(self) -> list[int]:
        """Waits for all; their exit codes."""
        limit = time.monotonic() + SECONDS
        while self.running():
            if time.monotonic() > limit:
                sys.exit(f"{self.folder} has not ended")
            time.sleep(0.1)
        return [self.codes[index] for index in range(3)]


def read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def steps_per_second(folder: Path, size: int = 128) -> float:
    """Of the first stage, from its second line of metrics to its last."""
    lines = [x for x in read(folder / "stages/0/metrics.jsonl") if "examples_per_second" in x]
    steps = [b["step"] - a["step"] for a, b in itertools.pairwise(lines)]
    pairs = zip(steps, lines[1:], strict=True)
    return sum(steps) / sum(count * size / line["examples_per_second"] for count, line in pairs)


def accuracy(folder: Path) -> float:
    return next(x for x in read(folder / "metrics.jsonl") if x["split"] == "test")["accuracy"]


def first_stage(folder: Path) -> dict[str, Any]:
    """The weights and the optimiser's state of the first block at the end."""
    from jdecouple.checkpoint import Checkpointer

    checkpoints = Checkpointer(folder / "checkpoints", read_only=True)
    step = checkpoints.latest_step
    assert step is not None
    return checkpoints.read(step, lambda name: name.startswith("block_0/")).arrays


def starts(folder: Path, stage: int) -> int:
    """How often a stage has come."""
    path = folder / f"stages/{stage}/place.json"
    return json.loads(path.read_text())["starts"] if path.exists() else 0


def disturb(run: Processes, kills: int, gap: float, draw: random.Random, total: int) -> int:
    """Kills the middle process at random moments; how often while the first stage trained."""
    met = 0
    for number in range(kills):
        while starts(run.folder, 1) <= number:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, gap))
        lines = read(run.folder / "stages/0/metrics.jsonl")
        met += max((line["step"] for line in lines), default=0) < total
        run.kill(1)
        run.again(1)
    return met


def place(data: str, given: argparse.Namespace) -> dict[str, Any]:
    """Where the data lies; digits come with a package."""
    return {} if data == "digits" or not given.data_dir else {"data.data_dir": given.data_dir}


def measure(data: str, given: argparse.Namespace, cores: list[int]) -> list[dict[str, Any]]:
    """The rows of a data set."""
    import numpy as np

    rows: list[dict[str, Any]] = []
    out = Path(given.output)
    sets = {**place(data, given), **dict(each.split("=", 1) for each in given.set)}
    runs = [("none", "wait", seed) for seed in given.seeds]
    runs[1:1] = [("middle", way, given.seeds[0]) for way in given.on_loss]
    for killed, way, seed in runs:
        folder = out / f"{data}-{killed}-{way}-{seed}"
        if not (folder / "row.json").exists():
            own = {"mesh.elastic": way, "mesh.elastic_buffer": given.buffer, "seed": seed, **sets}
            run = Processes(folder, arguments(folder, given.method, data, own), cores)
            met = 0
            if killed == "middle":
                total = int(sets.get("steps", SETS[data]["steps"]))
                met = disturb(run, given.kills, given.gap, random.Random(seed), total)
            if any(codes := run.end()):
                sys.exit(f"{folder} has ended with {codes}")
            from jdecouple.checkpoint import Checkpointer

            checkpoints = Checkpointer(folder / "checkpoints", read_only=True)
            stages = checkpoints.extras()[checkpoints.latest_step or 0]["stages"]
            row = {"data": data, "killed": killed, "on_loss": way, "seed": seed, "met": met}
            row |= {"rate": steps_per_second(folder), "accuracy": accuracy(folder)}
            row |= {"stages": stages, "load": os.getloadavg()[1]}
            (folder / "row.json").write_text(json.dumps(row))
        rows.append(json.loads((folder / "row.json").read_text()))
        if killed == "middle":
            ours, theirs = (first_stage(x) for x in (folder, out / f"{data}-none-wait-{seed}"))
            same = all(np.array_equal(ours[name], theirs[name]) for name in theirs)
            rows[-1]["equal"] = same and ours.keys() == theirs.keys()
        print(json.dumps(rows[-1]), flush=True)
    return rows


def by_bp(data: str, given: argparse.Namespace, cores: list[int]) -> str:
    """What happens to a run by backpropagation whose middle process is killed."""
    folder = Path(given.output) / f"{data}-bp"
    words = arguments(folder, "bp", data, {"seed": 0, **place(data, given)})
    run = Processes(folder, words, cores)
    while not read(folder / "metrics.jsonl"):
        if not run.running():
            sys.exit(f"{folder} has ended")
        time.sleep(0.1)
    began = time.monotonic()
    os.kill(run.pids[1], signal.SIGKILL)
    codes = run.end()
    return f"{data}, bp: exit codes {codes}, {time.monotonic() - began:.1f} s after the kill"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| data | killed | seed | first stage, steps/s | its weights | test accuracy | missed |"
    ]
    lines += ["| --- | --- | ---: | ---: | --- | ---: | --- |"]
    for row in rows:
        missed = [sum(b - a + 1 for a, b in stage["missed"]) for stage in row["stages"]]
        total = row["stages"][0]["trained"]
        of = ", ".join(f"{count / total:.0%}" for count in missed)
        killed = "nothing"
        if row["killed"] == "middle":
            again = sum(stage["replayed"] for stage in row["stages"])
            times = row["stages"][1]["starts"] - 1
            killed = f"middle, {times} times ({row['met']}), {row['on_loss']}"
            of += f"; {again} replayed" if again else ""
        base = next(x for x in rows if (x["data"], x["killed"]) == (row["data"], "none"))
        rate = f"{row['rate']:.1f} ({row['rate'] / base['rate']:.0%})"
        same = {True: "equal", False: "differ", None: ""}[row.get("equal")]
        score = f"{row['accuracy']:.2%}"
        lines.append(
            f"| {row['data']} | {killed} | {row['seed']} | {rate} | {same} | {score} | {of} |"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    own.add_argument("--data", nargs="+", choices=[*SETS], default=["digits"])
    own.add_argument("--data_dir")
    own.add_argument("--method", default="dgl")
    own.add_argument("--on_loss", nargs="+", choices=["wait", "replay"], default=["wait"])
    own.add_argument("--kills", type=int, default=20)
    own.add_argument("--gap", type=float, default=5.0)
    own.add_argument("--buffer", type=int, default=32)
    own.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    own.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    own.add_argument("--no_bp", action="store_true")
    own.add_argument("--output", required=True)
    return own


def main() -> None:
    given = parser().parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import grain  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import tensorflow_datasets  # noqa: F401

    import jdecouple.train.cli  # noqa: F401

    allowed = sorted(os.sched_getaffinity(0))
    cores = [allowed[0], allowed[len(allowed) // 2], allowed[-1]]
    rows: list[dict[str, Any]] = []
    # First, since reading checkpoints begins with JAX, whose processes could not meet after that.
    told = [] if given.no_bp else [by_bp(data, given, cores) for data in given.data]
    for data in given.data:
        rows += measure(data, given, cores)
    text = "\n".join([table(rows), "", *told])
    print(text)
    (Path(given.output) / "table.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
