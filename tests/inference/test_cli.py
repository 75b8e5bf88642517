"""The commands of python -m jdecouple."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import runs
import text_sets
from PIL import Image

import jdecouple as jd
from jdecouple.pipeline.predict import Predictor
from jdecouple.train import cli as train_cli
from jdecouple.train import programs
from jdecouple.train.commands import main
from jdecouple.train.loop import train_and_evaluate

VALUES = {"method__name": "early_exit", "method__projector": None, "epochs": 1}
VALUES |= {"checkpoint__every": 9, "data__synthetic_size": 200}


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    """Logging stays pytest's, and no folder of the user is used."""
    monkeypatch.setattr(train_cli, "log_in_short", lambda: None)
    monkeypatch.setattr(programs, "keep", lambda: None)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return runs.copy(runs.finished_here(**VALUES), tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    config = text_sets.tiny(text_sets.csv_set(folder / "data"), data__max_length=12, steps=4)
    config.data.buckets = None
    train_and_evaluate(config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name in ("b/1.png", "a.png", "c.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (9, 12, 3), np.uint8)).save(folder / name)
    return folder


def run(capsys, *arguments):
    main(["jdecouple", *map(str, arguments)])
    return capsys.readouterr().out


def refused(capsys, said, *arguments, code=2):
    with pytest.raises(SystemExit) as ended:
        main(["jdecouple", *map(str, arguments)])
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out) == (code, "")
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    return line


def read(text):
    return list(csv.DictReader(io.StringIO(text)))


class TestPredict:
    def test_a_folder(self, workdir, pictures, capsys):
        rows = read(run(capsys, "predict", workdir, pictures))
        files = [str(pictures / name) for name in ("a.png", "b/1.png", "c.png")]
        assert [row["input"] for row in rows] == files
        found = jd.load(workdir).predict(pictures)
        assert [int(row["label"]) for row in rows] == found.labels.tolist()
        assert [row["class_name"] for row in rows] == found.names
        probabilities = found.probabilities.max(axis=-1)
        assert [float(row["probability"]) for row in rows] == pytest.approx(probabilities, abs=1e-6)
        assert {row["exit"] for row in rows} == {"1"}

    def test_files_tables_and_lines(self, workdir, pictures, tmp_path, capsys, monkeypatch):
        whole = read(run(capsys, "predict", workdir, pictures, "--exit=0"))
        assert {row["exit"] for row in whole} == {"0"}
        names = ["a.png", "b/1.png", "c.png"]
        files = [pictures / name for name in names]
        assert read(run(capsys, "predict", workdir, *files, "--exit=0")) == whole
        table = text_sets.write_csv(
            pictures / "set.csv", [[n, 3] for n in names], ("path", "label")
        )
        by_name = read(run(capsys, "predict", workdir, table, "--exit", 0))
        assert [row["probability"] for row in by_name] == [row["probability"] for row in whole]
        assert [row["input"] for row in by_name] == names
        chosen = run(capsys, "predict", workdir, table, "--exit=0", "--column=PATH")
        assert read(chosen) == by_name
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(str, files)) + "\n\n"))
        assert read(run(capsys, "predict", workdir, "--exit=0")) == whole

    def test_inputs_before_and_behind_options(self, workdir, pictures, capsys):
        a, c = pictures / "a.png", pictures / "c.png"
        plain = run(capsys, "predict", workdir, a, c)
        assert run(capsys, "predict", workdir, a, "--exit=1", c) == plain
        assert run(capsys, "predict", workdir, "--exit=1", a, c) == plain

    def test_a_name_that_is_no_utf8(self, workdir, pictures, tmp_path, capsys):
        name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
        shutil.copy(pictures / "a.png", name)
        for suffix in ("csv", "jsonl"):
            run(capsys, "predict", workdir, name, "--output", tmp_path / f"out.{suffix}")
        assert b"/\xff.png," in (tmp_path / "out.csv").read_bytes()
        assert json.loads((tmp_path / "out.jsonl").read_text("utf-8"))["input"] == name

    def test_output(self, workdir, pictures, tmp_path, capsys):
        wanted = read(run(capsys, "predict", workdir, pictures))
        for name, options in (("a.csv", []), ("a.jsonl", []), ("a", ["--format=jsonl"])):
            path = tmp_path / name
            assert run(capsys, "predict", workdir, pictures, "--output", path, *options) == ""
            text = path.read_text()
            found = read(text) if name == "a.csv" else [*map(json.loads, text.splitlines())]
            assert [{k: str(v) for k, v in row.items()} for row in found] == wanted
        broken = tmp_path / "broken.png"
        broken.write_bytes(b"no image")
        refused(capsys, "broken.png", "predict", workdir, pictures, broken, "--output", path)
        assert path.read_text() == text

    @pytest.mark.slow
    def test_texts(self, texts, tmp_path, capsys, monkeypatch):
        given = [text for _, text in text_sets.examples(30, seed=3)]
        found = jd.load(texts).predict(given)
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(given) + "\n"))
        rows = read(run(capsys, "predict", texts, "-"))
        assert [row["input"] for row in rows] == given
        assert [int(row["label"]) for row in rows] == found.labels.tolist()
        lines = tmp_path / "lines.txt"
        lines.write_text("\n".join(given))
        table = text_sets.write_csv(
            tmp_path / "set.csv",
            [[0, n, text] for n, text in enumerate(given)],
            ("y", "id", "text"),
        )
        bare = text_sets.write_csv(tmp_path / "bare.csv", [[text] for text in given])
        for path in (lines, table, bare):
            assert read(run(capsys, "predict", texts, path)) == rows

    def test_refused(self, workdir, texts, pictures, tmp_path, capsys, monkeypatch):
        two = text_sets.write_csv(tmp_path / "two.csv", [["good", "bad"]])
        for said, *arguments in (
            ("there is no run in", tmp_path, pictures),
            ("no checkpoint 3 in", workdir, pictures, "--step=3"),
            ("step is 'newest'", workdir, pictures, "--step=newest"),
            ("exit is 7: allowed are 0, 1", workdir, pictures, "--exit=7"),
            ("argument --exit: invalid", workdir, pictures, "--exit=first"),
            ("exits.json' is not there", workdir, pictures, "--exit=calibrated"),
            ("batch_size is 0", workdir, pictures, "--batch_size=0"),
            (
                f"batch_size is {10**20}: its inputs need",
                workdir,
                pictures,
                f"--batch_size={10**20}",
            ),
            ("unrecognized arguments: --colour=1", workdir, pictures, "--colour=1"),
            ("is no regular file", workdir, pictures, "--output", tmp_path),
            ("one column of paths is needed", workdir, two, "--column=a,b"),
            ("one called '' is needed", texts, two, "--column="),
            ("No such file", workdir, tmp_path / "none.png"),
            ("No such file", texts, tmp_path / "none.txt"),
            ("is a folder: files of texts", texts, tmp_path),
            ("its folder does not exist", workdir, pictures, "--output", tmp_path / "no" / "a.csv"),
            ("one column, or a header", texts, two),
            ("one called 'title' is needed", texts, two, "--column=title"),
            ("holds no images", workdir, tmp_path),
        ):
            refused(capsys, said, "predict", *arguments)
        refused(capsys, "arguments are required: WORKDIR;", "predict")
        stdin = io.TextIOWrapper(io.BytesIO("café".encode("latin1")), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        refused(capsys, "stdin is no text in UTF-8", "predict", texts)

    def test_more_than_the_memory(self, workdir, pictures, capsys, monkeypatch):
        """What XLA and NumPy say of it is one line; another error of theirs stays what it is."""
        full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
        other = jax.errors.JaxRuntimeError("INTERNAL: what nobody foresaw")
        for error in (full, MemoryError("Unable to allocate 9 GiB")):
            monkeypatch.setattr(Predictor, "predict", fails(error))
            for command in (("predict", workdir, pictures), ("evaluate", workdir)):
                told = refused(capsys, "batch_size is 7: ", *command, "--batch_size=7")
                assert told.endswith(f"not enough memory for so many inputs at once ({error})")
        monkeypatch.setattr(Predictor, "predict", fails(other))
        with pytest.raises(jax.errors.JaxRuntimeError, match="nobody foresaw"):
            main(["jdecouple", "predict", str(workdir), str(pictures)])


def fails(error):
    """A method that raises."""

    def method(*_, **options):
        raise error

    return method


class TestCommands:
    def test_usage(self, capsys):
        usage = run(capsys)
        for name in ("train", "predict", "evaluate", "calibrate", "export"):
            assert f"  {name}" in usage
        refused(capsys, "unknown command 'test': allowed are train, launch, plan, predict", "test")

    def test_help_of_each(self, capsys):
        for name in ("predict", "evaluate", "calibrate", "export"):
            with pytest.raises(SystemExit) as ended:
                main(["jdecouple", name, "--help"])
            assert ended.value.code == 0
            text = capsys.readouterr().out
            assert "WORKDIR" in text
            assert "Raises" not in text

    def test_train_is_train_py(self, capsys):
        refused(capsys, "--config is needed", "train")

    def test_evaluate(self, workdir, tmp_path, capsys):
        output = run(capsys, "evaluate", workdir, "--output", tmp_path / "found")
        metrics = [row for row in runs.lines(workdir) if row["split"] == "test"][-1]
        for exit in (0, 1):
            assert f"exit {exit}: {metrics[f'exit_{exit}/accuracy']:.2%}" in output
        content = json.loads((tmp_path / "found" / "evaluation.json").read_text())
        assert content["accuracy"] == pytest.approx(metrics["accuracy"])
        assert (tmp_path / "found" / "worst.png").stat().st_size

    def test_calibrate(self, workdir, pictures, capsys):
        output = run(capsys, "calibrate", workdir, "--accuracy_loss=0.5", "--rule=margin")
        assert "exit 0: " in output
        kept = json.loads((workdir / "exits.json").read_text())
        assert kept["rule"]["name"] == "margin"
        assert (workdir / "calibration_validation" / "accuracy_cost.png").stat().st_size
        rule = jd.inference.Rule.from_json(kept["rule"])
        found = jd.load(workdir).predict(pictures, exit=rule)
        rows = read(run(capsys, "predict", workdir, pictures, "--exit=calibrated"))
        assert [int(row["exit"]) for row in rows] == found.exit.tolist()
        assert "rule margin" in run(capsys, "evaluate", workdir, "--exit=calibrated")
        (workdir / "exits.json").write_text(json.dumps({**kept, "step": 4}))
        said = "was chosen at step 4, but step 22 is loaded"
        refused(capsys, said, "predict", workdir, pictures, "--exit=calibrated")
        for given in ("nan", "-0.1"):
            said = f"accuracy_loss is {given}: a finite number of at least 0 is needed"
            refused(capsys, said, "calibrate", workdir, f"--accuracy_loss={given}")
        (workdir / "exits.json").write_text(
            json.dumps({**kept, "rule": {"name": "margin", "thresholds": [0.5]}})
        )
        said = "is no rule that calibrate wrote for this network"
        refused(capsys, said, "predict", workdir, pictures, "--exit=calibrated")
        (workdir / "exits.json").write_text("[" * 100_000)
        refused(capsys, said, "predict", workdir, pictures, "--exit=calibrated")
        output = run(capsys, "calibrate", workdir, "--accuracy_loss=0.5", "--time")
        assert "% of the time" in output
        (workdir / "exits.json").unlink()
        refused(capsys, "one of the arguments --accuracy", "calibrate", workdir)
        refused(capsys, "cannot be met", "calibrate", workdir, "--cost=0.001")
        assert not (workdir / "exits.json").exists()

    def test_other_data_are_refused(self, workdir, tmp_path, capsys):
        copy = runs.copy(workdir, tmp_path)
        content = json.loads((copy / "config.json").read_text())
        content["config"]["data"]["num_classes"] = 4
        (copy / "config.json").write_text(json.dumps(content))
        refused(capsys, "'synthetic' is no longer what was trained on", "evaluate", copy)
        (copy / "config.json").write_text("{}")
        refused(capsys, "does not tell which data set was trained on", "evaluate", copy)

    def test_data_that_have_moved(self, texts, tmp_path, capsys):
        copy = runs.copy(texts, tmp_path)
        old = texts.parent / "data"
        before = run(capsys, "evaluate", texts)
        (tmp_path / "moved").mkdir()
        old.rename(tmp_path / "moved" / "data")
        try:
            refused(capsys, f"no file or folder '{old}'", "evaluate", copy)
            after = run(capsys, "evaluate", copy, f"--data_dir={tmp_path / 'moved'}")
            assert after.splitlines()[:-1] == before.splitlines()[:-1]
        finally:
            (tmp_path / "moved" / "data").rename(old)

    def test_export(self, workdir, tmp_path, capsys):
        folder = tmp_path / "exported"
        assert run(capsys, "export", workdir, folder, "--exit=0").strip() == str(folder)
        content = json.loads((folder / "model.json").read_text())
        assert (content["exit"], content["class_names"]) == (0, [*"0123456789"])
        assert content["inputs"]["image_shape"] == [8, 8, 1]
        assert content["method"]["name"] == "early_exit"
        refused(capsys, "exported is there", "export", workdir, folder)


@pytest.mark.slow
def test_a_process_of_its_own(workdir, pictures, tmp_path):
    command = [sys.executable, "-m", "jdecouple", "predict", str(workdir), str(pictures)]
    environment = runs.environment() | {"XDG_CACHE_HOME": str(tmp_path)}
    options = {"capture_output": True, "text": True, "env": environment, "check": False}
    found = subprocess.run(command, **options)
    assert (found.returncode, found.stderr) == (0, "")
    assert len(read(found.stdout)) == 3
    found = subprocess.run([*command, "--step=3"], **options)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: no checkpoint 3")
    with open("/dev/full", "w") as full:
        options = {**options, "stdout": full, "stderr": subprocess.PIPE, "capture_output": False}
        found = subprocess.run(command, **options)
    assert found.returncode == 1
    assert "No space left" in found.stderr
