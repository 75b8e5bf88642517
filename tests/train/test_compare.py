"""Runs compared: how far each is, the numbers it ends with, the keys that differ, the command."""

import json
import re

import numpy as np
import pytest

from jdecouple.checkpoint import Checkpointer
from jdecouple.train import cli, commands, programs
from jdecouple.train.config import ConfigError, default
from jdecouple.train.metrics import MetricsWriter
from jdecouple.train.pages import compare, overlays
from jdecouple.train.pages.differing import Value, differences, labels, values
from jdecouple.train.pages.figures import Final, Standing, final, standing
from jdecouple.train.pages.record import read
from jdecouple.train.pages.times import Seconds


def train(step, loss=1.0, **more):
    return step, "train", {"loss": loss, "accuracy": 0.25, "examples_per_second": 400.0, **more}


def measured(step, split, accuracy):
    exits = {"exit_0/accuracy": accuracy + 0.125, "exit_1/accuracy": accuracy}
    return step, split, {"loss": 0.5, "accuracy": accuracy, **exits}


DONE = [
    train(10, 3.0),
    measured(10, "validation", 0.75),
    measured(10, "test", 0.5),
    train(20, 2.0),
    measured(20, "validation", 0.625),
    measured(20, "test", 0.625),
]


HEAD = [
    *("run", "state", "test, last step", "test, best validation", "best test (not a result)"),
    *("last step", "parameters", "examples/s", "seconds"),
]


def written(folder, lines=(), extra=None, history=(), versions=(), without=(), **keys):
    """The record of a workdir of 20 steps of 8 examples; `method__name="bp"` sets method.name."""
    folder.mkdir(parents=True, exist_ok=True)
    config = default()
    config.batch_size = 8
    config.update_from_flattened_dict({key.replace("__", "."): x for key, x in keys.items()})
    plain = config.to_dict()
    for key in without:
        section, _, last = key.rpartition(".")
        del (plain[section] if section else plain)[last]
    content = {"config": plain, "history": list(history), "total_steps": 20, "parameters": 1234}
    content |= {"device_kind": "cpu", "boundaries": [0], "versions": dict(versions)}
    (folder / "config.json").write_text(json.dumps(content))
    with MetricsWriter(folder, resume_step=None) as writer:
        for line in lines:
            writer.write(*line)
    if extra is not None:
        with Checkpointer(folder / "checkpoints") as checkpoints:
            checkpoints.save(max([1, *(step for step, *_ in lines)]), {"w": np.ones(1)}, extra)
    return read(folder)


def test_the_numbers_of_a_finished_run(tmp_path):
    lines = [*DONE[:3], train(20, examples_per_second=100.0), *DONE[4:]]
    assert final(written(tmp_path, lines)) == Final(
        standing="finished",
        test=0.625,
        chosen=0.5,
        chosen_at=10,
        papers=0.75,
        step=20,
        parameters=1234,
        examples_per_second=250.0,
        seconds=10 * 8 / 400 + 10 * 8 / 100,
    )


class TestWhatIsNoResult:
    """A run that has not come to its end has no accuracy in the table."""

    def no_result(self, run, text):
        assert standing(run) == Standing(False, text)
        end = final(run)
        assert (end.standing, end.test, end.chosen, end.papers) == (text, None, None, None)
        return end

    def test_unfinished(self, tmp_path):
        end = self.no_result(written(tmp_path, DONE[:4]), "unfinished, step 20 of 20")
        assert (end.step, end.seconds) == (20, 0.4)

    def test_yet_to_be_evaluated(self, tmp_path):
        run = written(tmp_path, DONE[:5], {"evaluate": True})
        self.no_result(run, "unfinished, step 20 of 20")

    def test_no_metrics(self, tmp_path):
        end = self.no_result(written(tmp_path), "no metrics yet")
        assert (end.step, end.examples_per_second, end.seconds) == (0, None, None)

    def test_a_loss_that_is_no_number(self, tmp_path):
        run = written(tmp_path, [train(5, 2.0), train(10, float("nan"))])
        self.no_result(run, "diverged, step 10 of 20")

    def test_a_suspect_checkpoint(self, tmp_path):
        run = written(tmp_path, [train(5), train(10)], {"range": {"suspect": 7}})
        self.no_result(run, "diverged, step 10 of 20")

    def test_checkpoints_moved_away(self, tmp_path):
        (tmp_path / "checkpoints_refused").mkdir()
        self.no_result(written(tmp_path, [train(5)]), "diverged, step 5 of 20")


def test_lost_lines_may_have_been_the_best(tmp_path):
    end = final(written(tmp_path, DONE, {"rows": 7}))
    assert (end.test, end.chosen, end.chosen_at, end.papers) == (0.625, None, None, None)


def test_a_run_without_test(tmp_path):
    lines = [line for line in DONE if line[1] != "test"]
    end = final(written(tmp_path, lines, {}))
    assert (end.standing, end.test) == ("finished, no test of the last step", None)


def test_early_stopping_is_an_end(tmp_path):
    values = {"best": 0.75, "step": 5, "count": 2}
    run = written(tmp_path, DONE[:3], {"early_stopping": values}, early_stopping__patience=2)
    assert standing(run) == Standing(True, "finished early, step 10 of 20")
    assert final(run).test == 0.5


class TestSeconds:
    def seconds(self, *speeds):
        lines = [
            {"step": step, "split": "train", "examples_per_second": speed} for step, speed in speeds
        ]
        other = {"step": 15, "split": "test", "accuracy": 0.5}
        return Seconds([*lines, other], batch_size=8)

    def test_each_line_is_of_the_steps_since_the_one_before(self):
        """As of a model that grows at step 10, where a line is written."""
        until = self.seconds((10, 80.0), (20, 20.0), (30, 20.0))
        assert [until(step) for step in (0, 5, 10, 15, 20, 30)] == [0, 0.5, 1, 3, 5, 9]

    def test_the_last_steps_are_as_fast_as_those_before(self):
        assert self.seconds((10, 80.0), (20, 20.0))(25) == 7

    def test_steps_before_a_resumption_count_as_those_behind_it(self):
        """The line at 20 of a run that went on from step 15 measured five steps."""
        assert self.seconds((10, 80.0), (20, 40.0))(20) == 3

    @pytest.mark.parametrize("speed", [None, 0.0])
    def test_unknown(self, speed):
        until = self.seconds((10, 80.0), (20, speed), (30, 80.0))
        assert until(10) == 1
        assert np.isnan([until(11), until(20), until(30)]).all()

    def test_no_line(self):
        assert np.isnan(self.seconds()(1))


class TestKeys:
    def rows(self, *runs):
        return {
            key: [None if value is None else str(value) for value in row]
            for key, row in differences(runs).items()
        }

    def test_what_differs_with_its_defaults(self, tmp_path):
        a = written(tmp_path / "a", method__name="bp", optimizer__learning_rate=0.1)
        b = written(tmp_path / "b", method__name="bp", seed=3, growth__blocks=(1, 2))
        assert self.rows(a, b) == {
            "growth.blocks": ["None (default)", "(1, 2)"],
            "optimizer.learning_rate": ["0.1", "0.001 (default)"],
            "seed": ["0 (default)", "3"],
        }

    def test_options_that_one_method_takes_count_where_they_are_set(self, tmp_path):
        a = written(tmp_path / "a", method__name="scpl", method__temperature=0.2)
        b = written(tmp_path / "b", method__name="bp")
        assert self.rows(a, b) == {
            "method.name": ["scpl", "bp"],
            "method.temperature": ["0.2", None],
        }

    def test_a_key_that_an_earlier_version_did_not_know(self, tmp_path):
        a = written(tmp_path / "a", without=["accumulate", "data.cutout"])
        b = written(tmp_path / "b")
        c = written(tmp_path / "c", accumulate=2)
        assert self.rows(a, b) == {}
        assert self.rows(a, c) == {"accumulate": ["1 (default)", "2"]}

    def test_a_configuration_of_a_later_version(self, tmp_path):
        a = written(tmp_path / "a", seed=1, without=["remat"])
        content = json.loads((tmp_path / "a" / "config.json").read_text())
        content["config"]["new"] = {"key": [1, 2]}
        (tmp_path / "a" / "config.json").write_text(json.dumps(content))
        assert self.rows(read(tmp_path / "a"), written(tmp_path / "b")) == {
            "new.key": ["(1, 2)", None],
            "seed": ["1", "0 (default)"],
        }
        assert a.config is not None
        assert values(read(tmp_path / "a"))["remat"] == Value("auto", True)

    def test_changes_on_the_way(self, tmp_path):
        """Equal in the end is not the same run."""
        history = [
            {"step": 5, "key": "optimizer.learning_rate", "old": 0.1, "new": 0.01},
            {"step": 10, "key": "steps", "old": 15, "new": 20},
        ]
        a = written(tmp_path / "a", history=history, optimizer__learning_rate=0.01)
        b = written(tmp_path / "b", optimizer__learning_rate=0.01)
        assert self.rows(a, b) == {
            "optimizer.learning_rate": ["0.01; 0.1 before step 5", "0.01"],
            "steps": ["20; 15 before step 10", "20"],
        }

    def test_versions(self, tmp_path):
        a = written(tmp_path / "a", versions={"jax": "0.10.2", "flax": "0.12"})
        b = written(tmp_path / "b", versions={"jax": "0.11.2", "flax": "0.12"})
        assert self.rows(a, b) == {"version of jax": ["0.10.2", "0.11.2"]}


def test_names_have_what_tells_them_apart(tmp_path):
    places = ["runs/a/x/bp", "runs/b/x/bp", "runs/b/dgl", "bp"]
    assert labels([tmp_path / place for place in places]) == [
        "a/x/bp",
        "b/x/bp",
        "dgl",
        f"{tmp_path.name}/bp",
    ]


def test_metrics_to_draw(tmp_path):
    a = written(
        tmp_path / "a", [*DONE[:3], train(20, **{"block_10/loss": 1.0, "block_9/loss": 1.0})]
    )
    b = written(
        tmp_path / "b", [train(20, **{"block_10/loss": 1.0, "block_9/loss": 1.0, "mine": 1.0})]
    )
    c = written(tmp_path / "c", [train(20, examples_per_second=float("nan"))])
    main, others = overlays.shared([a, b, c])
    assert main == [
        ("train", "loss"),
        ("test", "accuracy"),
        ("validation", "accuracy"),
        ("train", "accuracy"),
    ]
    assert others == [
        ("train", "block_9/loss"),
        ("train", "block_10/loss"),
        ("train", "examples_per_second"),
    ]


class TestCommand:
    @pytest.fixture(autouse=True)
    def _in_this_process(self, monkeypatch, tmp_path):
        monkeypatch.setattr(cli, "log_in_short", lambda: None)
        monkeypatch.setattr(programs, "keep", lambda: None)
        monkeypatch.chdir(tmp_path)

    def refused(self, capsys, *arguments):
        with pytest.raises(SystemExit) as stopped:
            commands.main(["jdecouple", "compare", *map(str, arguments)])
        captured = capsys.readouterr()
        assert (stopped.value.code, captured.out) == (2, "")
        (line,) = captured.err.splitlines()
        return line.removeprefix("error: ")

    def test_tables_and_page(self, tmp_path, capsys):
        written(tmp_path / "a", DONE, method__name="bp")
        written(tmp_path / "b", DONE[:1], method__name="scpl")
        commands.main(["jdecouple", "compare", "--by=examples", "a", "b"])
        lines = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
        assert lines == [
            HEAD,
            ["a", "finished", "62.50%", "50.00% (step 10)", "75.00%", "20", "1,234", "400", "0.4"],
            ["b", "unfinished, step 10 of 20", "-", "-", "-", "10", "1,234", "400", "0.2"],
            [""],
            ["key", "a", "b"],
            ["method.name", "bp", "scpl"],
            [""],
            ["compare.html"],
        ]
        text = (tmp_path / "compare.html").read_text()
        assert "Without results: b (unfinished, step 10 of 20)." in text
        assert re.findall(r'value="(\d)" autocomplete="off" checked', text) == ["1"]
        for label in ("step", "examples", "seconds of training"):
            assert f"Accuracy of the last exit, test, by {label}. a: from 50.00% to 62.50%" in text
        assert "b (unfinished): 3" in text

    def test_its_page_may_be_replaced_and_nothing_else(self, tmp_path, capsys):
        for name in "ab":
            written(tmp_path / name, DONE)
        (tmp_path / "compare.html").write_text("<h1>mine</h1>")
        assert self.refused(capsys, "a", "b") == (
            "'compare.html' is there and no page of jdecouple's: give another --output"
        )
        assert (tmp_path / "compare.html").read_text() == "<h1>mine</h1>"
        commands.main(["jdecouple", "compare", "a", "b", "--output", "other.html"])
        before = (tmp_path / "other.html").read_text()
        written(tmp_path / "b", DONE[:3])
        commands.main(["jdecouple", "compare", "a", "b", "--output", "other.html"])
        assert before != (tmp_path / "other.html").read_text()

    def test_refusals(self, tmp_path, capsys):
        written(tmp_path / "a")
        for name in ("empty", "broken"):
            (tmp_path / name).mkdir()
        (tmp_path / "broken" / "config.json").write_text("{")
        needed = (
            "workdir(s) given, 2 to 20 are needed; usage: jdecouple compare [-h] [--output OUTPUT] "
            "[--by {step,examples,seconds}] [WORKDIR ...]"
        )
        assert self.refused(capsys, "a") == f"1 {needed}"
        assert self.refused(capsys, *"a" * 21) == f"21 {needed}"
        assert self.refused(capsys, "a", "gone") == (
            "there is no run in 'gone': it has neither config.json nor metrics.jsonl"
        )
        assert self.refused(capsys, "a", "empty").startswith("there is no run in 'empty'")
        assert self.refused(capsys, "a", "broken").startswith(
            "'broken' cannot be compared: config.json"
        )
        assert self.refused(capsys, "a", "../" + tmp_path.name + "/a") == (
            f"'{tmp_path / 'a'}' is given 2 times: different workdirs are needed"
        )
        assert self.refused(capsys, "a", "b", "--output=no/page.html") == (
            "--output no/page.html: its folder does not exist"
        )
        assert self.refused(capsys, "a", "b", "--by=epoch").startswith(
            "argument --by: invalid choice: 'epoch'"
        )
        assert not (tmp_path / "compare.html").exists()

    def test_twenty_runs_of_one_name_and_none_with_metrics(self, tmp_path, capsys):
        places = [f"{i}/run" for i in range(20)]
        for place in places:
            written(tmp_path / place)
        commands.main(["jdecouple", "compare", *places])
        assert capsys.readouterr().out.count("no metrics yet") == 20
        assert "No run has metrics yet." in (tmp_path / "compare.html").read_text()

    def test_every_run_has_its_line_in_the_legend(self, tmp_path):
        runs = [written(tmp_path / f"run-{i}", [train(10, i + 1.0)]) for i in range(20)]
        names = [f"run {i}" for i in range(20)]
        (choice,) = overlays.pieces(runs, names, "step")
        legend = re.search(r'<ul class="legend">.*?</ul>', choice.html())[0]
        lines = re.findall(
            r'--hue:(.*?)"><path class="curve" d="M0 4H24"(.*?)/></svg>(.*?)</li>', legend
        )
        assert [name for *_, name in lines] == names
        assert len({line[:2] for line in lines}) == 20


def test_a_record_needs_a_configuration(tmp_path):
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        writer.write(*train(10))
    with pytest.raises(ConfigError, match=r"cannot be compared: config.json cannot be read"):
        compare.main([str(tmp_path), str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("history", 5),
        ("history", [1]),
        ("history", [{"step": None, "key": "seed", "old": 0, "new": 1}]),
        ("history", [{"step": 3, "key": ["seed"], "old": 0, "new": 1}]),
        ("parameters", "many"),
        ("total_steps", 10**20),
        ("versions", ["1.0"]),
    ],
)
def test_what_is_damaged_beside_the_configuration_is_left_out(tmp_path, capsys, name, value):
    runs = [written(tmp_path / each, DONE).folder for each in "ab"]
    path = runs[1] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    page = tmp_path / "page.html"
    compare.main([*map(str, runs), "--output", str(page)])
    assert f"b: What config.json says of {name} is damaged and left out." in page.read_text()


@pytest.mark.parametrize("size", ["8", -8, 10**20, None])
def test_no_seconds_are_told_of_a_batch_size_that_is_damaged(tmp_path, size):
    folder = written(tmp_path, DONE).folder
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["config"]["batch_size"] = size
    path.write_text(json.dumps(content))
    run = read(folder)
    assert run.seconds is None
    assert np.isnan(run.batch_size)


def test_no_seconds_are_told_of_a_speed_that_is_next_to_nothing(tmp_path):
    assert written(tmp_path, [train(10, examples_per_second=1e-308)]).seconds is None


def test_no_figure_is_made_of_a_line_that_no_run_writes(tmp_path):
    odd = [train(20, examples_per_second=-3.0), measured(20, "test", 5.0)]
    run = written(tmp_path, [*DONE, *odd])
    assert "1 damaged or half-written line(s)" in run.notes[0]
    assert final(run).test == 0.625
    assert final(run).examples_per_second == 400.0
