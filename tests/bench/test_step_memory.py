"""Benchmarks of what a step holds, and of its dispatch, at sizes where the figures mean nothing."""

import itertools
import json

import pytest
from benches import bench


@pytest.mark.slow
def test_memory(tmp_path):
    output = tmp_path / "memory.json"
    flags = ["--nets=resnet20", "--width=0.25", "--batch=16", "--modules=4", "--repeats=1"]
    rows = ["bp,elementwise", "greedy_exit,elementwise"]
    done = bench("memory.py", *flags, "--limit=16", f"--output={output}", "--rows", *rows)
    assert done.returncode == 0, done.stderr
    results = {(x["row"], x["modules"]): x for x in json.loads(output.read_text())["results"]}
    whole, local = results["bp,elementwise", ""], results["greedy_exit,elementwise", 4]
    assert local["temporaries"] < whole["temporaries"]
    assert local["largest_batch"] > whole["largest_batch"] >= 64


@pytest.mark.slow
def test_split(tmp_path):
    """What waits for W are two arrays of every convolution, and fewer than wait for a backward."""
    output = tmp_path / "split.json"
    flags = ["--nets=vgg8", "--batch=16", "--remats=none", "--repeats=1"]
    done = bench("split.py", *flags, f"--output={output}")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(output.read_text())["results"]
    assert 0 < row["for_weight"] < row["for_backward"]
    assert row["ratio"]["median"] > 0


@pytest.mark.slow
def test_replicas(tmp_path):
    output = tmp_path / "replicas.json"
    done = bench("replicas.py", "--nets=mlp", "--replicas=2", f"--output={output}")
    assert done.returncode == 0, done.stderr
    whole, parts = json.loads(output.read_text())["results"]
    assert whole["opt"] == pytest.approx(2 * parts["opt"], rel=1e-3)
    assert whole["most"] - parts["most"] == pytest.approx(parts["opt"], rel=0.2)


@pytest.mark.slow
def test_dispatch_of_joined_arrays(tmp_path):
    output = tmp_path / "dispatch.json"
    tiny = ["--arrays=8", "--calls=3", "--repeats=2", f"--output={output}"]
    done = bench("dispatch.py", *tiny, JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="2")
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())["results"]
    assert [row["place"] for row in results] == ["devices", "apart", "fused", "bare"]
    for row in results:
        for segment in itertools.chain(*row["segments"]):
            assert segment["arrays"] == row["arrays"] == (5 if row["place"] == "bare" else 8)
            assert 0 < segment["dispatched"] <= segment["done"]
    refused = bench("dispatch.py", "--places=apart", "--method=bp:local")
    assert refused.returncode == 2
    assert "method bp runs on sequential" in refused.stderr
