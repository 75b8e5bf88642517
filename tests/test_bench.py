"""The benchmarks run end to end, at sizes where their times mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def bench(name: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("XLA_FLAGS", None)
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, str(REPOSITORY / "bench" / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="pins processes to two cores",
)
def test_concurrency(tmp_path):
    output = tmp_path / "runs" / "concurrency.json"
    sizes = ["--hidden=16", "--depth=2", "--batch=8", "--head=8", "--steps=3", "--repeats=2"]
    done = bench("concurrency.py", *sizes, f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert "equal to the last bit" in done.stdout
    assert "NOT equal" not in done.stdout
    found = json.loads(output.read_text())
    result = found["result"]
    assert result["bit_equal"]
    assert result["batches"] == 3 + 2 * 3
    for name, spread in result["ms"].items():
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
        assert len(found["segments"][name]) == 1 + 2
    cores = [place for each in found["segments"]["pair"] for place in each["cores"]]
    assert all(len(place) == 1 for place in cores)
    assert cores[0] != cores[1]
    assert set(found["digests"]["pair"]) == {"0", "1"}
    assert set(found["segments"]["pair"][0]["losses"][0]) == {"block_0/loss", "block_1/loss"}


def test_dispatch(tmp_path):
    output = tmp_path / "dispatch.json"
    done = bench("dispatch.py", "--leaves=8", "--steps=5", f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert sum(line.startswith("| 8 |") for line in done.stdout.splitlines()) == 1
    found = json.loads(output.read_text())["found"]
    assert [each["placement"] for each in found] == ["devices", "apart", "fused"]
    for each in found:
        assert 0 < each["dispatched"]["median"] <= each["done"]["median"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("concurrency.py", ["--depth=3"], "--depth is 3"),
        ("concurrency.py", ["--stages=1"], "--stages is 1"),
        ("concurrency.py", ["--steps=0"], "must be at least 1"),
    ],
)
def test_bad_options(name, arguments, message):
    done = bench(name, *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
