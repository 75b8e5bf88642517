"""Bad input is told in one line with exit code 2 and touches no checkpoint."""

import numpy as np
import pytest
import runs
from flax.traverse_util import flatten_dict
from runs import arguments, fingerprint
from runs import finished_here as finished
from tfds_writer import png, write_image_set

from jdecouple.train import cli as command_line

VISION, DELAYED = "configs/vision.py", "configs/delayed.py"
NO_CUT = "split 'fdg' has no cut into {} stages: allowed are 2, 3"
SIZES = {
    **dict.fromkeys(
        ("steps", "epochs", "log_every", "eval_every", "checkpoint__every", "checkpoint__keep"),
        "{} is 0: a whole number from 1",
    ),
    **dict.fromkeys(
        ("microbatches", "max_in_flight", "chunk"), "{} is 0: a whole number of at least 1"
    ),
    **dict.fromkeys(("batch_size", "data__image_size"), "{} is 0: a whole number of at least 1"),
    "data__synthetic_size": "{} is 0: a whole number of at least 2",
    **dict.fromkeys(("mesh__stages", "num_stages"), "mesh axis stages is 0: a whole"),
    "mesh__data": "mesh axis data is 0: a whole number of at least 1 is needed",
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(runs.REPOSITORY)
    # Other tests of this process read the log as it is by default.
    monkeypatch.setattr(command_line, "log_in_short", lambda: None)


@pytest.fixture
def refused(capfd):
    """Runs a command line that must be refused in one line; returns that line."""

    def run(*argv):
        with pytest.raises(SystemExit) as stopped:
            command_line.main(["train.py", *argv])
        assert stopped.value.code == 2
        error = capfd.readouterr().err
        assert "Traceback" not in error
        told = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(told) == 1
        assert error.splitlines()[-1] == told[0]
        return told[0]

    return run


@pytest.fixture
def workdir():
    """The workdir of a finished run, whose checkpoints must stay as they are."""
    folder = finished()
    before = fingerprint(folder)
    yield folder
    assert fingerprint(folder) == before


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"method__name": "bogus"}, "config.method.name is 'bogus': allowed are bp, early_exit"),
        ({"model__name": "bogus"}, "config.model.name is 'bogus': allowed are gpt, lstm, lstm_"),
        (
            {"optimizer__name": "bogus"},
            "config.optimizer.name is 'bogus': allowed are adam, adamw, lars",
        ),
        ({"data__name": "bogus"}, "data set 'bogus' cannot be opened"),
        ({"data__augment": "bogus"}, "unknown augmentation 'bogus': allowed are none, basic"),
        ({"schedule": "bogus"}, "schedule 'bogus' does not fit method deinforeg: allowed are auto"),
        ({"schedule": "sequential"}, "schedule 'sequential' does not fit method deinforeg"),
        ({"optimizer__schedule": "bogus"}, "unknown learning-rate schedule 'bogus': allowed are"),
        ({"dtype": "float64"}, "config.dtype is 'float64': allowed are float32, bfloat16, float16"),
        ({"bogus": 1}, "unknown key config.bogus: allowed are accumulate, batch_size, boundaries"),
        ({"model__bogus": 1}, "config.model.bogus is set, but model 'mlp' takes only: hid"),
        ({"mesh__bogus__x": 1}, "unknown key config.mesh.bogus: allowed are data, elastic, e"),
        ({"seed__x": 1}, "unknown key config.seed.x: config.seed is a value"),
        ({"method": "bp"}, "config.method is 'bp': a section with keys is needed"),
        ({"batch_size": "abc"}, "config.batch_size is 'abc': a value of type int is needed"),
        ({"batch_size": 1.5}, "config.batch_size is '1.5': a value of type int is needed"),
        ({"seed": "None"}, "config.seed is 'None': a value of type int is needed"),
        ({"mesh": "None"}, "config.mesh is 'None': a section with keys is needed"),
        (
            {"bogus": "None"},
            "unknown key config.bogus: allowed are accumulate, batch_size, boundaries",
        ),
        ({"model__width": "None"}, "config.model.width is set, but model 'mlp' takes only: hidden"),
        ({"batch_size": "1" * 5000}, "config.batch_size is '1111"),
        ({"optimizer__learning_rate": "1" * 5000}, "config.optimizer.learning_rate is inf: a fin"),
        ({"boundaries": f"(0,{'1' * 5000})"}, "config.boundaries is '(0,1111"),
        ({"optimizer__learning_rate": "fast"}, "config.optimizer.learning_rate is 'fast': a value"),
        ({"model__batch_norm": "maybe"}, "config.model.batch_norm is 'maybe': a value of type boo"),
        *[({key: 0}, said.format(key.replace("__", "."))) for key, said in SIZES.items()],
        ({"batch_size": -8}, "config.batch_size is -8: a whole number of at least 1"),
        ({"steps": 10**400}, "config.steps is a huge number: a whole number from 1 to 2147483647"),
        ({"model__hidden": 0}, "hidden is 0: a whole number of at least 1"),
        ({"model__depth": -1}, "depth is -1: a whole number of at least 1"),
        ({"seed": -1}, "config.seed is -1: a whole number from 0"),
        ({"seed": 2**32}, "config.seed is 4294967296: a whole number from 0 to 4294967295"),
        ({"num_stages": 3}, "num_stages is 3: between 1 and the model's 2 blocks is allowed"),
        ({"mesh__stages": 3}, "num_stages is 3: between 1 and the model's 2 blocks is allowed"),
        ({"boundaries": "(1,1)"}, "config.boundaries is (1, 1): increasing whole numbers"),
        ({"boundaries": "(1,0)"}, "config.boundaries is (1, 0): increasing whole numbers"),
        ({"boundaries": "('a',)"}, "config.boundaries is ('a',): increasing whole numbers"),
        ({"boundaries": "(0,5)"}, "boundaries (0, 5) do not cut 2 blocks into 2 stages"),
        ({"mesh__data": 3}, "a batch of 8 does not divide into 1 microbatch(es) on 3 replica(s)"),
        ({"microbatches": 5}, "a batch of 8 does not divide into 5 microbatch(es)"),
        ({"batch_size": 16, "mesh__data": 16}, "mesh axis data is 16, but only 8 device(s)"),
        ({"batch_size": 128}, "batch_size is 128: the train split has 72 examples"),
        ({"method__temperature": 0.1}, "config.method.temperature is set, but method 'deinforeg'"),
        ({"optimizer__momentum": 0.9}, "config.optimizer.momentum is set, but optimizer 'adam'"),
        ({"model__width": 0.5}, "config.model.width is set, but model 'mlp' takes only: hidden"),
        ({"method__alpha": -1}, "alpha is -1.0: a finite number of at least 0"),
        ({"method__projector": "8-x"}, "projector is '8-x': 'identity' or positive widths"),
        ({"optimizer__b1": 1.5}, "config.optimizer.b1 is 1.5: a number in [0, 1)"),
        ({"optimizer__learning_rate": 0}, "config.optimizer.learning_rate is 0.0: a finite number"),
        ({"optimizer__learning_rate": "nan"}, "config.optimizer.learning_rate is nan: a finite"),
        ({"data__label_noise": 1.5}, "config.data.label_noise is 1.5: a finite number of at least"),
        ({"data__validation": -0.1}, "config.data.validation is -0.1: a fraction in [0, 1"),
        ({"data__channels": 2}, "config.data.channels is 2: allowed are 1, 3"),
        ({"optimizer__warmup_epochs": -1}, "config.optimizer.warmup_epochs is -1.0: a finite numb"),
        ({"optimizer__warmup_epochs": "nan"}, "config.optimizer.warmup_epochs is nan: a finite"),
        ({"optimizer__warmup_start": -0.1}, "config.optimizer.warmup_start is -0.1: a finite num"),
        ({"optimizer__warmup_start": 1.5}, "config.optimizer.warmup_start is 1.5: a finite number"),
        (
            {"optimizer__warmup_start": 1.0, "optimizer__warmup_epochs": 1},
            "start is 1.0: a number in [0, 1) is needed",
        ),
    ],
)
def test_bad_value(refused, workdir, values, said):
    assert said in refused(*arguments(workdir, **values))


def of(method, **values):
    return {"method__name": method, "method__projector": "None", **values}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (of("fdg", method__beta=0), "beta is 0.0: a number above 0 and at most 1 is needed"),
        (of("fdg", method__beta=1.5), "beta is 1.5: a number above 0 and at most 1 is needed"),
        (of("adl", method__beta="nan"), "beta is nan: a number above 0 and at most 1 is needed"),
        (of("fdg", method__beta="x"), "config.method.beta is 'x': a value of type float is needed"),
        (of("adl", method__accumulate=0), "accumulate is 0: a whole number of at least 1 is need"),
        (of("adl", method__accumulate=1.5), "config.method.accumulate is '1.5': a value of type i"),
        (of("fr", method__first_stage_lr_scale=0), "first_stage_lr_scale is 0.0: a finite number"),
        (of("fr", method__first_stage_lr_scale="inf"), "first_stage_lr_scale is inf: a finite num"),
        (
            of("ddg", method__beta=0.5),
            "config.method.beta is set, but method 'ddg' takes only: current_weights, init",
        ),
        (
            of("fdg", method__accumulate=2),
            "config.method.accumulate is set, but method 'fdg' takes only: beta, current_weights",
        ),
        (of("fdg", microbatches=2), "num_microbatches is 2: schedule delayed takes 1, because"),
        (of("ddg", microbatches=2), "num_microbatches is 2: schedule delayed_locked takes 1"),
        (
            of("fdg", schedule="local"),
            "schedule 'local' does not fit method fdg: allowed are auto, delayed",
        ),
        (
            of("fr", schedule="delayed"),
            "schedule 'delayed' does not fit method fr: allowed are auto, delayed_locked",
        ),
        (
            of("bp", schedule="delayed"),
            "schedule 'delayed' does not fit method bp: allowed are auto, sequential",
        ),
        (of("fdg", split="fdg"), "the model has no split 'fdg': it has none"),
        (
            of("fdg", split="fdg", boundaries="(0,1)"),
            "config.split and config.boundaries are both set: give one of them",
        ),
    ],
)
def test_bad_value_of_a_delayed_run(refused, workdir, values, said):
    assert said in refused(*arguments(workdir, **values))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"split": "bogus"}, "the model has no split 'bogus': allowed are infopro, dgl, fr, fdg"),
        pytest.param({"num_stages": 4}, NO_CUT.format(4), marks=pytest.mark.slow),
        pytest.param({"num_stages": 1}, NO_CUT.format(1), marks=pytest.mark.slow),
        ({"boundaries": "(0,5)"}, "config.split and config.boundaries are both set"),
        ({"model__depth": 26}, "config.model.depth is set, but model 'resnet20' takes only: width"),
    ],
)
def test_bad_split(refused, workdir, values, said):
    small = {"model__width": 0.1, "data__image_size": 8, **values}
    assert said in refused(*arguments(workdir, f"{DELAYED}:synthetic,resnet20,fdg,2", **small))


@pytest.mark.parametrize(
    "values", [of("fdg", method__beta=0), of("adl", microbatches=2), of("fdg", split="fdg")]
)
def test_bad_values_leave_no_workdir(refused, tmp_path, values):
    refused(*arguments(tmp_path / "new", **values))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"seed": 1}, "config.seed = 0, now 1"),
        ({"batch_size": 4}, "config.batch_size = 8, now 4"),
        ({"model__hidden": 8}, "config.model = hidden 16 (now 8)"),
        ({"model__depth": 3}, "config.model = depth 2 (now 3)"),
        ({"method__alpha": 0.5}, "config.method = alpha None (now 0.5)"),
        ({"method__name": "bp", "method__projector": "None"}, "name 'deinforeg' (now 'bp')"),
        ({"optimizer__name": "sgd"}, "config.optimizer.name = adam, now sgd"),
        ({"data__augment": "none"}, "config.data = augment 'basic' (now 'none')"),
        ({"epochs": 1}, "the workdir holds step 27: the configuration ends at 9"),
    ],
)
def test_workdir_of_another_run(refused, workdir, values, said):
    assert said in refused(*arguments(workdir, **values))


def test_no_usable_checkpoint(refused, tmp_path):
    folder = runs.copy(finished(), tmp_path)
    for path in (folder / "checkpoints").rglob("manifest.ocdbt"):
        path.write_bytes(b"")
    before = fingerprint(folder)
    assert "no usable checkpoint" in refused(*arguments(folder))
    assert fingerprint(folder) == before


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["junk"], "unknown argument 'junk'; usage: python train.py --config FILE"),
        (["--junk=1"], "unknown flag --junk=1; usage: python train.py --config FILE"),
        (["--batch_size", "4"], "unknown flag --batch_size; usage:"),
    ],
)
def test_bad_arguments(refused, workdir, extra, said):
    assert said in refused(*arguments(workdir), *extra)


@pytest.mark.parametrize("missing", ["--config", "--workdir"])
def test_missing_flag(refused, tmp_path, missing):
    argv = arguments(tmp_path / "new")
    argv = [*argv[: argv.index(missing)], *argv[argv.index(missing) + 2 :]]
    assert "--config and --workdir are needed" in refused(*argv)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no file"),
        ("def get_config(:", "SyntaxError: "),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 1", "a function get_config() that returns a ConfigDict is needed"),
        ("def get_config():\n  return 7", "a function get_config() that returns a ConfigDict"),
        ("def get_config():\n  raise ValueError('one\\ntwo')", "one"),
        ("def get_config():\n  return {}['lost']", "KeyError: 'lost'"),
        ("def get_config():\n  return {'sead': 1}", "unknown key config.sead: allowed are"),
        ("def get_config():\n  return {'mesh': 2}", "config.mesh is 2: a section with keys"),
        ("def get_config():\n  return {'dtype': 2}", "config.dtype is 2: a value of type str"),
    ],
)
def test_bad_config_file(refused, workdir, tmp_path, content, said):
    file = tmp_path / "given.py"
    if content is not None:
        file.write_text(content)
    assert said in refused(*arguments(workdir, str(file)))


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("", "'dataset,model,method[@paper][,K]' is needed after the file: given ''"),
        ("cifar10,vgg8,bp,four", "'dataset,model,method[@paper][,K]' is needed after the file"),
        ("cifar10,vgg8,bogus", "unknown method 'bogus': allowed are bp, early_exit, greedy_exit"),
        ("cifar10,bogus,bp", "unknown model 'bogus': allowed are gpt, lstm, lstm_lm, mlp"),
    ],
)
def test_bad_argument_of_a_config_file(refused, workdir, argument, said):
    assert said in refused(*arguments(workdir, f"{VISION}:{argument}"))


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        *(
            (given, f"'dataset,model,method[@paper][,K]' is needed after the file: given {given!r}")
            for given in (
                *("", "cifar10", "cifar10,resnet20", "cifar10,resnet20,fdg,2,2"),
                *(f"cifar10,resnet20,fdg,{k}" for k in ("-1", "x", "1.5", "")),
            )
        ),
        ("cifar10,resnet20,fdg,0", "K is 0: a whole number of at least 1 is needed"),
        ("cifar10,resnet20,deinforeg,2", "method 'deinforeg' is not one of bp, 2bw, dsp, fdg"),
        (
            "cifar10,resnet20,bogus",
            "unknown method 'bogus': allowed are bp, early_exit, greedy_exit",
        ),
        ("cifar10,resnet21,fdg,2", "unknown model 'resnet21': allowed are gpt, lstm, lstm_"),
        pytest.param("synthetic,resnet20,fdg,9", NO_CUT.format(9), marks=pytest.mark.slow),
    ],
)
def test_bad_argument_of_the_delayed_config_file(refused, workdir, argument, said):
    assert said in refused(*arguments(workdir, f"{DELAYED}:{argument}"))


def test_image_too_small_for_the_model(refused, workdir):
    message = refused(
        *arguments(workdir, f"{VISION}:synthetic,vgg8,bp", data__image_size=8, model__width=0.1)
    )
    assert "image_size is 8: 4 poolings need at least 16" in message


def parsed(*overrides):
    """The configuration of a command line that begins with settings of runs.TINY, as a dict."""
    config, _ = command_line.parse(["train.py", *arguments("w"), *overrides])
    return flatten_dict(config.to_dict(), sep=".")


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["--config.steps=None"], {}),  # open anyway
        (["--config.method.alpha=None"], {}),
        (["--config.model.activation", "None"], {}),
        (["--config.boundaries=(0,1)", "--config.boundaries=None"], {}),
        (["--config.checkpoint.every=None"], {"checkpoint.every": None}),
        (["--config.data.image_size", "None"], {"data.image_size": None}),
        (["--config.epochs=None", "--config.batch_size=None"], {"epochs": 1, "batch_size": 128}),
        (["--config.optimizer.schedule=None"], {"optimizer.schedule": "cosine"}),
        (["--config.epochs=None", "--config.epochs=2"], {"epochs": 2}),
        (["--config.epochs=2", "--config.epochs=None"], {"epochs": 1}),
        (["--config.steps=None", "--config.steps", "2"], {"steps": 2}),
    ],
)
def test_none_takes_back(overrides, changed):
    """What is open stays so, and what the file set gets its default."""
    assert parsed(*overrides) == {**parsed(), **changed}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        *[(value, "a finite number above 0 is needed") for value in ("0", "-1")],
        ("inf", "config.model.width is inf: a number below 1000000 is needed"),
    ],
)
def test_bad_width(refused, workdir, value, said):
    config = f"{VISION}:synthetic,vgg8,bp"
    message = refused(*arguments(workdir, config, data__image_size=16, model__width=value))
    assert said in message


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("file", "workdir '{}': File exists"),
        ("file/below", "workdir '{}': Not a directory"),
        ("/proc/nowhere", "workdir '{}': No such file or directory"),
    ],
)
def test_unwritable_workdir(refused, tmp_path, place, said):
    (tmp_path / "file").write_text("not a folder")
    folder = tmp_path / place
    assert said.format(folder) in refused(*arguments(folder))
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl"])
def test_workdir_with_something_else_in_a_files_place(refused, tmp_path, name):
    if name == "checkpoints":
        (tmp_path / name).write_text("a file")
    else:
        (tmp_path / name).mkdir()
    assert str(tmp_path / name) in refused(*arguments(tmp_path))


def image_set(folder, labels, images=None):
    """A prepared set of grey images, 8 pixels a side, with these training labels."""
    blank = png(np.zeros((8, 8, 1), np.uint8))
    train = [blank] * len(labels) if images is None else images
    splits = {"train": (train, labels), "test": ([blank, blank], [0, 1])}
    return write_image_set(folder, "tiny", splits, num_classes=4, shape=(8, 8, 1))


def from_folder(workdir, folder):
    config = f"{VISION}:tiny,mlp,bp"
    return arguments(workdir, config, data__data_dir=folder, batch_size=4, model__hidden=8)


def test_missing_data_dir(refused, workdir, tmp_path):
    assert "does not exist" in refused(*from_folder(workdir, tmp_path / "nowhere"))


def test_empty_data_dir(refused, workdir, tmp_path):
    assert "data set 'tiny' cannot be opened" in refused(*from_folder(workdir, tmp_path))


def test_data_set_not_prepared(refused, workdir, tmp_path):
    message = refused(*arguments(workdir, data__name="fashion_mnist", data__data_dir=tmp_path))
    assert "data set 'fashion_mnist' is not prepared" in message
    assert "(data.data_dir names another folder, data.download=True prepares it)" in message
    assert "pip install" in message


def test_empty_data_set(refused, workdir, tmp_path):
    image_set(tmp_path, [])
    assert "split 'train' of data set 'tiny' is empty" in refused(*from_folder(workdir, tmp_path))


@pytest.mark.parametrize("label", [4, -1])
def test_label_out_of_range(refused, tmp_path, label):
    image_set(tmp_path / "data", [0, 1, 2, 3] * 5 + [label])
    message = refused(*from_folder(tmp_path / "run", tmp_path / "data"))
    assert f"split 'train': example 20 has label {label}: 0..3 is needed" in message


def test_nan_image(refused, tmp_path):
    images = np.zeros((24, 8, 8, 1), np.float32)
    images[17, 3, 3] = np.nan
    # TFDS stores a float image as the four bytes of each pixel.
    encoded = [png(image.view(np.uint8)) for image in images]
    folder = image_set(tmp_path / "data", [0, 1, 2, 3] * 6, encoded)
    features = folder / "features.json"
    features.write_text(features.read_text().replace('"uint8"', '"float32"'))
    message = refused(*from_folder(tmp_path / "run", tmp_path / "data"))
    assert "split 'train': example 17 has a pixel that is nan: finite pixels are needed" in message


def test_a_bad_batch_leaves_earlier_checkpoints(refused, tmp_path, monkeypatch):
    """What is found wrong only while training is told in the same way."""
    folder = runs.copy(finished(), tmp_path)
    before = fingerprint(folder / "checkpoints")

    def spoilt(*_):
        raise ValueError("split 'train': example 3 cannot be read (truncated)")

    monkeypatch.setattr("jdecouple.trainer.Trainer.put", spoilt)
    assert "example 3 cannot be read" in refused(*arguments(folder, epochs=4))
    assert fingerprint(folder / "checkpoints") == before
