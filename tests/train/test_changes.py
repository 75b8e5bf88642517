"""A workdir tells what has trained it: other keys, and files that were lost or spoilt since."""

import json
import shutil

import pytest
import runs
from runs import arguments, cheap, lines

from jdecouple.train import cli as command_line
from jdecouple.train import config as configuration
from jdecouple.train import report, resume
from jdecouple.train.config import ConfigError, default, filled
from jdecouple.train.loop import build, train_and_evaluate
from jdecouple.train.metrics import read_metrics

SHORT = {"steps": 4, "eval_every": 2, "checkpoint__every": 2, "data__validation": 0.1}
SLOW = pytest.mark.slow
RATE = {"optimizer__learning_rate": 0.5}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train_and_evaluate(cheap(**SHORT), folder)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return runs.copy(finished, tmp_path)


@pytest.fixture(scope="module")
def run():
    return build(cheap(**SHORT))


def written(folder):
    return json.loads((folder / "config.json").read_text())


class TestSettings:
    def test_every_key_counts_or_is_free_or_of_the_identity(self):
        """A new key counts until somebody says otherwise."""
        counted = configuration.settings(filled({"optimizer": {"name": "sgd"}}), 7)
        optimizer = {key for key in default().optimizer if key != "name"}
        optimizer |= {"momentum", "nesterov", "weight_decay"}
        assert counted.keys() == {f"optimizer.{key}" for key in optimizer} | {
            *("steps", "eval_every", "microbatches", "dtype", "clip_norm", "accumulate", "ema"),
            *("wire", "early_stopping.patience", "early_stopping.min_delta"),
        }
        assert counted["steps"] == 7

    def test_a_default_is_the_same_whether_given_or_not(self):
        given = filled({"optimizer": {"name": "adam", "b1": 0.9}, "epochs": 3})
        assert configuration.settings(given, 7) == configuration.settings(default(), 7)

    def test_changes(self):
        before, now = ({"a": 1, "b": None, "c": [1]}, {"a": 1, "b": 2, "d": 3})
        assert configuration.changes(before, now) == [
            *(("b", None, 2), ("c", [1], None), ("d", None, 3))
        ]


class TestFinished:
    @pytest.mark.parametrize(
        ("values", "said"),
        [
            (RATE, "config.optimizer.learning_rate = 0.001 (now 0.5)"),
            (
                {"optimizer__momentum": 0.9, "dtype": "bfloat16"},
                "config.dtype = float32 (now bfloat16), config.optimizer.momentum = 0.0 (now 0.9)",
            ),
        ],
    )
    def test_other_keys_are_refused(self, finished, capfd, monkeypatch, values, said):
        monkeypatch.setattr(command_line, "log_in_short", lambda: None)
        before = runs.fingerprint(finished)
        given = {"mesh__stages": 1, "method__name": "bp", "method__projector": "None"}
        given |= {"optimizer__name": "sgd", **SHORT, **values}
        with pytest.raises(SystemExit) as stopped:
            command_line.main(["train.py", *arguments(finished, **given)])
        assert stopped.value.code == 2
        printed = capfd.readouterr()
        assert printed.out.startswith("model mlp | method bp | ")
        assert printed.out.count("\n") == 2
        assert printed.err == (
            "error: the workdir holds step 4, where this configuration ends, trained with "
            f"{said}: choose another workdir, the same values, or more config.steps\n"
        )
        assert runs.fingerprint(finished) == before

    def test_keys_that_change_no_result_are_no_matter(self, folder, capsys):
        before = (folder / "config.json").read_bytes()
        values = {"log_every": 3, "checkpoint__keep": 1, "mesh__data": 2, "engine": "auto"}
        result = train_and_evaluate(cheap(**SHORT, **values, max_in_flight=1), folder)
        assert result["test"] == [line for line in lines(folder) if line["split"] == "test"][-1]
        printed = capsys.readouterr()
        assert "last step" in printed.out
        assert "config." not in printed.out + printed.err
        assert (folder / "config.json").read_bytes() == before

    def test_ended_early_it_is_not_what_a_shorter_run_computes(self, finished, run):
        settings = {**resume.origin(run)["settings"], "steps": 8}
        with pytest.raises(ConfigError, match=r"trained with config\.steps = 8 \(now 4\)"):
            resume.record(finished, run, 4, {"settings": settings})


class TestUnfinished:
    def test_an_optimiser_whose_state_has_other_parts(self, finished):
        before = runs.fingerprint(finished)
        with pytest.raises(ConfigError) as error:
            train_and_evaluate(cheap(**{**SHORT, "optimizer__momentum": 0.9, "steps": 6}), finished)
        assert "no usable checkpoint in " in str(error.value)
        said = "config.steps = 4 (now 6), config.optimizer.momentum = 0.0 (now 0.9)"
        assert str(error.value).endswith(f"; it was trained with {said}")
        assert runs.fingerprint(finished) == before

    def test_each_change_is_told_and_kept(self, folder, capsys):
        train_and_evaluate(cheap(**{**SHORT, **RATE, "steps": 6}), folder)
        first = [
            {"step": 4, "key": "steps", "old": 4, "new": 6},
            {"step": 4, "key": "optimizer.learning_rate", "old": 0.001, "new": 0.5},
        ]
        told = [line for line in capsys.readouterr().out.splitlines() if "config." in line]
        assert told == [
            "config.steps is 6 from step 4 on, 4 before",
            "config.optimizer.learning_rate is 0.5 from step 4 on, 0.001 before",
        ]
        key = lambda change: change["key"]  # noqa: E731
        assert sorted(written(folder)["history"], key=key) == sorted(first, key=key)
        train_and_evaluate(cheap(**{**SHORT, **RATE, "steps": 8}), folder)
        assert written(folder)["history"][2:] == [{"step": 6, "key": "steps", "old": 6, "new": 8}]
        assert filled(written(folder)["config"]).steps == 8

    def test_what_trained_nothing_is_not_kept(self, folder, run, capsys):
        """Changed, and changed back before anything was saved; or what came later is gone."""
        start = {"settings": {**resume.origin(run)["settings"], "dtype": "bfloat16"}}
        content = written(folder)
        content["history"] = [
            {"step": step, "key": "dtype", "old": old, "new": new}
            for step, old, new in [(1, "float32", "bfloat16"), (2, "bfloat16", "x"), (3, "x", "y")]
        ]
        (folder / "config.json").write_text(json.dumps(content))
        resume.record(folder, run, 2, start)
        assert written(folder)["history"] == [
            content["history"][0],
            {"step": 2, "key": "dtype", "old": "bfloat16", "new": "float32"},
        ]

    def test_a_new_run_has_no_history(self, folder, run):
        resume.record(folder, run, 0, None)
        assert written(folder)["history"] == []

    def test_a_checkpoint_that_does_not_tell_asks_config_json(self, folder, capsys):
        """As version 0.1 wrote them."""
        other = build(cheap(**{**SHORT, **RATE, "steps": 8}))
        resume.record(folder, other, 2, {})
        assert {change["key"] for change in written(folder)["history"]} == {
            *("steps", "optimizer.learning_rate")
        }


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"\xff\xfe{}",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"config": 1, "total_steps": 1}',
        b'{"config": {"steps": "x"}, "total_steps": 1}',
        b'{"config": {}, "total_steps": 1, "history": [1]}',
        b'{"config": {}, "total_steps": 1, "history": [{"step": null}]}',
        b'{"config": {"model": {"name": "gone"}}, "total_steps": 1}',
    ],
    ids=str,
)
@pytest.mark.parametrize("step", [2, 4])
def test_an_odd_config_json(folder, run, caplog, content, step):
    path = folder / "config.json"
    wanted = written(folder)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    start = resume.origin(run)
    resume.record(folder, run, step, start)
    (told,) = caplog.messages
    assert told.startswith(f"{path} (")
    assert told.endswith(") is written anew: its history is lost")
    assert "\n" not in told
    assert written(folder) == wanted
    changed = {**start["settings"], "dtype": "bfloat16"}
    with pytest.raises(ConfigError, match=r"trained with config\.dtype = bfloat16"):
        resume.record(folder, run, 4, {"settings": changed})


def missing(path):
    path.unlink()


def cut(path):
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-3]))


def without_the_first(path):
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))


def spoilt(path):
    text = path.read_text()
    path.write_text(text.replace('"step": 2, "split": "validation"', '"step": null, "split": 7'))


class TestMetrics:
    @pytest.mark.parametrize("damage", [missing, pytest.param(cut, marks=SLOW)])
    def test_no_table_without_the_last_step(self, folder, capsys, caplog, damage):
        damage(folder / "metrics.jsonl")
        with pytest.raises(ConfigError) as error:
            train_and_evaluate(cheap(**SHORT), folder)
        assert str(error.value) == (
            "metrics.jsonl holds no test accuracy of the last step, 4: there is no result; to "
            "measure it again, move checkpoints/4 elsewhere and give the same command"
        )
        assert "test accuracy" not in capsys.readouterr().out
        assert caplog.messages == []
        if damage is cut:  # what the line says helps
            shutil.move(folder / "checkpoints" / "4", folder / "elsewhere")
            result = train_and_evaluate(cheap(**SHORT), folder)
            assert result["test"]["step"] == 4
            assert "best_test" in result

    @pytest.mark.parametrize("damage", [without_the_first, pytest.param(spoilt, marks=SLOW)])
    def test_no_best_steps_without_all_lines(self, folder, capsys, damage):
        damage(folder / "metrics.jsonl")
        for _ in range(2):  # it is not forgotten
            result = train_and_evaluate(cheap(**SHORT), folder)
            assert result.keys() == {"step", "finished", "test"}
            printed = capsys.readouterr().out
            assert "last step: " in printed
            assert "best steps: not known, metrics.jsonl has lost lines" in printed
            assert "best exit" not in printed

    def test_what_is_lost_on_the_way_is_told_at_once(self, folder, run, caplog):
        start = {"rows": 5}
        (folder / "metrics.jsonl").unlink()
        with resume.open_metrics(folder, run, 2, start) as writer:
            writer.write(3, "train", {"loss": 1})
            assert (writer.rows, writer.lost) == (6, 5)
        assert caplog.messages == [
            "metrics.jsonl has lost 5 of the 5 lines until step 2: the best steps will not be "
            "known at the end"
        ]

    @pytest.mark.parametrize(
        "odd",
        [
            *("", "7", "[]", "null", '{"step": 2', '{"split": "test"}', "[" * 100_000, "\0\0"),
            '{"step": "2", "split": "test", "accuracy": 1}',
            '{"step": true, "split": "test", "accuracy": 1}',
            '{"step": 2, "split": "dev", "accuracy": 1}',
            '{"step": 2, "split": [], "accuracy": 1}',
            '{"step": 2, "split": "test", "accuracy": "1"}',
            '{"step": 2, "split": "test", "accuracy": NaN}',
            '{"step": 2, "split": "test", "accuracy": 1' + "0" * 400 + "}",
        ],
        ids=lambda text: text[:50],
    )
    def test_a_line_without_metrics_is_none(self, folder, odd):
        whole = read_metrics(folder)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(f"{odd}\n")
        assert read_metrics(folder) == whole
        assert report.summary(read_metrics(folder))["test"]["step"] == 4
