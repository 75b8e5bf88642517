"""Everything that is to be measured on a GPU: steps with a limit each, 8 minutes in all.

    bench/gpu.sh OUT [DATA]
    bench/gpu.sh OUT DATA --steps training peers-128-tf32 --seconds 200
    TINY=1 bench/gpu.sh OUT [DATA]

OUT is a folder for results, as JSON and as Markdown, of every step and of all together (`gpu.json`,
`gpu.md`); what a step printed is in STEP.txt. DATA is a folder with CIFAR-10, as TFDS prepares it
or as the archive of its authors unpacks (`cifar-10-batches-py`). No network is used.

    correct     losses of the golden vectors in float32, and engines against one another
    training    accuracy of deinforeg and bp on CIFAR-10 after equal times
    dispatch    what a call costs the host
    memory      peak of every method on ResNet-18 by the device's own statistics
    peers       VGG-8 and ResNet-18 beside PyTorch, by batch and precision

Steps come one after another: compilers at work beside each other took a whole H100's memory. A step
that fails, lacks something or runs out of time is told of, and the others go on; what it measured
so far is kept. The exit code is then 1, unless all that went wrong is that something is not there.
Nothing compiled, 8 minutes suffice for the steps up to the first of the peers.

`--steps` takes some steps only, `--seconds` changes the limit in all. TINY makes all sizes tiny and
runs on the CPU, without the limit in all.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

BENCH = Path(__file__).resolve().parent
SECONDS = 460  # of all steps
LEAST = 5  # seconds with which a step is still begun
PRECISIONS = "tf32", "bfloat16", "float32"
STEPS_OF = {128: 20, 1024: 3}  # steps of a segment, by batch
MISSING = 77  # exit code of a step that lacks something


class Step(NamedTuple):
    """A command of this folder, with a limit in seconds."""

    name: str
    seconds: float
    words: Sequence[str]
    needs: Sequence[str] = ()  # modules


class Outcome(NamedTuple):
    """What became of a step: "done", "missing", "failed" or "late", and why."""

    name: str
    state: str
    why: str
    seconds: float


def peers(tiny: bool) -> list[Step]:
    """The steps of the peers, the most telling first."""
    if tiny:
        sizes = ["--width=0.0625", "--projector=16-8", "--repeats=1", "--peers=eager"]
        chosen = [("float32", 4, ["vgg8", "resnet18"]), ("bfloat16", 4, ["vgg8"])]
    else:
        sizes = ["--width=1", "--projector=2048-2048-2048", "--repeats=5", "--device=cuda"]
        chosen = [(x, size, ["vgg8", "resnet18"]) for size in STEPS_OF for x in PRECISIONS]
    return [
        Step(
            f"peers-{batch}-{precision}",
            200,
            [
                *("peers.py", *sizes, f"--steps={STEPS_OF.get(batch, 1)}", f"--batch={batch}"),
                *(f"--precision={precision}", "--nets", *nets),
            ],
            ["torch"],
        )
        for precision, batch, nets in chosen
    ]


def steps(data: str, tiny: bool) -> list[Step]:
    """All steps in their order."""
    small = ["--tiny"] if tiny else []
    calls = ["--hidden=16", "--dispatch=5"] if tiny else ["--hidden=64", "--dispatch=100"]
    calls += ["--model=arrays", "--depth=2", "--batch=8", "--head=0", "--steps=4", "--repeats=2"]
    rows = ["deinforeg,K=2,together", "deinforeg,K=2,apart", "deinforeg,K=2,together,spmd"]
    return [
        Step("correct", 120, ["gpu_correct.py"]),
        Step("training", 120, ["gpu_train.py", *([data] if data else []), *small]),
        Step("dispatch", 60, ["throughput.py", *calls, "--place=devices", "--rows", *rows]),
        Step("memory", 200, ["gpu_memory.py", *(small or ["--batch=1024"])]),
        *peers(tiny),
    ]


def run(step: Step, folder: Path, deadline: float, slow: float) -> Outcome:
    """Runs a step until its limit or the deadline."""
    start = time.monotonic()
    results = folder / f"{step.name}.json"
    for earlier in (results, results.with_suffix(".md")):
        earlier.unlink(missing_ok=True)
    limit = min(step.seconds * slow, deadline - start)
    if lacks := [name for name in step.needs if importlib.util.find_spec(name) is None]:
        return Outcome(step.name, "missing", f"{', '.join(lacks)} cannot be imported", 0.0)
    if limit < LEAST:
        return Outcome(step.name, "late", "not begun: no time was left", 0.0)
    script, *words = step.words
    command = [sys.executable, BENCH / script, *words, f"--output={results}"]
    printed = results.with_suffix(".txt")
    with printed.open("w") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)  # it, and what it has started
            process.wait()
    seconds = time.monotonic() - start
    if code == 0:
        return Outcome(step.name, "done", "", seconds)
    if code is None:
        return Outcome(step.name, "late", f"stopped after {limit:.0f} s", seconds)
    lines = [line.strip() for line in printed.read_text(errors="replace").splitlines()]
    why = next((line for line in reversed(lines) if line), f"exit code {code}")
    return Outcome(step.name, "missing" if code == MISSING else "failed", why, seconds)


def told(outcome: Outcome) -> str:
    """The outcome as a line."""
    reason = f": {outcome.why}" if outcome.why else ""
    return f"{outcome.name}: {outcome.state} ({outcome.seconds:.0f} s){reason}"


def publish(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Writes all results so far as one file of JSON and one of Markdown."""
    found = {x.name: folder / f"{x.name}.json" for x in outcomes}
    results = {name: json.loads(x.read_text()) for name, x in found.items() if x.is_file()}
    values = {"steps": [outcome._asdict() for outcome in outcomes], "results": results}
    (folder / "gpu.json").write_text(json.dumps(values, indent=1) + "\n")
    texts = ["# On a GPU\n", *(f"- {told(outcome)}" for outcome in outcomes)]
    for name in results:
        if (text := folder / f"{name}.md").is_file():
            texts.append(f"\n## {name}\n\n{text.read_text()}")
    (folder / "gpu.md").write_text("\n".join(texts) + "\n")


def parse(tiny: bool) -> argparse.Namespace:
    names = [step.name for step in steps("", tiny)]
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description="Measures all on a GPU.")
    parser.add_argument("output", type=Path, help="folder for results")
    parser.add_argument("data", nargs="?", default="", help="folder with CIFAR-10")
    parser.add_argument("--steps", nargs="+", choices=names, default=names, metavar="STEP")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all steps")
    return parser.parse_args()


def main() -> int:
    start, tiny = time.monotonic(), bool(os.environ.get("TINY"))
    options, slow = parse(tiny), 20.0 if tiny else 1.0
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if tiny:
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    for name, part in (("JAX_COMPILATION_CACHE_DIR", "xla"), ("TORCHINDUCTOR_CACHE_DIR", "torch")):
        os.environ.setdefault(name, str(folder / "cache" / part))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    outcomes: list[Outcome] = []
    for step in steps(options.data, tiny):
        if step.name in options.steps:
            outcomes.append(run(step, folder, start + options.seconds * slow, slow))
            print(told(outcomes[-1]), flush=True)
            publish(outcomes, folder)
    return int(any(outcome.state in ("failed", "late") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
