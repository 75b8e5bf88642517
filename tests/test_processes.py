"""Real processes on loopback: the same numbers as one process, to the last bit.

Two processes, each pinned to a core where there are two, train several configurations in
sequence; a third trains the same with its stages compiled apart on one device.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import nets
import numpy as np
import pytest

WORKER = Path(__file__).with_name("train_worker.py")
TIMEOUT = 300  # seconds for all runs
RUNS: dict[str, dict[str, Any]] = {
    "deinforeg": {"method": "deinforeg", "model": "two_blocks", "stages": 2, "steps": 8},
    "scpl": {"method": "scpl", "model": "two_blocks", "stages": 2, "steps": 8},
    "bp": {
        "method": "bp",
        "model": "two_blocks",
        "stages": 2,
        "steps": 8,
        "trainer": {"microbatches": 2},
    },
    "four_stages": {"method": "scpl", "model": "four_blocks", "stages": 4, "steps": 8},
    "slow_end": {
        "method": "scpl",
        "model": "slow_end",
        "stages": 2,
        "steps": 13,
        "trainer": {"max_in_flight": 2},
    },
    "chunk": {"method": "scpl", "model": "four_blocks", "stages": 4, "steps": 8, "chunk": 4},
    # Codes of the labels travel up with the message; in evaluation the answer comes down.
    "al": {"method": "al", "model": "four_blocks", "stages": 4, "steps": 8},
    "al_chunk": {"method": "al", "model": "two_blocks", "stages": 2, "steps": 8, "chunk": 4},
    # "finish" drains before that step, and the stages fill again.
    "fdg": {"method": "fdg", "model": "two_blocks", "stages": 2, "steps": 8},
    "fr": {"method": "fr", "model": "two_blocks", "stages": 2, "steps": 9, "finish": 5},
    "fdg_four_stages": {
        "method": "fdg",
        "model": "four_blocks",
        "stages": 4,
        "steps": 15,
        "finish": 9,
    },
    "replicas": {"method": "bp", "model": "two_blocks", "data": 2, "steps": 8},
}
STAGED = pytest.mark.parametrize("name", [name for name in RUNS if "stages" in RUNS[name]])


class Result(NamedTuple):
    """What one process found in one run."""

    arrays: dict[str, np.ndarray]
    report: dict[str, Any]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def start(spec: dict[str, Any], log: Path) -> subprocess.Popen:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(WORKER.parents[1]),
    }
    with log.open("w") as stream:
        return subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(spec)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
        )


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[dict[str, Result]]]:
    """Results of "pair" (two processes) and "alone" (one), by process and run."""
    cores = sorted(os.sched_getaffinity(0))
    port, *transfer = free_ports(3)
    started: list[tuple[str, int, Path, subprocess.Popen]] = []
    try:
        for group, count in (("pair", 2), ("alone", 1)):
            for process in range(count):
                out = tmp_path_factory.mktemp(f"{group}{process}")
                spec = {
                    "runs": RUNS,
                    "num_processes": count,
                    "process_id": process,
                    "port": port,
                    "transfer_port": transfer[process],
                    "core": cores[process] if count > 1 and len(cores) > 1 else None,
                    "out": str(out),
                }
                started.append((group, process, out, start(spec, out / "log")))
        for group, process, out, child in started:
            code = child.wait(TIMEOUT)
            assert code == 0, f"{group} {process}: {(out / 'log').read_text()[-3000:]}"
    finally:
        for *_, child in started:
            child.kill()
            child.wait()
    found: dict[str, list[dict[str, Result]]] = {"pair": [], "alone": []}
    for group, process, out, _ in started:
        found[group].append({name: load(out, f"{name}_{process}") for name in RUNS})
    return found


def load(out: Path, stem: str) -> Result:
    with np.load(out / f"{stem}.npz") as file:
        return Result(dict(file), json.loads((out / f"{stem}.json").read_text()))


@STAGED
def test_arrays_are_those_of_one_process_to_the_bit(results, name):
    """Weights, statistics, the optimiser's state, and what waits in a delayed method."""
    (alone,) = results["alone"]
    first, second = (each[name].arrays for each in results["pair"])
    assert first
    assert second
    assert not first.keys() & second.keys()
    assert nets.same_bits(first | second, alone[name].arrays)


@STAGED
def test_metrics_are_those_of_one_process_to_the_bit(results, name):
    """`gather_metrics` gives every process the whole."""
    (alone,) = results["alone"]
    wanted = alone[name].report["metrics"]
    assert len(wanted) == RUNS[name]["steps"]
    for each in results["pair"]:
        np.testing.assert_equal(each[name].report["metrics"], wanted)  # where NaN is NaN


@pytest.mark.parametrize(
    ("name", "empty"), [("fdg", {0}), ("fdg_four_stages", {0, 1, 2, 9, 10, 11})]
)
def test_no_loss_is_known_while_the_stages_fill(results, name, empty):
    for each in results["pair"]:
        losses = [metrics["loss"] for metrics in each[name].report["metrics"]]
        assert {step for step, loss in enumerate(losses) if np.isnan(loss)} == empty


@pytest.mark.parametrize("name", ["fdg", "fr", "fdg_four_stages"])
def test_every_stage_holds_what_waits(results, name):
    stages = range(RUNS[name]["stages"])
    half = len(stages) // 2
    for each, mine in zip(results["pair"], (stages[:half], stages[half:]), strict=True):
        arrays = each[name].arrays
        waiting = {
            key.split("/")[0] for key in arrays if "/waiting/" in key and np.any(arrays[key])
        }
        # A batch passes the last stage of Features Replay at once.
        keep = mine if name != "fr" else [k for k in mine if k != stages[-1]]
        assert waiting == {f"stage_{k}" for k in keep}


@STAGED
def test_evaluation_is_that_of_one_process(results, name):
    (alone,) = results["alone"]
    for each in results["pair"]:
        assert each[name].report["evaluation"] == alone[name].report["evaluation"]


@STAGED
def test_a_process_holds_its_own_stages_only(results, name):
    first, second = (each[name].report for each in results["pair"])
    half = (len(first["blocks"]) - 1) // 2
    assert first["blocks"][: 2 * half] == [True] * half + [False] * half
    assert second["blocks"][: 2 * half] == [False] * half + [True] * half
    assert first["own"] != second["own"]


def test_a_slow_receiver_holds_the_sender_back(results):
    """Of twelve batches two may be in flight; without a bound the sender would wait for none."""
    sender = results["pair"][0]["slow_end"].report
    assert sender["seconds"] > 0.1
    assert sender["dispatch_seconds"] > 0.5 * sender["seconds"]


def test_replicas_in_two_processes_train_like_one(results):
    (alone,) = results["alone"]
    wanted = alone["replicas"]
    first, second = (each["replicas"] for each in results["pair"])
    assert nets.same_bits(first.arrays, second.arrays)
    assert nets.largest_error(first.arrays, wanted.arrays) < 1e-4  # float32
    for found in (first.report, second.report):
        for here, there in zip(found["metrics"], wanted.report["metrics"], strict=True):
            assert here == pytest.approx(there, rel=1e-4)
        assert found["evaluation"] == pytest.approx(wanted.report["evaluation"], rel=1e-4)
