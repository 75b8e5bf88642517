"""The benchmarks run end to end, at sizes where their times mean nothing."""

import argparse
import importlib
import itertools
import json
import os
import re
import shlex
import sys

import pytest
from benches import REPOSITORY, bench

TWO_CORES = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="pins processes to two cores",
)
TINY = ["--hidden=16", "--depth=2", "--batch=8", "--head=8", "--steps=3", "--repeats=2"]


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "bench"))
    return importlib.import_module


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split(" | ")]


@pytest.mark.slow
@TWO_CORES
def test_plan(tmp_path):
    output = tmp_path / "plan.json"
    given = ["--config=vision:synthetic,mlp,{method}", "--methods", "bp", "--batch=8"]
    done = bench("plan.py", *given, "--steps=2", "--repeats=2", f"--output={output}")
    assert done.returncode == 0, done.stderr
    [row] = json.loads(output.read_text())["rows"]
    assert (row["method"], row["schedule"], len(row["seconds"])) == ("bp", "1f1b", 2)
    assert row["plan"] > 0
    assert row["operations"] > 0
    refused = bench("plan.py", *given, "--steps=2", "--repeats=1", "--least-accurate=1e-9")
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr


# --- Commands that are told of -------------------------------------------------------------------


def commands(*names: str) -> list[list[str]]:
    """Words of the commands in the documents that run one of these scripts."""
    lines = []
    for file in ("bench/RESULTS.md", "docs/accuracy.md", "docs/pipelines.md"):
        for block in re.findall(r"```sh\n(.*?)```", (REPOSITORY / file).read_text(), re.DOTALL):
            lines += block.replace("\\\n", " ").replace("; done", "").splitlines()
    pattern = re.compile(rf"python bench/(?:{'|'.join(names)})\.py (.*)")
    return [shlex.split(match[1]) for line in lines if (match := pattern.search(line))]


def test_matrices_that_are_told_of(benchmark, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    accuracy, matrix = benchmark("accuracy"), benchmark("matrix")
    given = commands("accuracy", "step_time")
    assert len(given) >= 10
    for words in given:
        cells = accuracy.cells_of(accuracy.parser().parse_args(words))
        assert not matrix.is_finished(cells[-1])  # its configuration is checked


def test_rows_that_are_told_of(benchmark):
    rows, given = benchmark("rows"), commands("throughput", "links")
    assert len(given) >= 8
    for words in given:
        start = words.index("--rows") + 1 if "--rows" in words else len(words)
        for word in itertools.takewhile(lambda word: not word.startswith("--"), words[start:]):
            assert str(rows.parse(word)) == word


# --- Throughput ----------------------------------------------------------------------------------


@TWO_CORES
@pytest.mark.slow
def test_throughput_of_processes(tmp_path):
    """A pair of processes equals one process with the same calls to the last bit."""
    output = tmp_path / "runs" / "throughput.json"
    rows = ["bp:1f1b,K=2,M=2", "scpl,K=2", "scpl,K=2,apart"]
    rows += ["scpl:interleaved,K=2", "scpl:interleaved,K=2,apart"]
    done = bench("throughput.py", *TINY, "--place=processes", "--rows", *rows, f"--output={output}")
    assert done.returncode == 0, done.stderr
    measured = json.loads(output.read_text())
    text = output.with_suffix(".md").read_text()
    assert text in done.stdout
    assert measured["setup"]["command"] in text
    assert measured["setup"]["versions"]["jax"] in text
    results = {result["row"]: result for result in measured["results"]}
    assert list(results) == ["bp", rows[0], "scpl", *rows[1:]]
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| row"))
    listed = [cells(line)[0] for line in lines[first + 2 : first + 2 + len(results)]]
    assert listed == [f"`{row}`" for row in results]
    for row, result in results.items():
        spread = result["ms"]
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
        assert result["compile_seconds"] > 0
        assert len(measured["rows"][row]["segments"]) == 2
    bp, piped = results["bp"], results["bp:1f1b,K=2,M=2"]
    assert bp["ratio_to_bp"]["low"] == bp["ratio_to_bp"]["high"] == bp["ideal"] == 1
    assert bp["simulated_ms"] is None
    assert piped["ratio_to_bp"] == piped["ratio_to_method"]
    assert piped["ideal"] == pytest.approx(2 * 2 / 3)
    error = piped["simulated_ms"] / piped["ms"]["median"] - 1
    assert piped["simulated_error"] == pytest.approx(error)
    assert piped["state_bytes"] < bp["state_bytes"] < 2 * piped["state_bytes"]
    segments = measured["rows"]["bp:1f1b,K=2,M=2"]["segments"]
    (core,), (other,) = segments[0]["cores"]
    assert core != other
    assert measured["link"]["latency"] > 0
    (costs,) = segments[0]["costs"]
    assert {(stage, "".join(kinds)) for stage, kinds, _ in costs["calls"]} == {
        *((0, "F"), (0, "B"), (0, "BS"), (1, "FB"), (1, "S")),
    }
    apart = results["scpl,K=2,apart"]
    assert (apart["twin"], apart["equal_to_twin"]) == ("scpl,K=2", True)
    assert apart["ratio_to_twin"]["low"] > 0


@TWO_CORES
@pytest.mark.slow
def test_throughput_of_a_language_model(tmp_path):
    """Methods have as many heads as modules; PyTorch trains as BP does."""
    pytest.importorskip("torch")
    output = tmp_path / "gpt.json"
    flags = [*TINY, "--model=gpt", "--depth=4", "--modules=2", "--place=processes"]
    rows = ["bp:1f1b,K=2,M=2", "dgl,K=2", "fdg,K=2", "torch:1f1b,K=2,M=2", "torch:gpipe,K=2,M=2"]
    done = bench("throughput.py", *flags, "--rows", *rows, f"--output={output}")
    assert done.returncode == 0, done.stderr  # 1 if a loss of PyTorch is another one
    results = {x["row"]: x for x in json.loads(output.read_text())["results"]}
    assert {*rows, "bp", "dgl", "torch"} <= {*results}
    for row in (rows[0], "torch", *rows[3:]):
        assert results[row]["first_loss"] == pytest.approx(results["bp"]["first_loss"], rel=1e-3)
    head = 4 * 2 * (2 * 16 + (16 + 1) * 256)  # of a second module: weights and momenta
    more = results["dgl"]["state_bytes"] - results["bp"]["state_bytes"]
    assert more == pytest.approx(head, rel=0.1)


@TWO_CORES
@pytest.mark.slow
def test_throughput_of_pytorch(tmp_path):
    """All its rows but the compiled one train as BP does: a loss that differs is exit code 1."""
    pytest.importorskip("torch")
    output = tmp_path / "torch.json"
    pipelines = [f"torch:{name},K=2,M=2" for name in ("gpipe", "1f1b", "zero_bubble")]
    pipelines += [f"torch:{name},K=4,M=4" for name in ("zbv", "dualpipe_v")]
    rows = ["--place=processes", "--rows", "torch:ddp,D=2", *pipelines]
    done = bench("throughput.py", *TINY, "--depth=4", *rows, f"--output={output}")
    assert done.returncode == 0, done.stderr
    measured = json.loads(output.read_text())
    assert "torch" in measured["setup"]["versions"]
    results = measured["results"]
    assert [result["row"] for result in results] == ["bp", "torch", *rows[2:]]
    for result in results:
        assert result["first_loss"] == pytest.approx(results[0]["first_loss"], rel=1e-3)
        assert result["ratio_to_bp"]["low"] > 0
    alone, replica, *parts = results[1:]
    assert replica["state_bytes"] == alone["state_bytes"]
    assert all(part["state_bytes"] < alone["state_bytes"] for part in parts)


def test_rows_of_pytorch_that_cannot_run(benchmark, monkeypatch):
    rows, throughput = benchmark("rows"), benchmark("throughput")
    given = [rows.parse(text) for text in ("bp", "torch", "torch:ddp,D=2")]
    for model, kinds, reason in [
        ("mlp", [], "PyTorch is not installed: pip install 'jdecouple[bench]'"),
        ("mlp", ["cpu: cpu"] * 2, "pinned processes or a GPU for each of its devices are needed"),
        ("arrays", [], "PyTorch has no net of arrays here"),
    ]:
        monkeypatch.setitem(sys.modules, "torch", None)  # its import fails
        kept, notes = throughput.runnable(given, argparse.Namespace(model=model), kinds)
        assert kept == given[:1]
        assert notes == [f"- Left out: `torch`, `torch:ddp,D=2`: {reason}."]


def test_losses_of_pytorch_that_differ(benchmark):
    rows, throughput = benchmark("rows"), benchmark("throughput")
    table = [rows.parse(text) for text in ("bp", "torch", "torch:1f1b,K=2,M=4")]
    results = [{"first_loss": loss} for loss in (2.0, 2.001, 2.01)]
    options = {"model": "mlp", "dtype": "float32"}
    assert throughput.differing(table, results, options) == ["torch:1f1b,K=2,M=4"]
    assert not throughput.differing(table, results, options | {"model": "vgg"})


@pytest.mark.slow
def test_throughput_of_devices(tmp_path):
    """Engines and dispatch, on devices that the CPU is made to look like."""
    output = tmp_path / "dispatch.json"
    net = ["--model=arrays", "--hidden=8", "--head=0", "--steps=4", "--repeats=2", "--dispatch=2"]
    rows = ["deinforeg,K=2", "deinforeg,K=2,together", "deinforeg,K=2,T=2"]
    arguments = [*net, "--place=devices", "--rows", *rows, f"--output={output}"]
    fake = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    done = bench("throughput.py", *arguments, **fake)
    assert done.returncode == 0, done.stderr
    measured = json.loads(output.read_text())
    assert measured["setup"]["devices"] == ["cpu: cpu"] * 2
    results = {result["row"]: result for result in measured["results"]}
    assert list(results)[2:] == rows
    for row in rows:
        assert results[row]["arrays"] == 8
        assert 0 < results[row]["dispatched"] <= results[row]["done"]
    assert [results[row].get("equal_to_twin") for row in rows[1:]] == [True, None]


@pytest.mark.slow
def test_engines():
    net = ["--hidden=8", "--depth=4", "--batch=8", "--head=0", "--steps=2", "--repeats=1"]
    rows = ["--rows", "deinforeg,K=2", "deinforeg,K=2,T=2,together,spmd"]
    done = bench("throughput.py", *net, "--place=devices", *rows, JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr
    assert "| `deinforeg,K=2,T=2,together,spmd` | `deinforeg,K=2,together` |" in done.stdout


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
        ("scpl,K=2,apart", 1, 1, "scpl"),
        ("scpl,K=2,T=5,spmd", 2, 2 * 10 / 11, "scpl"),
        ("scpl:interleaved,K=4", 2, 2, "scpl"),
        ("bp:1f1b,K=2,M=4,blocks=2+6", 2, 4 * 8 / (3 * 6 + 8), "bp"),
        ("fdg,K=2,blocks=1+3", 2, 4 / 3, "fdg,K=2,together"),
        ("torch", 1, 1, "torch"),
        ("torch:ddp,D=2", 2, 2, "torch"),
        ("torch:1f1b,K=2,M=4", 2, 1.6, "torch"),
        ("torch:zero_bubble,K=2,M=4", 2, 2 * 12 / 13, "torch"),
        ("torch:zbv,K=4,M=4", 2, 2 * 240 / 241, "torch"),
        ("torch:dualpipe_v,K=4,M=8", 2, 2 * 48 / 49, "torch"),
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
        ("fdg,K=2,blocks=1+0", "'blocks=1+0' is none"),
        ("fdg,K=2,blocks=1+2+3", "blocks of 3 stages of ours, K is 2"),
        ("fdg,K=2,M=2", "schedule delayed takes 1"),
        ("bp,D=2,together", "D is 2"),
        ("torch:dual", "method torch runs on eager, compiled, ddp"),
        ("torch,spmd", "'spmd' is none of"),
    ],
)
def test_bad_rows(benchmark, text, words):
    with pytest.raises(ValueError) as error:
        benchmark("rows").parse(text)
    assert str(error.value).startswith(f"row {text!r}: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "twin"),
    [
        ("scpl,K=2,T=4,together", "scpl,K=2,together"),
        ("scpl,K=2,together,spmd", "scpl,K=2,together"),
        ("scpl,K=2,together", "scpl,K=2"),
        ("scpl,K=2", "None"),
        ("scpl,K=4,apart", "None"),
    ],
)
def test_what_a_row_is_compared_with(benchmark, text, twin):
    rows = benchmark("rows")
    table = [rows.parse(x) for x in ("scpl,K=2", "scpl,K=2,together")]
    assert str(rows.parse(text).twin(table)) == twin


def test_simulation_of_a_row_takes_medians(benchmark):
    row = benchmark("rows").parse("scpl,K=2")
    sizes = {"message_bytes": [10], "error_bytes": [8]}
    replies = [
        {"calls": [[0, "FBS", 1.0 + late], [1, "FBS", 2.0 + late]], **sizes}
        for late in (0.0, 0.5, 9.0)
    ]
    link = {"bandwidth": 20.0, "latency": 0.25}
    assert row.simulated(replies, link, batches=3) == pytest.approx(1.5 + 0.75 + 3 * 2.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "bp", "bp:local"], "row 'bp:local': method bp runs on"),
        (["--rows", "fdg,K=3"], "10 modules are no multiple of K"),
        (["--rows", "fdg,K=2,blocks=3+5"], "10 modules are not the sum of the blocks"),
        (["--rows", "bp:gpipe,M=3"], "--batch 256 is no multiple of M x D"),
        (["--model=gpt", "--modules=3"], "--depth 8 is no multiple of --modules 3"),
        (["--modules=2", "--rows=fdg,K=5"], "2 modules are no multiple of K"),
        (["--rows", "scpl,T=3"], "--steps 40 is no multiple of T"),
        (["--place=processes", "--rows", "bp,D=256"], "the rows need 256 cores"),
        (["--rows", "torch:ddp,K=2"], "row 'torch:ddp,K=2': ddp takes no K"),
        (["--rows", "torch:1f1b,K=2,M=1"], "K of at least 2 and a multiple of it as M are needed"),
        (["--rows", "torch:zbv,K=2,M=4"], "K of at least 4 and a multiple of it as M are needed"),
        (["--rows", "torch:compiled,together"], "PyTorch's rows take no together"),
        (["--repeats=0"], "--repeats: 0 is no number of at least 1"),
    ],
)
def test_options_that_do_not_fit(benchmark, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["throughput.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        benchmark("throughput").parse()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


# --- The runner ----------------------------------------------------------------------------------


def test_arms_take_turns(benchmark, capsys):
    runner, order = benchmark("runner"), []

    def arm(name, ms):
        def train():
            order.append(name)
            return {"ms": ms * len(order)}

        return train

    segments = runner.turns({"a": arm("a", 2.0), "b": arm("b", 1.0)}, 2)
    assert order == ["a", "b", "a", "b"]
    assert runner.ratios(segments["a"], segments["b"]) == runner.Spread(1.25, 1.0, 1.5)
    assert "repeat 2: b, 4.0 ms" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "1.5", "x", "nan", "inf"])
def test_counts_of_flags(benchmark, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is no number of at least 1"):
        benchmark("runner").count(text)


# --- Steps ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_peers(tmp_path):
    pytest.importorskip("torch")
    output = tmp_path / "peers.json"
    sizes = ["--width=0.0625", "--projector=16-8", "--batch=4", "--steps=1", "--repeats=2"]
    peers = ["--peers", "eager"]
    done = bench("peers.py", *sizes, *peers, f"--output={output}", JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr  # 1 if their first losses differ
    results = json.loads(output.read_text())["results"]
    losses = {(result["method"], result["set_up"]): result["first_loss"] for result in results}
    for method in ("deinforeg", "bp"):
        ours = losses.pop((method, "jdecouple"))
        assert losses.pop((method, "eager")) == pytest.approx(ours, rel=1e-3)
    assert not losses
    assert all(result["ours_over_ms"]["low"] > 0 for result in results)


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
    first, second = json.loads((tmp_path / "step-time.json").read_text())["results"]
    assert first["cell"] == "digits mlp depth=1 deinforeg seed=0"
    assert first["parameters"] < second["parameters"]
    assert first["ratio"] == {"median": 1, "low": 1, "high": 1}
    assert min(second["ratio"]["low"], second["ms"]["low"]) > 0


def test_step_time_of_a_bad_configuration(benchmark, monkeypatch, capsys, tmp_path):
    matrix = ["--methods", "bp", "--data", "digits", "--models", "mlp", "--set", "batch_size=0"]
    monkeypatch.setattr(sys, "argv", ["step_time.py", *matrix, f"--output={tmp_path}"])
    with pytest.raises(SystemExit) as stop:
        benchmark("step_time").main()
    assert stop.value.code == 2
    assert "batch_size is 0" in capsys.readouterr().err
