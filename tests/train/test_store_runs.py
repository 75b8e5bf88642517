"""Runs whose workdir is in an object store: they go on, and are used, as any other."""

import contextlib
import functools
import json
import signal

import pytest
import runs
import stores
from runs import assert_same_run, finished_here, lines
from test_hosts import FDG, items, start, train, whole

import jdecouple as jd
from jdecouple._files import any_folder
from jdecouple.inference import cli
from jdecouple.train import evaluation, lease, metrics
from jdecouple.train.config import ConfigError
from jdecouple.train.loop import train_and_evaluate
from jdecouple.train.pages import report

VALUES = {"method__name": "early_exit", "optimizer__name": "sgd", "method__projector": None}
WORKDIR = "gs://bucket/runs/a"
FILES = {"config.json", "metrics.jsonl", "curves.png", "checkpoints"}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """One that was trained in two calls; its store stays for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "SETTLE", 0.0)
        with stores.installed(tmp_path_factory.mktemp("store"), patch):
            with contextlib.closing(metrics.MetricsWriter(WORKDIR, resume_step=None)) as writer:
                writer.write(1, "train", {"loss": 3.0})  # of another time: a new run begins anew
            for epochs in (1, 3):
                train_and_evaluate(runs.tiny(**VALUES, epochs=epochs), WORKDIR)
            yield any_folder(WORKDIR)


def inside(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_it_is_the_run_that_it_would_be_here(workdir):
    assert inside(workdir) == FILES
    assert_same_run(workdir, finished_here(**VALUES))
    assert json.loads((workdir / "config.json").read_text())["history"]


@pytest.mark.slow
def test_what_uses_it(workdir, tmp_path, capsys):
    here = finished_here(**VALUES)
    evaluation.evaluate([WORKDIR])
    content = json.loads((workdir / "evaluation_test" / "evaluation.json").read_text())
    assert content["accuracy"] == lines(here)[-1]["accuracy"]
    assert {"confusion.csv", "confusion.png", "worst.png"} < inside(workdir / "evaluation_test")
    report.main([WORKDIR, "--noevaluate"])
    page = (workdir / "report.html").read_text()
    assert "early_exit on mlp on synthetic" in page
    assert WORKDIR in page
    with pytest.raises(ValueError, match="is no folder of this machine"):
        cli.export([WORKDIR, "gs://bucket/model"])
    assert capsys.readouterr().out.count(WORKDIR) == 2


@pytest.mark.slow
def test_what_else_uses_it(workdir, tmp_path):
    evaluation.calibrate([WORKDIR, "--accuracy_loss=1"])
    assert cli.calibrated(jd.load(WORKDIR)) == cli.calibrated(jd.load(workdir))
    assert {"calibration.json", "exits.json"} < inside(workdir / "calibration_validation")
    report.main([WORKDIR])
    cli.export([WORKDIR, str(tmp_path / "model")])
    assert (tmp_path / "model" / "model.safetensors").stat().st_size > 0


@pytest.mark.slow
def test_another_run_refuses_it_and_another_begins_with_it(workdir, capsys):
    with pytest.raises(ConfigError, match="the workdir holds a run with"):
        train_and_evaluate(runs.tiny(**VALUES, model__hidden=8), WORKDIR)
    config = runs.tiny(**VALUES, epochs=1, init_from=f"{WORKDIR}@best")
    train_and_evaluate(config, "s3://bucket/other")
    assert f"of {WORKDIR}; taken: block 0-1" in capsys.readouterr().out


def test_lines_are_there_when_a_checkpoint_counts_them(workdir):
    writer = metrics.MetricsWriter("gs://bucket/lines", resume_step=None)
    read = functools.partial(metrics.read_metrics, "gs://bucket/lines")
    writer.write(1, "train", {"loss": 1.0})
    assert read() == []
    writer.flush()
    writer.write(2, "train", {"loss": 2.0})
    assert [line["step"] for line in read()] == [1]
    writer.close()
    again = metrics.MetricsWriter("gs://bucket/lines", resume_step=1)
    assert [line["step"] for line in read()] == [1]
    again.close()


@pytest.mark.slow
def test_two_processes_one_of_which_is_killed(tmp_path, monkeypatch):
    """Each writes the items of its stages there; the lease of the dead run is taken over."""
    with stores.installed(tmp_path, monkeypatch):
        monkeypatch.setattr(runs.server(), "store", str(tmp_path))
        folder = any_folder("s3://bucket/run")
        processes = start(folder, 2, **FDG)
        runs.wait_for(lambda: any(line["step"] >= 9 for line in lines(folder)), processes[0])
        processes[0].signal(signal.SIGKILL)
        assert processes[0].wait().returncode == -signal.SIGKILL
        assert processes[1].wait().returncode == 3
        again = train(folder, 2, **FDG)
        assert "continuing from step" in again.stdout
        assert {name.rpartition(".")[0] for name in items(folder)} == {
            "",
            "stage_0.process_0",
            "stage_1.process_1",
        }
        assert_same_run(folder, whole(**FDG))
