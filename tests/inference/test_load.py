"""A run is loaded without its data, and predicts what training evaluated."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest
import runs
import text_sets
from absl import logging

import jdecouple as jd
from jdecouple.checkpoint import Checkpointer
from jdecouple.inference.rules import exits
from jdecouple.methods.routes import Delayed
from jdecouple.train.loop import train_and_evaluate
from jdecouple.train.run import build

STEPS = {"checkpoint__every": 9, "epochs": 3}

FAST = ("early_exit",)  # which the tests below train, too


def values_of(name: str) -> dict:
    """A tiny run by any method, of three blocks."""
    values = {"method__name": name, "method__projector": None, **STEPS}
    values |= {f"method__{key}": value for key, value in nets.ARGUMENTS.get(name, {}).items()}
    if isinstance(nets.method(name).route, Delayed):
        values["num_stages"] = 2
    return values


def trained(name: str):
    return runs.finished_here(**values_of(name))


def evaluated(values: dict, workdir, step: int):
    """The trainer of a configuration, the state of a checkpoint, and the data set."""
    built = build(runs.tiny(**values))
    trainer = built.trainer
    checkpoints = Checkpointer(workdir / "checkpoints", read_only=True)
    restored = checkpoints.restore(trainer.to_arrays(trainer.abstract()), step)
    return trainer, trainer.from_arrays(step, restored.arrays), built.dataset


def batches(split, size=8):
    return jd.data.evaluation_batches(split, size)


@pytest.mark.parametrize("name", nets.marked(jd.methods.names(), FAST))
class TestEveryMethod:
    def test_predicts_what_was_evaluated(self, name):
        workdir = trained(name)
        run = jd.load(workdir)
        trainer, state, dataset = evaluated(values_of(name), workdir, run.step)
        assert run.exits == trainer.exits
        wanted = trainer.predict(state, batches(dataset.test))
        images = dataset.test.gather(np.arange(len(dataset.test)))
        found = run.predict(images["x"])
        assert found.logits.dtype == np.float32
        np.testing.assert_array_equal(found.logits, wanted)
        np.testing.assert_array_equal(found.labels, wanted[-1].argmax(-1))
        metrics = trainer.evaluate(state, batches(dataset.test))
        for exit in run.exits:
            labels = run.predict(images["x"], exit=exit).labels
            right = np.mean(labels == images["label"])
            assert metrics[f"exit_{exit}/accuracy"] == pytest.approx(right, abs=1e-7)
        one = run.predict(images["x"][13])
        np.testing.assert_array_equal(one.logits, wanted[:, 13:14])
        if len(run.exits) < 2:  # a rule that `predict` refuses is not chosen
            with pytest.raises(ValueError, match="early exit needs"):
                run.calibrate(dataset.test, accuracy=0.1)

    def test_after_another_number_of_stages(self, name):
        run, apart = jd.load(trained(name)), jd.load(trained(name), mesh=jd.make_mesh(2))
        assert apart.boundaries == (0, 1)
        assert {device for p in apart.predictor.placements for device in p.devices} == {
            *jax.devices()[:2]
        }
        images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), np.uint8)
        np.testing.assert_array_equal(apart.predict(images).logits, run.predict(images).logits)


@pytest.fixture(scope="module")
def run():
    return jd.load(trained("early_exit"))


def images(count=9):
    return np.random.default_rng(1).integers(0, 256, (count, 8, 8, 1), np.uint8)


class TestPredict:
    def test_predictions(self, run):
        found = run.predict(images())
        assert found.logits.shape == (2, 9, 10)
        wanted = np.asarray(jax.nn.softmax(found.logits[-1], axis=-1))
        np.testing.assert_allclose(found.probabilities, wanted, rtol=1e-5, atol=1e-7)
        assert found.class_names == run.class_names == tuple("0123456789")
        assert found.names == [str(label) for label in found.labels]
        assert run.exits == (0, 1)
        np.testing.assert_array_equal(found.exit, [1] * 9)
        early = run.predict(images(), exit=0)
        np.testing.assert_array_equal(early.labels, found.logits[0].argmax(-1))
        np.testing.assert_array_equal(early.exit, [0] * 9)

    def test_batch_sizes(self, run):
        """The default is that of evaluation; others give the same but for rounding."""
        found = run.predict(images())
        np.testing.assert_array_equal(run.predict(images(), batch_size=8).logits, found.logits)
        for size in (1, 3, 50):
            logits = run.predict(images(), batch_size=size).logits
            np.testing.assert_allclose(logits, found.logits, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("mesh", [None, jd.make_mesh(2)])
    def test_a_rule(self, run, mesh):
        """Each leaves where the rule, read on all logits, says."""
        whole = run.predict(images()).logits
        middle = float(np.median(jax.nn.softmax(whole[0]).max(axis=-1)))
        rule = jd.inference.Rule("confidence", middle)
        found = jd.load(run.workdir, mesh=mesh).predict(images(), exit=rule)
        np.testing.assert_array_equal(found.exit, exits(rule, whole))
        assert {*found.exit} == {0, 1}
        used = found.logits[found.exit, np.arange(9)]
        np.testing.assert_allclose(used, whole[found.exit, np.arange(9)], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(found.labels, used.argmax(-1))
        assert np.isnan(found.logits[1 - found.exit, np.arange(9)]).all()

    def test_replicas(self, run):
        spread = jd.load(run.workdir, mesh=jd.make_mesh(1, 2))
        logits = spread.predict(images(), batch_size=3).logits
        np.testing.assert_allclose(logits, run.predict(images()).logits, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"exit": 2}, "exit is 2: allowed are 0, 1, or a rule"),
            ({"exit": -1}, "exit is -1: allowed are"),
            ({"exit": True}, "exit is True: allowed are"),
            ({"batch_size": 0}, "batch_size is 0: a whole number of at least 1"),
            ({"x": images()[:, :5]}, r"images are uint8\[9, 5, 8, 1\]"),
        ],
    )
    def test_refused(self, run, options, said):
        with pytest.raises(ValueError, match=said) as error:
            run.predict(**{"x": images(), **options})
        assert "\n" not in str(error.value)

    def test_labelled_examples(self, run):
        labels = np.arange(9) % 10
        wanted = run.predict(images()).logits
        for data in (
            jd.data.from_arrays(images(), labels, num_classes=10),
            {"x": images(), "label": labels},
            [{"x": images()[a:b], "label": labels[a:b]} for a, b in ((0, 8), (8, 9))],
        ):
            logits, found = run.logits(data)
            np.testing.assert_array_equal(found, labels)
            np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match=r"images are uint8\[9, 5, 8, 1\]"):
            run.logits({"x": images()[:, :5], "label": labels})


@pytest.mark.parametrize("name", nets.marked(["early_exit", "deinforeg"], FAST))
def test_modules_compute_what_is_predicted(name):
    run = jd.load(trained(name))
    found, features = run.predict(images()).logits, run.transform(images())
    for number, (block, head) in enumerate(zip(run.blocks, run.heads, strict=True)):
        features = block(features)
        np.testing.assert_allclose(head.logits(features), found[number], rtol=1e-4, atol=1e-4)
    if name == "deinforeg":  # which trains the classifiers of its heads alone
        assert run.classifier is None
    else:
        np.testing.assert_allclose(run.classifier(features), found[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_dropout_and_statistics_are_those_of_evaluation(tmp_path):
    values = {"model__name": "vgg8", "model__width": 0.05, "data__image_size": 16, **STEPS}
    workdir = tmp_path / "run"
    config = runs.cheap(**values, steps=2)
    del config.model.hidden, config.model.depth
    train_and_evaluate(config, workdir)
    run = jd.load(workdir)
    x = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 1), np.uint8)
    features = run.transform(x)
    for block in run.blocks:
        features = block(features)
    logits = run.classifier(features)
    np.testing.assert_allclose(logits, run.predict(x).logits[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_texts_without_data(tmp_path):
    (tmp_path / "vectors.txt").write_text("good 1 2 3\nbad 4 5 6\n")
    name, workdir = text_sets.csv_set(tmp_path / "data"), tmp_path / "run"
    train_and_evaluate(text_sets.tiny(name, data__glove=str(tmp_path / "vectors.txt")), workdir)
    (tmp_path / "data").rename(tmp_path / "gone")
    (tmp_path / "vectors.txt").unlink()
    run = jd.load(workdir, "last")
    texts = [text for _, text in text_sets.examples(16, seed=1)]
    found = run.predict(texts)
    np.testing.assert_array_equal(run.predict(run.inputs.encode(texts)).logits, found.logits)
    metrics = [row for row in runs.lines(workdir) if row["split"] == "test"][-1]
    right = np.mean(found.labels == np.arange(16) % 2)
    assert metrics["accuracy"] == pytest.approx(right, abs=1e-7)
    np.testing.assert_array_equal(run.predict(texts[5]).logits, found.logits[:, 5:6])
    assert found.class_names == ("0", "1")


def damage(workdir, step):
    """Spoils the arrays of a checkpoint, not what it says of them."""
    state = workdir / "checkpoints" / str(step) / "state"
    for path in state.rglob("*"):
        if path.is_file() and "d" in path.relative_to(state).parts:
            path.write_bytes(bytes(path.stat().st_size))


class TestSteps:
    def test_steps(self, tmp_path):
        workdir = runs.copy(trained("early_exit"), tmp_path)
        checkpoints = Checkpointer(workdir / "checkpoints", read_only=True)
        steps = checkpoints.steps()
        assert jd.load(workdir, "last").step == steps[-1] == 27
        assert jd.load(workdir).step == checkpoints.best_step
        assert jd.load(workdir, steps[0]).step == steps[0]
        with pytest.raises(ValueError, match=r"no checkpoint 5 in .*; there are \[9, 18, 27\]"):
            jd.load(workdir, 5)
        for step in ("newest", 1.5, True, None):
            with pytest.raises(ValueError, match="'best', 'last' or that of a checkpoint"):
                jd.load(workdir, step)
        damaged = workdir / "checkpoints" / "27" / "info" / "metadata"
        damaged.write_text(damaged.read_text()[:-9])
        assert jd.load(workdir, "last").step == 18
        with pytest.raises(ValueError, match=r"checkpoint 27 in .* cannot be used: info/metadata"):
            jd.load(workdir, 27)
        for step in steps:
            shutil.rmtree(workdir / "checkpoints" / str(step))
        with pytest.raises(ValueError, match="no usable checkpoint"):
            jd.load(workdir)

    def test_another_in_place_of_damaged_arrays(self, tmp_path, monkeypatch):
        told = []
        monkeypatch.setattr(logging, "warning", lambda text, *args: told.append(text % args))
        workdir = runs.copy(trained("early_exit"), tmp_path)
        checkpoints = Checkpointer(workdir / "checkpoints", read_only=True)
        best = checkpoints.best_step
        damage(workdir, best)
        others = [step for step in checkpoints.steps() if step != best]
        with pytest.raises(ValueError, match=rf"checkpoint {best} in .* cannot be used: "):
            jd.load(workdir, best)
        assert (found := jd.load(workdir).step) in others
        assert told == [f"checkpoint {best} is damaged: {found} is taken instead"]
        told.clear()
        damage(workdir, others[-1])
        damage(workdir, others[0])
        for step in ("best", "last"):
            with pytest.raises(ValueError, match=r"no usable checkpoint in .*: \d+: ") as error:
                jd.load(workdir, step)
            assert "\n" not in str(error.value)
        assert not told

    def test_no_run(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no run in"):
            jd.load(tmp_path)
        with pytest.raises(ValueError, match="'ftp://host/run' is no folder"):
            jd.load("ftp://host/run")

    def test_an_old_checkpoint_says_what_to_do(self):
        old = runs.REPOSITORY / "tests" / "checkpoints_0.1" / "deinforeg"
        with pytest.raises(
            ValueError, match=r"does not describe its network.*train it on"
        ) as error:
            jd.load(old)
        assert "\n" not in str(error.value)

    def test_another_network_is_refused(self, tmp_path, monkeypatch):
        """As where a model of one's own has changed, or is not there."""
        workdir = trained("early_exit")
        monkeypatch.setitem(jd.models._BUILDERS, "mlp", jd.models.get("resnet20"))
        with pytest.raises(ValueError, match=r"checkpoint .* in .* cannot be loaded"):
            jd.load(workdir)
        monkeypatch.delitem(jd.models._BUILDERS, "mlp")
        with pytest.raises(ValueError, match=r"unknown model 'mlp'.*registers it and then calls"):
            jd.load(workdir)


def test_nothing_is_written_and_a_training_may_go_on(tmp_path):
    """The folder may be read-only, locked by a training, and lose a checkpoint at any time."""
    workdir = runs.copy(trained("early_exit"), tmp_path)
    before = runs.fingerprint(workdir)
    for path in (workdir, workdir / "checkpoints"):
        path.chmod(0o555)
    try:
        from jdecouple.train.lock import only_run

        workdir.chmod(0o755)
        with only_run(workdir):
            workdir.chmod(0o555)
            jd.load(workdir).predict(images())
    finally:
        for path in (workdir, workdir / "checkpoints"):
            path.chmod(0o755)
    (workdir / ".lock").unlink(missing_ok=True)
    assert runs.fingerprint(workdir) == before


def test_a_checkpoint_that_is_deleted_while_it_is_read(tmp_path, monkeypatch):
    workdir = runs.copy(trained("early_exit"), tmp_path)
    read, deleted = Checkpointer.read, []

    def deleting(self, step, *arguments):
        if not deleted:
            deleted.append(step)
            shutil.rmtree(self.directory / str(step))
        return read(self, step, *arguments)

    monkeypatch.setattr(Checkpointer, "read", deleting)
    run = jd.load(workdir)
    assert deleted
    assert run.step not in deleted


def test_default_options_are_kept(tmp_path):
    """A later default does not change what is loaded; JSON holds all of it."""
    workdir = trained("early_exit")
    info = json.loads((workdir / "checkpoints" / "9" / "info" / "metadata").read_text())
    kept = info["document"]["extra"]["inference"]
    own = {"weights": [1.0], "head_pool": 1, "branch": "linear", "init": "flax"}
    assert kept["method"]["arguments"] == own
    assert kept["model"]["arguments"].items() >= {"hidden": 16, "depth": 2}.items()
    assert kept["inputs"]["kind"] == "images"
    assert (kept["batch_size"], kept["seed"], kept["dtype"]) == (8, 0, None)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path, dtype):
    values = {**values_of("bp"), "dtype": dtype}
    workdir = runs.finished_here(**values)
    run = jd.load(workdir)
    trainer, state, dataset = evaluated(values, workdir, run.step)
    wanted = trainer.predict(state, batches(dataset.test))
    found = run.predict(dataset.test.gather(np.arange(20))["x"]).logits
    np.testing.assert_array_equal(found, wanted)
    assert np.array_equal(found, np.asarray(jnp.asarray(found, dtype), np.float32))


SCRIPT = """
import sys
import numpy as np
import jdecouple as jd
for workdir in sys.argv[1:]:
    run = jd.load(workdir)
    images = np.load(workdir + "/images.npy")
    np.save(workdir + "/logits.npy", run.predict(images).logits)
    np.save(workdir + "/one.npy", run.predict(images[13]).logits)
"""


@pytest.mark.slow
def test_a_fresh_process_without_the_data(tmp_path):
    """On one image and on a thousand: the losses are those of training's last evaluation."""
    workdirs, labels = {}, {}
    for name in jd.methods.names():
        workdirs[name] = tmp_path / name
        values = {**values_of(name), "data__synthetic_size": 4000, "steps": 9}
        assert runs.server().run(*runs.arguments(workdirs[name], **values)).returncode == 0
        test = build(runs.tiny(**values)).dataset.test.gather(np.arange(1000))
        np.save(workdirs[name] / "images.npy", test["x"])
        labels[name] = test["label"]
    command = [sys.executable, "-c", SCRIPT, *map(str, workdirs.values())]
    subprocess.run(command, check=True, env=runs.environment(), cwd=tmp_path)
    for name, workdir in workdirs.items():
        metrics = [row for row in runs.lines(workdir) if row["split"] == "test"][-1]
        logits, one = np.load(workdir / "logits.npy"), np.load(workdir / "one.npy")
        np.testing.assert_array_equal(one, logits[:, 13:14], err_msg=name)
        for exit, answers in zip(jd.load(workdir).exits, logits, strict=True):
            right = np.mean(answers.argmax(-1) == labels[name])
            assert metrics[f"exit_{exit}/accuracy"] == pytest.approx(right, abs=1e-7), name
            losses = optax.softmax_cross_entropy_with_integer_labels(answers, labels[name])
            loss = pytest.approx(float(losses.mean()), rel=1e-6)
            assert metrics[f"exit_{exit}/loss"] == loss, name
