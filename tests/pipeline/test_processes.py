"""Real processes on loopback: the same numbers as one process, to the last bit.

Two processes, each pinned to a core where there are two, train several configurations in
sequence; a third trains the same with its stages compiled apart on one device. Some of the
configurations are fast, and trained together; the slow ones are trained together as well.
"""

import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nets
import numpy as np
import pytest

WORKER = Path(nets.__file__).with_name("train_worker.py")
TIMEOUT = 1500  # seconds for all runs
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
    # Weight gradients of their own; in a V the first and the last stage share a process.
    "zb_h1": {
        "method": "bp",
        "model": "two_blocks",
        "stages": 2,
        "steps": 8,
        "trainer": {"microbatches": 4, "schedule": "zb_h1"},
    },
    "zbv": {
        "method": "bp",
        "model": "four_blocks",
        "stages": 4,
        "steps": 8,
        "trainer": {"microbatches": 4, "schedule": "zbv", "clip_norm": 0.5},
    },
    "fdg_split": {
        "method": "fdg",
        "model": "two_blocks",
        "stages": 2,
        "steps": 8,
        "trainer": {"schedule": "delayed_split"},
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
    # Weights travel down, to averages that follow them.
    "man": {"method": "man", "model": "four_blocks", "stages": 4, "steps": 8},
    # Codes of the labels travel up with the message; in evaluation the answer comes down.
    "al": {"method": "al", "model": "four_blocks", "stages": 4, "steps": 8},
    "al_chunk": {"method": "al", "model": "two_blocks", "stages": 2, "steps": 8, "chunk": 4},
    # Frozen stages hand the codes on; with a chunk, T of them at once.
    "frozen": {
        "method": "al",
        "model": "four_blocks",
        "stages": 4,
        "steps": 8,
        "trainer": {"frozen": [0, 2]},
    },
    "frozen_chunk": {
        "method": "deinforeg",
        "model": "four_blocks",
        "stages": 4,
        "steps": 8,
        "chunk": 4,
        "trainer": {"frozen": [0, 1]},
    },
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
    # Each process has two versions of its weights; outputs come back with the errors.
    "2bw": {"method": "2bw", "model": "four_blocks", "stages": 4, "steps": 15, "finish": 8},
    "petra": {"method": "petra", "model": "reversible", "stages": 4, "steps": 15, "finish": 9},
    # Sums of losses wait with the carries, rounded or not.
    "interleaved": {
        "method": "scpl",
        "model": "four_blocks",
        "stages": 2,
        "steps": 9,
        "finish": 5,
        "trainer": {"schedule": "interleaved", "num_stages": 4},
    },
    "interleaved_bfloat16": {
        "method": "al",
        "model": "four_blocks",
        "stages": 2,
        "steps": 6,
        "trainer": {"schedule": "interleaved", "num_stages": 4, "wire": "bfloat16"},
    },
    # All stages wait for one norm; and errors that carry their scale.
    "bp_half": {
        "method": "bp",
        "model": "two_blocks",
        "stages": 2,
        "steps": 8,
        "trainer": {"dtype": "float16", "microbatches": 2},
    },
    "fdg_half": {
        "method": "fdg",
        "model": "two_blocks",
        "stages": 2,
        "steps": 8,
        "trainer": {"dtype": "float16"},
    },
    # What is rounded travels as codes; in queues it is as it arrives.
    "scpl_int8": {
        "method": "scpl",
        "model": "four_blocks",
        "stages": 4,
        "steps": 8,
        "trainer": {"wire": "int8"},
    },
    "al_int8_chunk": {
        "method": "al",
        "model": "two_blocks",
        "stages": 2,
        "steps": 8,
        "chunk": 4,
        "trainer": {"wire": "int8"},
    },
    "bp_int8": {
        "method": "bp",
        "model": "two_blocks",
        "stages": 2,
        "steps": 8,
        "trainer": {"wire": "int8", "microbatches": 2},
    },
    "fdg_int8": {
        "method": "fdg",
        "model": "four_blocks",
        "stages": 4,
        "steps": 15,
        "finish": 9,
        "trainer": {"wire": "int8"},
    },
    "fr_bfloat16": {
        "method": "fr",
        "model": "two_blocks",
        "stages": 2,
        "steps": 8,
        "trainer": {"wire": "bfloat16"},
    },
    # Tables go between the processes, and skips and masks with the activations.
    **{
        f"{model}_{method}": {
            "method": method,
            "model": model,
            "stages": 2,
            "steps": 8,
            "trainer": {"boundaries": [0, 2], **options},
        }
        for model, method, options in (
            ("tied_gpt", "bp", {"microbatches": 2, "clip_norm": 0.5}),
            ("tied_gpt", "dgl", {"ema": 0.5}),
            ("tied_gpt", "fdg", {}),
            ("unet", "early_exit", {"microbatches": 2, "wire": "int8"}),
            ("unet", "fdg", {}),
        )
    },
    "replicas": {"method": "bp", "model": "two_blocks", "data": 2, "steps": 8},
}
FAST = ("deinforeg", "fdg")
STAGED = pytest.mark.parametrize(
    "name", nets.marked([name for name in RUNS if "stages" in RUNS[name]], FAST)
)


class Result(NamedTuple):
    """What one process found in one run."""

    arrays: dict[str, np.ndarray]
    report: dict[str, Any]


class Results(NamedTuple):
    """One run in two processes, and in one."""

    first: Result
    second: Result
    alone: Result

    @property
    def pair(self) -> tuple[Result, Result]:
        return self.first, self.second


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
def results(tmp_path_factory) -> Callable[[str], Results]:
    """Gives the results of a run; the first call trains it, and those that are as fast or slow."""

    @functools.cache
    def group(fast: bool) -> dict[str, Results]:
        return train([name for name in RUNS if (name in FAST) == fast], tmp_path_factory.mktemp)

    return lambda name: group(name in FAST)[name]


def train(names: list[str], new_folder: Callable[[str], Path]) -> dict[str, Results]:
    """Trains these in two processes and in one, all three of them side by side."""
    cores = sorted(os.sched_getaffinity(0))
    port, *transfer = free_ports(3)
    started: list[tuple[str, int, Path, subprocess.Popen]] = []
    try:
        for group, count in (("pair", 2), ("alone", 1)):
            for process in range(count):
                out = new_folder(f"{group}{process}")
                spec = {
                    "runs": {name: RUNS[name] for name in names},
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
    return {
        name: Results(*(load(out, f"{name}_{process}") for _, process, out, _ in started))
        for name in names
    }


def load(out: Path, stem: str) -> Result:
    with np.load(out / f"{stem}.npz") as file:
        return Result(dict(file), json.loads((out / f"{stem}.json").read_text()))


@STAGED
def test_arrays_are_those_of_one_process_to_the_bit(results, name):
    """Weights, statistics, the optimiser's state, and what waits in a delayed method."""
    first, second, alone = (result.arrays for result in results(name))
    assert first
    assert second
    assert not first.keys() & second.keys()
    assert nets.same_bits(first | second, alone)


@STAGED
def test_metrics_are_those_of_one_process_to_the_bit(results, name):
    """`gather_metrics` gives every process the whole."""
    first, second, wanted = (result.report["metrics"] for result in results(name))
    assert len(wanted) == RUNS[name]["steps"]
    for metrics in (first, second):
        np.testing.assert_equal(metrics, wanted)  # where NaN is NaN


@pytest.mark.parametrize(
    ("name", "empty"),
    [
        ("fdg", {0}),
        pytest.param("fdg_four_stages", {0, 1, 2, 9, 10, 11}, marks=pytest.mark.slow),
        pytest.param("interleaved", {0, 1, 2, 5, 6, 7}, marks=pytest.mark.slow),
    ],
)
def test_no_loss_is_known_while_the_stages_fill(results, name, empty):
    for result in results(name).pair:
        losses = [metrics["loss"] for metrics in result.report["metrics"]]
        assert {step for step, loss in enumerate(losses) if np.isnan(loss)} == empty


@pytest.mark.parametrize("name", nets.marked(["fdg", "fr", "fdg_four_stages"], FAST))
def test_every_stage_holds_what_waits(results, name):
    stages = range(RUNS[name]["stages"])
    half = len(stages) // 2
    for result, own in zip(results(name).pair, (stages[:half], stages[half:]), strict=True):
        arrays = result.arrays
        waiting = {
            key.split("/")[0] for key in arrays if "/waiting/" in key and np.any(arrays[key])
        }
        # A batch passes the last stage of Features Replay at once.
        keep = own if name != "fr" else [k for k in own if k != stages[-1]]
        assert waiting == {f"stage_{k}" for k in keep}


@STAGED
def test_evaluation_is_that_of_one_process(results, name):
    first, second, alone = (result.report["evaluation"] for result in results(name))
    assert first == second == alone


@STAGED
def test_every_process_gets_the_predictions_of_one(results, name):
    first, second, alone = (result.report["logits"] for result in results(name))
    assert first == second == alone
    assert np.shape(first)[1] == 24


@STAGED
def test_a_process_holds_its_own_stages_only(results, name):
    first, second = (result.report for result in results(name).pair)
    half = (len(first["blocks"]) - 1) // 2
    placed = {"zbv": [True, False, False, True], "interleaved": [True, False, True, False]}
    own = placed.get(name.removesuffix("_bfloat16"), [True] * half + [False] * half)
    assert first["blocks"][: 2 * half] == own
    assert second["blocks"][: 2 * half] == [not held for held in own]
    assert first["own"] != second["own"]


@pytest.mark.slow
def test_a_slow_receiver_holds_the_sender_back(results):
    """Of twelve batches two may be in flight; without a bound the sender would wait for none."""
    sender = results("slow_end").first.report
    assert sender["seconds"] > 0.1
    assert sender["dispatch_seconds"] > 0.5 * sender["seconds"]


@pytest.mark.slow
def test_replicas_in_two_processes_train_like_one(results):
    first, second, wanted = results("replicas")
    assert nets.same_bits(first.arrays, second.arrays)
    assert nets.largest_error(first.arrays, wanted.arrays) < 1e-4  # float32
    for found in (first.report, second.report):
        for here, there in zip(found["metrics"], wanted.report["metrics"], strict=True):
            assert here == pytest.approx(there, rel=1e-4)
        assert found["evaluation"] == pytest.approx(wanted.report["evaluation"], rel=1e-4)
        np.testing.assert_allclose(found["logits"], wanted.report["logits"], rtol=1e-4, atol=1e-5)
