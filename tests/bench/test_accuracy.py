"""Matrices of trainings: what they run, resume and report."""

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import runs

BENCH = runs.REPOSITORY / "bench"
TINY = (
    *("data.synthetic_size=40", "data.image_size=8", "data.channels=1"),
    *("batch_size=8", "eval_every=1", "mesh.stages=1"),
)
MLP = ("mlp", "model.hidden=8", "model.depth=2")
HEAD = ("deinforeg", "method.projector=8-4")
FLAGS = ["--data", "synthetic", "--set", *TINY, "--set-for", *MLP]


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of the benchmarks; trainings get one device."""
    monkeypatch.syspath_prepend(str(BENCH))
    for name, value in runs.environment().items():
        monkeypatch.setenv(name, value)
    return importlib.import_module


def call(bench, capsys, *arguments):
    """Runs the benchmark in this process; gives exit code and what it printed."""
    accuracy = bench("accuracy")
    flags = accuracy.parser()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench/accuracy.py", *map(str, arguments)])
        try:
            code = accuracy.main(flags.parse_args(), flags)
        except SystemExit as stop:
            code = stop.code
    return code, capsys.readouterr()


def rows(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def table(folder):
    lines = (folder / "results.md").read_text().splitlines()
    header, _, *body = (
        [cell.strip() for cell in line.strip("| ").split("|")] for line in lines if "|" in line
    )
    return [dict(zip(header, line, strict=True)) for line in body]


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


# --- Real trainings ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_matrix_and_more_of_it(bench, capsys, tmp_path):
    flags = [*FLAGS, "--set-for", *HEAD, "--set", "steps=2", "--output", tmp_path]
    methods = ["--methods", "bp", "deinforeg"]
    code, shown = call(bench, capsys, *methods, "--models", "mlp", "vgg8", *flags, "--jobs", 2)
    assert code == 1  # images of 8 pixels are too small for vgg8
    assert "4 cells, 0 of them finished" in shown.out
    results = {(row["model"], row["method"]): row for row in rows(tmp_path)}
    assert {key: row["state"] for key, row in results.items()} == {
        **{("mlp", method): "finished" for method in ("bp", "deinforeg")},
        **{("vgg8", method): "failed" for method in ("bp", "deinforeg")},
    }
    assert results["vgg8", "bp"]["error"].startswith("error: ")
    assert results["vgg8", "bp"]["error"] in (tmp_path / "results.md").read_text()
    assert "image" in results["vgg8", "bp"]["error"]
    cell = tmp_path / "cells" / "synthetic-mlp-deinforeg-seed=0"
    last = [line for line in runs.lines(cell) if line["split"] == "test"][-1]
    assert float(results["mlp", "deinforeg"]["test"]) == last["accuracy"]
    assert results["mlp", "deinforeg"]["steps"] == "2"
    before = runs.fingerprint(cell)

    seeds = ["--models", "mlp", "--seeds", "0", "1"]
    code, shown = call(bench, capsys, *methods, *seeds, *flags)
    assert (code, shown.err) == (0, "")
    assert "4 cells, 2 of them finished" in shown.out
    assert runs.fingerprint(cell) == before
    assert [row["seed"] for row in rows(tmp_path)] == ["0", "1"] * 2
    values = [100 * float(row["test"]) for row in rows(tmp_path) if row["method"] == "bp"]
    (bp,) = [line for line in table(tmp_path) if line["method"] == "bp"]
    deviation = abs(values[0] - values[1]) / 2**0.5
    assert bp["last step"] == f"{sum(values) / 2:.2f} ± {deviation:.2f}"
    assert bp["seeds"] == "2"
    assert is_png(tmp_path / "results.png")
    text = (tmp_path / "results.md").read_text()
    assert "bench/accuracy.py --methods bp deinforeg" in text
    assert "jax 0." in text

    code, shown = call(bench, capsys, *methods, *seeds, *flags, "--set", "clip_norm=1")
    assert code == 2
    assert "holds a run with clip_norm = None, now 1.0" in shown.err.splitlines()[-1]


def test_label_noise(bench, tmp_path):
    """The matrix of bench/label_noise.txt, and flags after it."""
    accuracy = bench("accuracy")
    given = [f"@{BENCH / 'label_noise.txt'}", "--seeds", "0", "--set", "epochs=1"]
    options = accuracy.parser().parse_args([*given, "--output", str(tmp_path)])
    cells = {cell.title: cell for cell in accuracy.cells_of(options)}
    assert len(cells) == 3 * 5
    arguments = cells["fashion_mnist vgg8 label_noise=0.4 scpl seed=0"].arguments
    assert list(arguments[5:]) == [
        *("--config.epochs=3", "--config.epochs=1", "--config.model.width=0.125"),
        *("--config.method.hidden=256", "--config.method.features=256"),
        *("--config.data.label_noise=0.4", "--config.seed=0"),
    ]


def test_language_models(bench, tmp_path):
    """The matrix of bench/lm.txt: K is a part of --config, and bp has one of its values."""
    accuracy = bench("accuracy")
    given = [f"@{BENCH / 'lm.txt'}", "--seeds", "0", "--output", str(tmp_path)]
    options = accuracy.parser().parse_args(given)
    cells = {cell.title: cell for cell in accuracy.cells_of(options)}
    assert "stdlib gpt K=2 bp seed=0" in cells
    assert "stdlib gpt K=4 bp seed=0" not in cells
    cell = cells["stdlib gpt K=4 dgl_layer seed=0"]
    assert cell.arguments[1].endswith("lm.py:stdlib,gpt,dgl,4")
    assert "--config.method.name=dgl" in cell.arguments
    assert not any(text.startswith("--config.K") for text in cell.arguments)
    of_dgl = cells["stdlib gpt K=4 dgl seed=0"].arguments
    assert [text for text in cell.arguments if text not in of_dgl] == [
        "--config.method.aux=transformer"
    ]


@pytest.mark.parametrize("path", sorted(BENCH.glob("*.txt")), ids=lambda path: path.stem)
def test_matrices_in_files_can_be_run(bench, tmp_path, path):
    """Configurations of all cells of one seed, as they are read before any is trained."""
    accuracy = bench("accuracy")
    given = [f"@{path}", "--seeds", "0", "--output", str(tmp_path)]
    cells = accuracy.cells_of(accuracy.parser().parse_args(given))
    assert {accuracy.matrix.is_finished(cell) for cell in cells} == {False}


@pytest.mark.slow
def test_stopped_killed_and_resumed(bench, capsys, tmp_path):
    cell = tmp_path / "cells" / "synthetic-mlp-bp-seed=0"
    flags = [*FLAGS, "--set", "steps=1500", "checkpoint.every=20", "eval_every=500"]
    flags += ["--models", "mlp", "--methods", "bp", "--output", str(tmp_path)]

    def output():
        path = cell / "output.txt"
        return path.read_text() if path.exists() else ""

    def start(condition):
        command = [sys.executable, str(BENCH / "accuracy.py"), *flags]
        process = subprocess.Popen(command, env=runs.environment(), stdout=subprocess.PIPE)
        end = time.monotonic() + runs.SECONDS
        while not condition():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        return process

    first = start(lambda: any(cell.glob("checkpoints/*")) and "step 50/" in output())
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=runs.SECONDS)
    assert first.returncode == 130
    assert [row["state"] for row in rows(tmp_path)] == ["stopped"]
    assert (
        "- data=synthetic model=mlp method=bp seed=0: stopped"
        in (tmp_path / "results.md").read_text()
    )
    assert output().count("the same command continues") == 1

    second = start(lambda: "continuing from step" in output())
    second.kill()  # the training itself lives on
    second.communicate()
    code, _ = call(bench, capsys, *flags)
    assert code == 0
    assert output().count("continuing from step") == 1
    assert [row["steps"] for row in rows(tmp_path)] == ["1500"]


# --- Stubs ---------------------------------------------------------------------------------------

STUB = """
import json, os, pathlib, sys
workdir = pathlib.Path(sys.argv[-1])
names = ("CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_PREALLOCATE")
place = [sorted(os.sched_getaffinity(0)), [os.environ.get(name) for name in names]]
(workdir / "place.json").write_text(json.dumps(place))
print("the workdir is", workdir, flush=True)
if "seed=1" in str(workdir):
    os.kill(os.getpid(), 9)
if "seed=2" in str(workdir):
    sys.exit("error: told before the end\\nthe end")
if "seed=3" in str(workdir):
    raise OverflowError("no space")
"""


def stub_cells(bench, tmp_path, monkeypatch, seeds):
    matrix = bench("matrix")
    (tmp_path / "train.py").write_text(STUB)
    monkeypatch.setattr(matrix, "TRAIN", tmp_path / "train.py")
    axes = {"data": ["digits"], "model": ["mlp"], "method": ["bp"], "seed": seeds}
    config = str(runs.REPOSITORY / "configs" / "equal.py") + ":{data},{model},{method}"
    return matrix, matrix.cells(config, axes, [], [], tmp_path / "cells")


def test_outcomes(bench, tmp_path, monkeypatch):
    matrix, cells = stub_cells(bench, tmp_path, monkeypatch, list("0123"))
    results = {}
    assert matrix.run(cells, matrix.slots(2), lambda cell, x: results.update({cell.title[-1]: x}))
    assert results == {
        "0": ("stopped", ""),  # it ended well, but there is no result
        "1": ("failed", "killed by SIGKILL"),
        "2": ("failed", "error: told before the end"),
        "3": ("failed", "OverflowError: no space"),
    }


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="pins processes to cores")
@pytest.mark.parametrize(
    ("jobs", "gpus", "variables"),
    [(1, [], [[None, None]]), (2, [], [[None, "false"]] * 2), (2, ["4", "7"], [["4", None]])],
)
def test_places(bench, tmp_path, monkeypatch, jobs, gpus, variables):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    matrix, cells = stub_cells(bench, tmp_path, monkeypatch, ["0", "4"][:jobs])
    matrix.run(cells, matrix.slots(jobs, gpus), lambda *_: None)
    places = [json.loads((cell.folder / "place.json").read_text()) for cell in cells]
    own, cores = [set(place[0]) for place in places], os.sched_getaffinity(0)
    assert set().union(*own) == cores
    if jobs == 2 <= len(cores):
        assert not own[0] & own[1]
    assert [place[1] for place in places][: len(variables)] == variables


def test_more_jobs_than_cores(bench):
    for slot in bench("matrix").slots(1000):
        assert len(slot.cores) <= 1


def test_a_training_that_still_runs_is_waited_for(bench, tmp_path, monkeypatch):
    import fcntl

    matrix, cells = stub_cells(bench, tmp_path, monkeypatch, ["0", "4"])
    cells[0].folder.mkdir(parents=True)
    other = (cells[0].folder / matrix.OUTPUT).open("a")
    fcntl.flock(other, fcntl.LOCK_EX)
    order = []

    def ended(cell, _):
        order.append(cell.axes["seed"])
        other.close()

    matrix.run(cells, matrix.slots(1), ended)
    assert order == ["4", "0"]


# --- Results -------------------------------------------------------------------------------------


def line(step, split, accuracy, *exits):
    exit_values = {f"exit_{number}/accuracy": value for number, value in enumerate(exits)}
    base = {"step": step, "split": split, "accuracy": accuracy, "examples_per_second": 5.0 * step}
    base["loss"] = 1 - accuracy
    return base | exit_values


def finished(bench, folder, lines):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    written = {"parameters": 7, "device_kind": "cpu", "total_steps": 20}
    (folder / "config.json").write_text(json.dumps(written))
    return bench("matrix").result(bench("matrix").Cell({}, folder, []))


TRAIN = [line(step, "train", 0.5) for step in (4, 8, 20)]
TESTS = [line(10, "test", 0.6, 0.9, 0.6), line(20, "test", 0.5, 0.7, 0.5)]


def test_what_is_chosen_by_what(bench, tmp_path):
    validation = [line(10, "validation", 0.8, 0.1, 0.8), line(20, "validation", 0.7, 0.75, 0.7)]
    results = finished(bench, tmp_path / "cell", [*TRAIN, *validation, *TESTS])
    assert results == {
        "test": 0.5,
        "loss": 0.5,
        "test_by_exit": 0.7,
        "exit": "exit_0",
        "test_by_step": 0.6,
        "papers": 0.9,
        "validation": 0.7,
        "steps": 20,
        "parameters": 7,
        "examples_per_second": 40.0,
        "device": "cpu",
    }


def test_without_validation(bench, tmp_path):
    results = finished(bench, tmp_path / "cell", [*TRAIN, *TESTS])
    assert (results["test"], results["papers"]) == (0.5, 0.9)
    empty = ("test_by_exit", "exit", "test_by_step", "validation")
    assert [results[key] for key in empty] == [None] * 4


def made_up(method, seed, test, **more):
    axes = {"data": "digits", "model": "mlp", "method": method, "seed": seed}
    state = {"state": "failed", "error": "error: x"} if test is None else {"state": "finished"}
    result = {} if test is None else {"test": test, "loss": 2 * test}
    return {**axes, "error": "", **state, **result, **more}


def test_means_leave_out_what_failed(bench):
    results = [made_up("bp", "0", 0.5), made_up("bp", "1", 0.7), made_up("bp", "2", None)]
    text = bench("accuracy").markdown([*results, made_up("scpl", "0", 0.25, test_by_exit=0.5)])
    assert "| digits | mlp | bp | 2 of 3 | 60.00 ± 14.14 |  |  |  | 1.2000 ± 0.2828 |" in text
    assert "| digits | mlp | scpl | 1 | 25.00 | 50.00 |  |  | 0.5000 |" in text
    assert "- data=digits model=mlp method=bp seed=2: failed: `error: x`" in text


def test_bits_of_language_models(bench, tmp_path):
    tests, validation = line(20, "test", 0.5, 0.7, 0.5), line(20, "validation", 0.6, 0.6, 0.6)
    tests |= {"bits_per_byte": 2.0, "exit_0/bits_per_byte": 3.0, "exit_1/bits_per_byte": 2.0}
    validation |= {"exit_0/bits_per_byte": 1.5, "exit_1/bits_per_byte": 1.75}
    results = finished(bench, tmp_path / "cell", [*TRAIN, validation, tests])
    assert (results["bits_per_byte"], results["bits_by_exit"]) == (2.0, 3.0)

    accuracy = bench("accuracy")
    made = [made_up("dgl", seed, 0.5, bits_per_byte=2 + int(seed) / 4) for seed in "012"]
    text = accuracy.markdown([*made, made_up("dgl", "3", None)])
    row = "| digits | mlp | dgl | 3 of 4 | 2.2500 ± 0.2500 | 2.0000, 2.2500, 2.5000 |  | 50.00"
    assert row in text
    accuracy.draw(made, "method", tmp_path / "bits.png")
    assert is_png(tmp_path / "bits.png")


# --- Flags ---------------------------------------------------------------------------------------

GOOD = {"--methods": ["bp"], "--data": ["digits"], "--models": ["mlp"]}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"--methods": ["sgd"]}, "unknown method 'sgd'"),
        ({"--methods": ["bp", "bp"]}, "method 'bp' is given twice"),
        ({"--seeds": ["-1"]}, "digits mlp bp seed=-1: config.seed is -1"),
        ({"--set": ["epochs"]}, "setting 'epochs': KEY=VALUE is needed"),
        ({"--set": ["epoch=3"]}, "unknown key config.epoch"),
        ({"--set": ["epochs=x"]}, "config.epochs is 'x'"),
        ({"--set": ["method.beta=1"]}, "method.beta is set, but method 'bp' takes only: init"),
        ({"--set": ["seed=3"]}, "seed is an axis of the matrix"),
        ({"--set": ["model.name=mlp"]}, "model.name is an axis of the matrix"),
        (
            {"--set-for": ["scpl", "epochs=3"]},
            "settings for 'scpl': the matrix has digits, mlp, bp",
        ),
        ({"--sweep": ["seed", "1"]}, "--sweep seed: a key that is no axis yet"),
        ({"--sweep": ["epochs"]}, "--sweep epochs: a key that is no axis yet, and values"),
        (
            {"--sweep": ["data.label_noise", "2"]},
            "label_noise=2 bp seed=0: config.data",
        ),
        ({"--jobs": ["0"]}, "--jobs is 0"),
        ({"--variant": ["top"]}, "--variant top: a method, and KEY=VALUE for it, are needed"),
        ({"--without": ["bp,0"]}, "cells without '0': no axis has it"),
        ({"--along": ["depth"]}, "--along depth: data, model, method are the axes"),
        ({"--config": ["nowhere.py"]}, "there is no file 'nowhere.py'"),
        ({"--models": []}, "--models: expected at least one argument"),
    ],
)
def test_bad_flags(bench, capsys, tmp_path, flags, words):
    given = [x for key, values in {**GOOD, **flags}.items() for x in (key, *values)]
    code, shown = call(bench, capsys, *given, "--output", tmp_path / "out")
    assert code == 2
    assert words in shown.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_no_folder(bench, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    given = [x for key, values in GOOD.items() for x in (key, *values)]
    code, shown = call(bench, capsys, *given, "--output", tmp_path / "file")
    assert code == 2
    assert f"Not a directory: '{tmp_path / 'file'}" in shown.err.splitlines()[-1]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("missing", GOOD)
def test_missing_flags(bench, capsys, tmp_path, missing):
    given = [x for key, values in GOOD.items() if key != missing for x in (key, *values)]
    code, shown = call(bench, capsys, *given, "--output", tmp_path / "out")
    assert code == 2
    assert f"{missing} is needed" in shown.err.splitlines()[-1]


def test_settings_of_cells(bench, tmp_path):
    (tmp_path / "spec").write_text(
        "--methods bp scpl --data digits --models mlp vgg  # names\n"
        "--set epochs=3 'model.blocks=2,M|2'\n\n"
        "--set-for scpl,mlp method.hidden=4 --set-for mlp model.blocks=None\n"
        "--sweep data.label_noise 0 0.5 --seeds 7\n"
    )
    accuracy = bench("accuracy")
    options = accuracy.parser().parse_args([f"@{tmp_path / 'spec'}", "--output", str(tmp_path)])
    cells = {cell.title: cell for cell in accuracy.cells_of(options)}
    assert len(cells) == 8
    assert list(cells)[:3] == [
        "digits mlp label_noise=0 bp seed=7",
        "digits mlp label_noise=0 scpl seed=7",
        "digits mlp label_noise=0.5 bp seed=7",
    ]
    last = cells["digits mlp label_noise=0.5 scpl seed=7"].arguments
    assert last[1].endswith("equal.py:digits,mlp,scpl")
    assert list(last[2:]) == [
        *("--config.data.name=digits", "--config.model.name=mlp", "--config.method.name=scpl"),
        *("--config.epochs=3", "--config.model.blocks=2,M|2", "--config.method.hidden=4"),
        *("--config.model.blocks=None", "--config.data.label_noise=0.5", "--config.seed=7"),
    ]
    others = [cell for title, cell in cells.items() if "scpl" not in title or "vgg" in title]
    assert not any("--config.method.hidden=4" in cell.arguments for cell in others)


def test_names_that_cannot_be_told_apart(bench, tmp_path):
    axes = {"data": ["a/b", "a_b"], "model": ["mlp"], "method": ["bp"], "seed": ["0"]}
    with pytest.raises(ValueError, match=r"have one name: a_b-mlp-bp-seed=0"):
        bench("matrix").cells("c", axes, [], [], tmp_path)
