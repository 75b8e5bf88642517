"""Memory of the first process while a checkpoint is saved, and bytes that each reads of it.

    python bench/checkpoints.py --stages 2 4 --megabytes 200

Every stage is one dense layer of so many megabytes, in a process of its own on one CPU device.
Each way of saving starts processes afresh: by stage (each writes its own), gathered (all to the
first, as where machines share no folder) and apart (each into its own folder, whose content the
first is sent at the end). "Before" and "peak" are the resident memory of the first process, which
holds the initial weights of the whole model besides: "more" is what the save adds. The checkpoint
by stage is then read by as many processes, by half as many and by one.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MB = 10**6


def resident(key: str) -> float:
    """VmRSS or VmHWM (the peak) of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / MB


def has_read() -> int:
    """Bytes that this process has read so far, of files and sockets."""
    return int(Path("/proc/self/io").read_text().split()[1])


def work(task: dict[str, Any]) -> dict[str, Any]:
    """What one process does and measures."""
    import jax
    import numpy as np
    from flax import nnx

    from jdecouple.train import hosts

    processes = hosts.SingleProcess()
    if task["count"] > 1:
        place = hosts.ProcessSpec(f"127.0.0.1:{task['port']}", task["count"], task["index"])
        processes = hosts.join(place)

    import jdecouple as jd
    from jdecouple.checkpoint import Checkpointer

    width = round((task["megabytes"] * MB / 4) ** 0.5)
    rngs = nnx.Rngs(0)
    blocks = [nnx.Linear(width, width, rngs=rngs) for _ in range(task["stages"])]
    trainer = jd.Trainer(
        jd.Model(blocks, nnx.Linear(width, 2, rngs=rngs)),
        jd.methods.get("bp"),
        jd.optim.sgd(0.1),
        mesh=jd.make_mesh(task["count"]),
        boundaries=[*range(0, task["stages"], task["stages"] // task["count"])],
        example={"x": np.zeros((1, width), np.float32), "label": np.zeros(1, np.int32)},
    )
    folder, found = Path(task["folder"]), {}
    if task["way"] == "read":
        names = set(trainer.to_arrays(trainer.abstract(addressable=True)))
        before = has_read()
        with_own = Checkpointer(folder, read_only=True)
        arrays = with_own.read(1, names.__contains__).arrays
        found["read"] = (has_read() - before) / MB
        found["own"] = sum(array.nbytes for array in arrays.values()) / MB
    else:
        found = save(task, folder, processes, trainer)
    jax.effects_barrier()
    if task["count"] > 1:
        processes.close()
    return found


def save(task: dict[str, Any], folder: Path, processes: Any, trainer: Any) -> dict[str, Any]:
    """What a process measures while all save."""
    from jdecouple.checkpoint import Checkpointer, own_parts
    from jdecouple.train import hosts, sharing

    state, way = trainer.init(), task["way"]
    trainer.wait(state)
    arrays = trainer.to_arrays(state)
    if way == "apart":
        folder = folder / f"machine_{task['index']}" / "checkpoints"
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(Checkpointer(folder)) if processes.first else None
        together = None
        if way != "gathered":
            shared = sharing.share(processes, folder, writer, apart=way == "apart")
            together = stack.enter_context(shared)
        found, began = begin(processes), time.perf_counter()
        saved: Any
        if way == "gathered":
            saved = hosts.gather(processes, arrays)
        else:
            saved = own_parts(arrays, sharing.stage_of(trainer))
        lists = processes.collect(sharing.listed(together, saved))
        sharing.settle(processes, writer, together, [each.value for each in lists])
        if writer is not None:
            writer.save(1, saved, {})
        elif together is not None:
            together.save(1, saved)
        sharing.settle(processes, writer, together)
        found |= {"peak": resident("VmHWM"), "seconds": time.perf_counter() - began}
        if way == "apart":
            del saved
            later, began = begin(processes), time.perf_counter()
            sharing.gather(processes, together, writer)
            later |= {"peak": resident("VmHWM"), "seconds": time.perf_counter() - began}
            found["later"] = later
    return found


def begin(processes: Any) -> dict[str, Any]:
    """The memory of this process, of which the peak begins anew, when all have come here."""
    processes.collect(None)
    processes.broadcast(None)
    Path("/proc/self/clear_refs").write_text("5")
    return {"before": resident("VmRSS")}


def run(count: int, **task: Any) -> list[dict[str, Any]]:
    """What each of so many processes has measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    children = [
        subprocess.Popen(
            [sys.executable, __file__, "--task", json.dumps(task | own)],
            stdout=subprocess.PIPE,
            env=environment,
        )
        for own in ({"count": count, "index": index, "port": port} for index in range(count))
    ]
    outputs = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        sys.exit("a process has failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def show(stages: int, way: str, found: dict[str, Any]) -> None:
    """Prints a line of the table."""
    memory = (found["before"], found["peak"], found["peak"] - found["before"])
    cells = "".join(f"{value:>10.0f}" for value in memory)
    print(f"{stages:>6} {way:<10}{cells}{found['seconds']:>7.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--megabytes", type=int, default=200, help="of a stage")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task:
        print(json.dumps(work(given.task)))
        return
    print(f"{'stages':>6} {'saved':<10}{'before MB':>10}{'peak MB':>10}{'more MB':>10}{'s':>7}")
    for stages in given.stages:
        task = {"stages": stages, "megabytes": given.megabytes}
        with tempfile.TemporaryDirectory() as folder:
            for way in ("gathered", "apart", "by stage"):
                place = str(Path(folder) / way.replace(" ", "_"))
                first, *_ = run(stages, way=way, folder=place, **task)
                show(stages, way, first)
                if "later" in first:
                    show(stages, "at the end", first["later"])
            files = (path for path in Path(place).rglob("*") if path.is_file())
            print(f"       on disk {sum(file.stat().st_size for file in files) / MB:.0f} MB")
            for count in sorted({stages, stages // 2, 1}, reverse=True):
                found = run(count, way="read", folder=place, **task)
                cells = ", ".join(f"{each['read']:.0f} of {each['own']:.0f}" for each in found)
                print(f"       read by {count}: {cells} MB", flush=True)


if __name__ == "__main__":
    main()
