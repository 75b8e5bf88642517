"""The benchmarks run end to end, at sizes where their times mean nothing."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
TWO_CORES = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="pins processes to two cores",
)


def bench(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("XLA_FLAGS", None)
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **variables}
    command = [sys.executable, str(REPOSITORY / "bench" / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)


@TWO_CORES
@pytest.mark.slow
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


@pytest.mark.slow
def test_peers(tmp_path):
    pytest.importorskip("torch")
    output = tmp_path / "peers.json"
    sizes = ["--width=0.0625", "--projector=16-8", "--batch=4", "--steps=1", "--repeats=2"]
    peers = ["--peers", "eager"]
    done = bench("peers.py", *sizes, *peers, f"--output={output}", JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr  # 1 if their first losses differ
    results = json.loads(output.read_text())["results"]
    assert {(each["method"], each["set_up"]) for each in results} == {
        (method, name) for method in ("deinforeg", "bp") for name in ("jdecouple", "eager")
    }
    for each in results:
        ours = next(
            other
            for other in results
            if (other["method"], other["set_up"]) == (each["method"], "jdecouple")
        )
        assert each["first_loss"] == pytest.approx(ours["first_loss"], rel=1e-3)
        assert each["ours_over_ms"]["low"] > 0


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_dispatch(tmp_path, chunk):
    output = tmp_path / "dispatch.json"
    sizes = ("--leaves=8", "--steps=5", f"--chunk={chunk}")
    done = bench("dispatch.py", *sizes, f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert sum(line.startswith("| 8 |") for line in done.stdout.splitlines()) == 1
    found = json.loads(output.read_text())["found"]
    assert [each["placement"] for each in found] == ["devices", "apart", "fused"]
    for each in found:
        assert 0 < each["dispatched"]["median"] <= each["done"]["median"]


@pytest.mark.slow
def test_step_time(tmp_path):
    matrix = ["--methods", "deinforeg", "--data", "digits", "--models", "mlp"]
    matrix += [
        "--set",
        "method.projector=8-4",
        "model.hidden=8",
        "--sweep",
        "model.depth",
        "1",
        "3",
    ]
    done = bench("step_time.py", *matrix, "--steps=2", "--segments=2", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    first, second = json.loads((tmp_path / "step-time.json").read_text())["found"]
    assert first["cell"] == "digits mlp depth=1 deinforeg seed=0"
    assert first["parameters"] < second["parameters"]
    assert first["ratio"] == {"median": 1, "low": 1, "high": 1}
    assert min(second["ratio"]["low"], second["ms"]["low"]) > 0


@pytest.mark.slow
def test_step_time_of_a_bad_configuration(tmp_path):
    matrix = ["--methods", "bp", "--data", "digits", "--models", "mlp", "--set", "batch_size=0"]
    done = bench("step_time.py", *matrix, f"--output={tmp_path}")
    assert done.returncode == 2
    assert "batch_size is 0" in done.stderr
    assert "Traceback" not in done.stderr


# --- Throughput ----------------------------------------------------------------------------------

COLUMNS = (
    *("row", "devices", "ms per batch", "examples/s", "x bp", "x same method", "ideal"),
    *("simulated ms", "dispatch us", "input wait", "peak MB", "state MB", "compile s"),
)
TINY = ["--hidden=16", "--depth=2", "--batch=8", "--head=8", "--steps=3", "--repeats=2"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split(" | ")]


def throughput(tmp_path: Path, *arguments: str, **variables: str) -> dict[str, Any]:
    """What the benchmark writes; checks what all its tables share."""
    output = tmp_path / "runs" / "throughput.json"
    done = bench("throughput.py", *TINY, *arguments, f"--output={output}", **variables)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    text = output.with_suffix(".md").read_text()
    assert text in done.stdout
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| row"))
    assert cells(lines[first]) == list(COLUMNS)
    listed = [cells(line) for line in lines[first + 2 : first + 2 + len(found["results"])]]
    assert [row[0] for row in listed] == [f"`{each['row']}`" for each in found["results"]]
    assert all(len(row) == len(COLUMNS) for row in listed)
    assert found["setup"]["versions"]["jax"] in text
    assert found["setup"]["command"] in text
    for each in found["results"]:
        spread = each["ms"]
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
        assert each["examples_per_second"] == pytest.approx(8e3 / spread["median"])
        assert each["dispatch_us"] > 0
        assert each["compile_seconds"] > 0
        assert each["peak_bytes"] is None or each["peak_bytes"] >= each["state_bytes"]
        assert len(found["rows"][each["row"]]["segments"]) == 2
    bp = found["results"][0]
    assert bp["row"] == "bp"
    assert bp["ratio_to_bp"]["low"] == bp["ratio_to_bp"]["high"] == bp["ideal"] == 1
    return found


@TWO_CORES
@pytest.mark.slow
def test_throughput_of_processes(tmp_path):
    found = throughput(tmp_path, "--place=processes", "--rows", "bp:1f1b,K=2,M=2", "bp")
    alone, piped = found["results"]
    assert piped["row"] == "bp:1f1b,K=2,M=2"
    assert (piped["devices"], alone["devices"]) == (2, 1)
    assert piped["ideal"] == pytest.approx(2 * 2 / 3)
    assert piped["ratio_to_bp"] == piped["ratio_to_method"]
    error = piped["simulated_ms"] / piped["ms"]["median"] - 1
    assert piped["simulated_error"] == pytest.approx(error)
    assert alone["simulated_ms"] is None
    assert piped["state_bytes"] < alone["state_bytes"] < 2 * piped["state_bytes"]
    first, second = found["rows"]["bp:1f1b,K=2,M=2"]["segments"][0]["cores"]
    assert len(first) == len(second) == 1
    assert first != second
    assert found["link"]["latency"] > 0
    (costs, _) = found["rows"]["bp:1f1b,K=2,M=2"]["costs"]
    assert {(stage, kinds) for stage, kinds, _ in costs["calls"]} == {
        *((0, "F"), (0, "B"), (0, "BS"), (1, "FB"), (1, "S")),
    }


@pytest.mark.slow
def test_throughput_of_stages_that_share_a_device(tmp_path):
    arguments = ["--place=devices", "--input=host", "--rows", "bp:gpipe,K=2,M=2", "fdg,K=2"]
    found = throughput(tmp_path, *arguments, JAX_PLATFORMS="cpu")
    listed = ["bp", "bp:gpipe,K=2,M=2,together", "fdg,K=2,together"]
    assert [each["row"] for each in found["results"]] == listed
    assert found["setup"]["devices"] == ["cpu: cpu"]
    for each in found["results"]:
        assert (each["devices"], each["ideal"], each["simulated_ms"]) == (1, 1, None)
        assert 0 <= each["input_wait"] < 1
    alone, piped, delayed = (each["state_bytes"] for each in found["results"])
    assert alone == piped < delayed  # with its queues


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "bench"))
    return importlib.import_module


@pytest.mark.parametrize(
    ("text", "devices", "ideal", "reference"),
    [
        ("bp", 1, 1, "bp"),
        ("bp,D=4", 4, 4, "bp"),
        ("bp,K=3", 3, 1, "bp"),
        ("bp:gpipe,K=2,M=4", 2, 1.6, "bp"),
        ("bp:1f1b,K=4,D=2,M=8", 8, 2 * 4 * 8 / 11, "bp"),
        ("bp:interleaved_1f1b,K=4,M=4", 2, 2 * 4 / 4.5, "bp"),
        ("scpl,K=2", 2, 2 * 10 / 11, "scpl"),
        ("deinforeg,K=2,M=4", 2, 2 * 40 / 41, "deinforeg"),
        ("fdg,K=3", 3, 3, "fdg,K=3,together"),
        ("ddg", 1, 1, "ddg"),
        ("fr,K=2,together", 1, 1, "fr,K=2,together"),
        ("scpl,K=2,T=5", 2, 2 * 10 / 11, "scpl"),
    ],
)
def test_rows(benchmark, text, devices, ideal, reference):
    row = benchmark("rows").parse(text)
    assert str(row) == text
    assert (row.devices, str(row.reference)) == (devices, reference)
    assert row.ideal(batches=10) == pytest.approx(ideal)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sgd", "unknown method 'sgd'"),
        ("bp:local", "method bp runs on sequential, gpipe, 1f1b"),
        ("bp:gpipe,N=2", "'N=2' is none of K=, D=, M=, T="),
        ("bp:gpipe,K=0", "'K=0' is none"),
        ("fdg,K=2,M=2", "schedule delayed takes 1"),
        ("bp,D=2,together", "D is 2"),
    ],
)
def test_bad_rows(benchmark, text, words):
    with pytest.raises(ValueError) as error:
        benchmark("rows").parse(text)
    assert str(error.value).startswith(f"row {text!r}: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_simulation_of_a_row_takes_medians(benchmark):
    row = benchmark("rows").parse("scpl,K=2")
    sizes = {"message_bytes": [10], "error_bytes": [8]}
    found = [
        {"calls": [[0, "FBS", 1.0 + late], [1, "FBS", 2.0 + late]], **sizes}
        for late in (0.0, 0.5, 9.0)
    ]
    link = {"bandwidth": 20.0, "latency": 0.25}
    assert row.simulated(found, link, batches=3) == pytest.approx(1.5 + 0.75 + 3 * 2.5)


# --- Scaling -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_scaling(tmp_path):
    measured, output = tmp_path / "throughput.json", tmp_path / "scaling.json"
    picture = tmp_path / "docs" / "scaling.png"
    spread = {"median": 1.5, "low": 1.25, "high": 1.75}
    rows = ("bp", "bp:gpipe,K=2,M=4", "fdg,K=2,together", "bp:1f1b,K=4,M=4")
    results = [{"row": row, "devices": 2, "ratio_to_method": spread} for row in rows]
    measured.write_text(json.dumps({"results": results}))
    arguments = ["--hidden=16", "--batch=8", "--head=8", "--stages=4", "--repeats=2"]
    files = [f"--measured={measured}", f"--output={output}", f"--picture={picture}"]
    done = bench("scaling.py", *arguments, *files, JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr
    assert output.with_suffix(".md").read_text() in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    header = next(line for line in done.stdout.splitlines() if line.startswith("| K "))
    found = json.loads(output.read_text())
    assert cells(header) == ["K", *found["speed_up"]]
    for curve in found["speed_up"].values():
        assert set(curve) == {"1", "2", "4"}
        assert curve["1"] == pytest.approx(1)
        assert all(0 < value <= int(stages) + 1e-9 for stages, value in curve.items())
    assert [each["row"] for each in found["measured"]] == ["bp:gpipe,K=2,M=4"]
    assert "`bp:gpipe,K=2,M=4` 1.50 (1.25 to 1.75)" in done.stdout


def test_scaling_over_a_free_link_is_that_of_the_schedule(benchmark):
    scaling = benchmark("scaling")
    found = {"F": 1.0, "B": 2.0, "S": 0.0, "local": 4.0, "delayed": 3.5}
    found |= {"message_bytes": 7, "error_bytes": 5}
    link = {"bandwidth": float("inf"), "latency": 0.0}
    for series in scaling.SERIES:
        parts = {"": None, "4": 4, "8": 8, "4K": 32}[series.microbatches]
        wanted = 8 if parts is None else 8 * parts / (parts + 7)
        assert scaling.speed_up(series, 8, found, link) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("concurrency.py", ["--depth=3"], "--depth is 3"),
        pytest.param("concurrency.py", ["--stages=1"], "--stages is 1", marks=pytest.mark.slow),
        pytest.param("concurrency.py", ["--steps=0"], "at least 1", marks=pytest.mark.slow),
        ("throughput.py", ["--rows", "bp", "bp:local"], "row 'bp:local': method bp runs on"),
    ],
)
def test_bad_options(name, arguments, message):
    done = bench(name, *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("throughput", ["--rows", "fdg,K=3"], "--depth 10 is no multiple of K"),
        ("throughput", ["--rows", "bp:gpipe,M=3"], "--batch 256 is no multiple of M x D"),
        ("throughput", ["--place=processes", "--rows", "bp,D=256"], "the rows need 256 cores"),
        ("throughput", ["--model=resnet20", "--depth=4"], "--depth is for mlp and vgg"),
        ("throughput", ["--repeats=0"], "--repeats is 0"),
        ("scaling", ["--measured=nowhere.json"], "'nowhere.json' is no JSON of throughput.py"),
        ("scaling", ["--bandwidth=0"], "--bandwidth must be above 0"),
    ],
)
def test_options_that_do_not_fit(benchmark, monkeypatch, capsys, name, arguments, message):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        benchmark(name).parse()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
