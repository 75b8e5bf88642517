"""The configuration: defaults, completion, and one check of all values."""

import dataclasses
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import jdecouple as jd
from jdecouple.checkpoint import Checkpointer
from jdecouple.methods.objectives import CrossEntropy
from jdecouple.train import config as configuration
from jdecouple.train.config import ConfigError, default, filled, validate
from jdecouple.train.options import OWNERS, options
from jdecouple.train.run import build

OLDER = Path(__file__).parents[1] / "checkpoints_0.1"


def flat(section, path=""):
    for key, value in section.items():
        if isinstance(value, ConfigDict):
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def test_defaults_are_valid():
    assert dict(flat(validate(default()))) == dict(flat(default()))


def test_keys_that_others_rely_on():
    keys = dict(flat(default()))
    for key in (
        *("method.name", "model.name", "data.name", "data.data_dir", "data.augment"),
        *("data.label_noise", "optimizer.name", "optimizer.learning_rate", "schedule"),
        *("microbatches", "mesh.stages", "mesh.data", "num_stages", "batch_size", "epochs"),
        *("steps", "eval_every", "checkpoint.every", "checkpoint.keep", "dtype", "seed"),
        *("log_every", "split", "boundaries"),
        *("optimizer.warmup_epochs", "optimizer.warmup_start"),
        *("data.max_length", "data.vocabulary_size", "data.glove", "data.buckets"),
    ):
        assert key in keys


def test_values_left_open_are_not_linked():
    config = default()
    before = dict(flat(config))
    config.data.image_size = 16
    config.mesh.stages = 3
    changed = {key for key, value in flat(config) if value != before[key]}
    assert changed == {"data.image_size", "mesh.stages"}


@pytest.mark.parametrize(
    ("section", "name"), [(key, name) for key in OWNERS for name in OWNERS[key].names()]
)
def test_options_of_every_owner(section, name):
    """Each has a type, which its default has, and takes no key that means something else."""
    given = {key: value for key, (_, value) in options(section, name).items()}
    assert not given.keys() & default()[section].keys()
    assert object not in [kind for kind, _ in options(section, name).values()]
    complete = filled({section: {"name": name, **given}})
    left = {key: value for key, value in given.items() if value is not None}
    assert configuration.chosen(complete, section) == left


@pytest.fixture
def own_method():
    """Its options have the names of others' and types of their own."""
    fields = [("projector", int, 8), ("rate", float, 1), ("weights", "list[int] | None", None)]
    objective = dataclasses.make_dataclass("Own", fields, bases=(CrossEntropy,), frozen=True)
    jd.methods.register("own", objective, jd.routes.Synchronous)


def test_options_belong_to_their_owner(own_method):
    assert {key: kind for key, (kind, _) in options("method", "own").items()} == {
        "projector": int,
        "rate": float,
        "weights": object,
        "init": str,
    }
    assert filled({"method": {"name": "own", "projector": 9}}).method.projector == 9
    assert filled({"method": {"projector": "9-9"}}).method.projector == "9-9"
    for method, said in (
        ({"name": "own", "projector": "9-9"}, "projector is '9-9': a value of type int is needed"),
        ({"projector": 9}, "config.method.projector is 9: a value of type str is needed"),
        ({"rate": 1.0}, "config.method.rate is set, but method 'deinforeg' takes only: projector,"),
    ):
        with pytest.raises(ConfigError) as error:
            filled({"method": method})
        assert said in str(error.value)


def test_unknown_keys_of_a_default_are_refused_at_once():
    with pytest.raises((KeyError, AttributeError)):
        default().batchsize = 3


def test_partial_mapping_is_completed():
    config = filled({"model": {"width": 1}, "boundaries": [0, 1], "optimizer": {"b1": 0}})
    assert (config.model.name, config.model.width) == (default().model.name, 1.0)
    assert config.boundaries == (0, 1)
    assert isinstance(config.optimizer.b1, float)


def test_an_open_value_may_be_set_back():
    config = filled({"model": {"layout": "scpl"}})
    config.model.layout = "None"  # as the command line gives it
    assert "layout" not in filled(config).model
    assert filled({"data": {"data_dir": None}}).data.data_dir is None


def test_an_older_file_holds_the_options_of_all():
    """At None, whoever's they are."""
    older = {"method": {"name": "bp", "projector": None}, "model": {"width": None}}
    assert filled(older) == filled({"method": {"name": "bp"}})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batchsize": 3}, "unknown key config.batchsize: allowed are accumulate, batch_size"),
        ({"data": {"nam": "x"}}, "unknown key config.data.nam: allowed are augment"),
        ({"data": "digits"}, "config.data is 'digits': a section with keys is needed"),
        ({"batch_size": True}, "config.batch_size is True: a value of type int is needed"),
        ({"batch_size": 8.0}, "config.batch_size is 8.0: a value of type int is needed"),
        ({"batch_size": None}, "config.batch_size is None: a value of type int is needed"),
        ({"dtype": "None"}, "config.dtype is 'None': allowed are float32, bfloat16, float16"),
        ({"data": {"download": 1}}, "config.data.download is 1: a value of type bool is needed"),
        ({"steps": "3"}, "config.steps is '3': a value of type int is needed"),
        ({"optimizer": {"learning_rate": "1"}}, "learning_rate is '1': a value of type float"),
        ({"optimizer": {"learning_rate": float("inf")}}, "learning_rate is inf: a finite number"),
        ({"optimizer": {"end_learning_rate": -1e-9}}, "a finite number of at least 0 is needed"),
        ({"optimizer": {"decay_factor": 0.0}}, "decay_factor is 0.0: a finite number above 0"),
        ({"optimizer": {"decay_epochs": (2, 1)}}, "decay_epochs is (2, 1): increasing numbers"),
        ({"optimizer": {"decay_epochs": ("a",)}}, "decay_epochs is ('a',): increasing numbers"),
        ({"boundaries": (0, 1.5)}, "config.boundaries is (0, 1.5): increasing whole numbers"),
        ({"boundaries": (0, True)}, "config.boundaries is (0, True): increasing whole numbers"),
        ({"optimizer": {"warmup_epochs": -0.5}}, "warmup_epochs is -0.5: a finite number of at le"),
        ({"optimizer": {"warmup_epochs": float("inf")}}, "warmup_epochs is inf: a finite number"),
        ({"optimizer": {"warmup_start": 1.01}}, "warmup_start is 1.01: a finite number of at le"),
        ({"optimizer": {"warmup_start": "x"}}, "warmup_start is 'x': a value of type float"),
        ({"data": {"buckets": (3, 2)}}, "config.data.buckets is (3, 2): increasing whole numbers"),
        ({"data": {"buckets": "3"}}, "config.data.buckets is '3': a value of type tuple is needed"),
        ({"data": {"glove": 3}}, "config.data.glove is 3: a value of type str is needed"),
        ({"split": 3}, "config.split is 3: a value of type str is needed"),
        ({"split": "fdg", "boundaries": (0, 1)}, "config.split and config.boundaries are both set"),
        ({"method": {"alpha": True}}, "config.method.alpha is True: a value of type float"),
        ({"method": {"name": "adl", "accumulate": 2.0}}, "accumulate is 2.0: a value of type int"),
        (
            {"method": {"accumulate": 2}},
            "config.method.accumulate is set, but method 'deinforeg' t",
        ),
        ({"method": {"name": "x"}}, "config.method.name is 'x': allowed are bp, early_exit"),
        ({"model": {"name": 3}}, "config.model.name is 3: allowed are gpt, lstm, lstm_lm, mlp"),
        ({"model": {"bogus": 3}}, "config.model.bogus is set, but model 'vgg8' takes only: layout"),
        ({"optimizer": {"nesterov": True}}, "optimizer 'adam' takes only: b1, b2, eps, weight_dec"),
        (
            {"optimizer": {"lr": 0.1}},
            "weight_decay, beside decay_epochs, decay_factor, end_learning_rate, learning_rate, ",
        ),
        ({"optimizer": {"learning_rat": 0.1}}, "; did you mean 'learning_rate'?"),
        ({"dtype": "float64"}, "config.dtype is 'float64': allowed are float32, bfloat16, float16"),
        ({"wire": "int4"}, "config.wire is 'int4': allowed are float32, bfloat16, int8"),
        ({"data": {"label_noise": float("nan")}}, "label_noise is nan: a finite number of at lea"),
        ({"log_every": 0}, "config.log_every is 0: a whole number from 1 to 2147483647 is needed"),
        ({"seed": -1}, "config.seed is -1: a whole number from 0 to 4294967295 is needed"),
    ],
)
def test_bad_values(given, said):
    with pytest.raises(ConfigError) as error:
        validate(given)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


TINY = {
    "data": {"name": "synthetic", "synthetic_size": 20, "image_size": 4},
    "model": {"name": "mlp", "hidden": 4, "depth": 2},
    "method": {"name": "bp"},
    "batch_size": 6,
}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"data.validation": 1.0}, "config.data.validation is 1.0: a fraction in [0, 1) or a"),
        ({"data.max_length": 0}, "config.data.max_length is 0: a whole number of at least 1"),
        ({"data.max_length": 9}, "config.data.max_length is 9: data set 'synthetic' holds ima"),
        ({"data.num_classes": 0}, "config.data.num_classes is 0: a whole number of at least 2"),
        ({"data.augment": "x"}, "unknown augmentation 'x': allowed are none, ba"),
        (
            {"data.crop_padding": 2},
            "config.data.crop_padding is 2, but augmentation 'none' does not",
        ),
        ({"data.crop_mode": "x"}, "config.data.crop_mode is 'x': allowed are zeros, reflect"),
        ({"data.cutout": 99}, "config.data.cutout is 99: at most the images' side, "),
        ({"data.std": (0.0,) * 3}, "config.data.std is (0.0, 0.0, 0.0): a number above 0, at most"),
        (
            {"data.clean": "paper"},
            "config.data.clean is 'paper': data set 'synthetic' holds images",
        ),
        ({"batch_size": 0}, "config.batch_size is 0: a whole number of at least 1 is nee"),
        ({"batch_size": 99}, "config.batch_size is 99: the train split has 18 examples"),
        ({"mesh.data": 4}, "a batch of 6 does not divide into 1 microbatch(es) on 4 replica(s)"),
        ({"mesh.data": 2, "microbatches": 2}, "into 2 microbatch(es) on 2 replica(s)"),
        ({"mesh.data": 0}, "mesh axis data is 0: a whole number of at least 1 is needed"),
        ({"mesh.stages": 0}, "mesh axis stages is 0: a whole number of at least 1 is needed"),
        ({"mesh.replicas": (1, 0)}, "replicas are (1, 0): a whole number of at least 1 is needed"),
        ({"num_stages": 3}, "config.num_stages is 3: between 1 and the model's 2 blocks is allo"),
        ({"mesh.stages": 3}, "num_stages is 3: between 1 and the model's 2 blocks is allowed"),
        ({"chunk": 0}, "config.chunk is 0: a whole number of at least 1 is needed"),
        ({"clip_norm": 0.0}, "config.clip_norm is 0.0: a finite number above 0 is needed"),
        ({"engine": "x"}, "config.engine is 'x': allowed are mpmd, spmd, auto"),
        ({"schedule": "x"}, "schedule 'x' does not fit method bp: allowed are auto, sequential"),
        ({"optimizer.schedule": "x"}, "unknown learning-rate schedule 'x': allowed are constant"),
        ({"optimizer.b1": 1.5}, "config.optimizer.b1 is 1.5: a number in [0, 1) is needed"),
        ({"model.hidden": 0}, "config.model.hidden is 0: a whole number of at least 1"),
        ({"method.init": "x"}, "config.method.init is 'x': allowed are flax, torch"),
    ],
)
def test_bad_values_that_their_owner_refuses(given, said):
    config = filled(TINY)
    for key, value in given.items():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError) as error:
        build(config)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "kind"),
    [("seed", int), ("steps", int), ("model.layout", str), ("boundaries", tuple)],
)
def test_value_type_of_a_key(key, kind):
    assert configuration.value_type(filled({}, all_options=True), key) is kind


def test_value_type_of_a_section():
    assert configuration.value_type(default(), "mesh") is ConfigDict


@pytest.mark.parametrize("key", ["", "steps.x", "data.", "data.nothing", "nothing.at.all"])
def test_value_type_of_no_key(key):
    with pytest.raises(ConfigError, match="unknown key config"):
        configuration.value_type(default(), key)


class TestIdentity:
    def test_of_the_same_run(self):
        before = configuration.identity(default())
        again = default()
        again.epochs, again.log_every, again.dtype = 7, 3, "bfloat16"
        again.optimizer.learning_rate = 0.5
        again.data.data_dir = "/elsewhere"
        again.mesh.stages = 3
        after = configuration.identity(again)
        configuration.check_identity(after, before)
        assert after == before

    @pytest.mark.parametrize("folder", sorted(OLDER.iterdir()), ids=lambda folder: folder.name)
    def test_of_a_run_that_version_0_1_wrote(self, folder):
        """Whose file holds the options of all methods, None but for its own."""
        config = filled(json.loads((folder / "config.json").read_text())["config"])
        (extra,) = Checkpointer(folder / "checkpoints", read_only=True).extras().values()
        now = configuration.identity(config)
        assert now == {key: extra["identity"][key] for key in now}

    @pytest.mark.parametrize(
        "given",
        [
            {"seed": 1},
            {"batch_size": 4},
            {"method": {"name": "bp"}},
            {"model": {"width": 0.5}},
            {"data": {"label_noise": 0.1}},
            {"data": {"cutout": 4}},
            {"data": {"crop_mode": "reflect"}},
            {"data": {"clean": "paper"}},
            {"data": {"mean": (0.5,)}},
            {"method": {"alpha": 0.5}},
            {"optimizer": {"name": "sgd"}},
        ],
    )
    def test_of_another_run(self, given):
        with pytest.raises(ConfigError, match="the workdir holds a run with config"):
            configuration.check_identity(
                configuration.identity(filled(given)), configuration.identity(default())
            )

    @pytest.mark.parametrize(
        ("now", "before", "said"),
        [
            ({"boundaries": [0, 2]}, {"boundaries": [0, 1]}, "config.boundaries = [0, 1], now [0"),
            ({}, {"boundaries": [0, 1]}, "config.boundaries = [0, 1], now None"),
            ({"boundaries": [0, 1]}, {}, "config.boundaries = None, now [0, 1]"),
            ({"schedule": "interleaved"}, {}, "config.schedule = one without queues, now interle"),
            ({"JAX version": "2"}, {"JAX version": "1"}, "with JAX version = 1, now 2: choose"),
        ],
    )
    def test_with_other_queues(self, now, before, said):
        same = configuration.identity(default())
        with pytest.raises(ConfigError) as error:
            configuration.check_identity({**same, **now}, {**same, **before})
        assert said in str(error.value)
        assert "\n" not in str(error.value)
