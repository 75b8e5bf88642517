"""The configuration: defaults, completion, and one check of all values."""

import pytest
from ml_collections import ConfigDict

from jdecouple import methods, models, optim
from jdecouple.train import config as configuration
from jdecouple.train.config import ConfigError, default, filled, validate


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
        *("log_every", "split", "boundaries", "method.beta", "method.accumulate"),
        *("optimizer.warmup_epochs", "optimizer.warmup_start"),
        *("data.max_length", "data.vocabulary_size", "data.glove", "data.buckets"),
    ):
        assert key in keys


def test_values_left_open_are_not_linked():
    config = default()
    before = dict(flat(config))
    config.data.image_size = 16
    config.method.projector = "8-4"
    config.model.depth = 3
    config.optimizer.weight_decay = 0.5
    changed = {key for key, value in flat(config) if value != before[key]}
    assert changed == {
        "data.image_size",
        "method.projector",
        "model.depth",
        "optimizer.weight_decay",
    }


def test_every_argument_has_a_key():
    config = default()
    for section, names, arguments in (
        (config.method, methods.names(), methods.arguments),
        (config.model, models.names(), configuration.model_arguments),
        (config.optimizer, optim.names(), configuration.optimizer_arguments),
    ):
        for name in names:
            assert set(arguments(name)) <= set(section.keys())
            # No argument takes the place of a key that means something else.
            assert "name" not in arguments(name)
            assert not set(arguments(name)) & set(configuration.LEARNING_RATE)


def test_unknown_keys_of_a_default_are_refused_at_once():
    with pytest.raises((KeyError, AttributeError)):
        default().batchsize = 3


def test_partial_mapping_is_completed():
    config = filled({"model": {"hidden": 8}, "boundaries": [0, 1], "optimizer": {"b1": 0}})
    assert config.model.hidden == 8
    assert config.model.name == default().model.name
    assert config.boundaries == (0, 1)
    assert isinstance(config.optimizer.b1, float)


def test_an_open_value_may_be_set_back():
    config = filled({"model": {"blocks": "8,M|16"}})
    config.model.blocks = "None"  # as the command line gives it
    assert filled(config).model.blocks is None
    assert filled({"data": {"data_dir": None}}).data.data_dir is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batchsize": 3}, "unknown key config.batchsize: allowed are batch_size"),
        ({"data": {"nam": "x"}}, "unknown key config.data.nam: allowed are augment"),
        ({"data": "digits"}, "config.data is 'digits': a section with keys is needed"),
        ({"batch_size": True}, "config.batch_size is True: a value of type int is needed"),
        ({"batch_size": 8.0}, "config.batch_size is 8.0: a value of type int is needed"),
        ({"batch_size": None}, "config.batch_size is None: a value of type int is needed"),
        ({"dtype": "None"}, "config.dtype is 'None': allowed are float32, bfloat16"),
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
        ({"data": {"label_noise": float("nan")}}, "label_noise is nan: a finite number of at"),
        ({"optimizer": {"warmup_epochs": -0.5}}, "warmup_epochs is -0.5: a finite number of at le"),
        ({"optimizer": {"warmup_epochs": float("inf")}}, "warmup_epochs is inf: a finite number"),
        ({"optimizer": {"warmup_start": 1.01}}, "warmup_start is 1.01: a finite number of at le"),
        ({"optimizer": {"warmup_start": "x"}}, "warmup_start is 'x': a value of type float"),
        ({"data": {"max_length": 0}}, "config.data.max_length is 0: a whole number from 1 to"),
        ({"data": {"buckets": (3, 2)}}, "config.data.buckets is (3, 2): increasing whole numbers"),
        ({"data": {"buckets": "3"}}, "config.data.buckets is '3': a value of type tuple is needed"),
        ({"data": {"glove": 3}}, "config.data.glove is 3: a value of type str is needed"),
        ({"split": 3}, "config.split is 3: a value of type str is needed"),
        ({"split": "fdg", "boundaries": (0, 1)}, "config.split and config.boundaries are both set"),
        ({"method": {"accumulate": 2.0}}, "config.method.accumulate is 2.0: a value of type int"),
        ({"data": {"num_classes": 0}}, "config.data.num_classes is 0: a whole number from 1"),
        ({"batch_size": 10, "mesh": {"data": 4}}, "microbatches x replicas = 1 x 4 equal parts"),
        ({"batch_size": 12, "mesh": {"data": 2}, "microbatches": 4}, "= 4 x 2 equal parts"),
    ],
)
def test_bad_values(given, said):
    with pytest.raises(ConfigError) as error:
        validate(given)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "kind"),
    [("seed", int), ("steps", int), ("model.blocks", str), ("boundaries", tuple)],
)
def test_value_type_of_a_key(key, kind):
    assert configuration.value_type(key) is kind


def test_value_type_of_a_section():
    assert configuration.value_type("mesh") is ConfigDict


@pytest.mark.parametrize("key", ["", "steps.x", "model.", "model.nothing", "nothing.at.all"])
def test_value_type_of_no_key(key):
    with pytest.raises(ConfigError, match="unknown key config"):
        configuration.value_type(key)


def test_chosen_takes_what_is_set():
    allowed = {"hidden": 1, "depth": 2}
    section = {"name": "mlp", "hidden": 8, "depth": None, "width": None}
    assert configuration.chosen(section, allowed, "model") == {"hidden": 8}


def test_chosen_refuses_arguments_of_another():
    with pytest.raises(ConfigError, match="model 'mlp' takes only: hidden"):
        configuration.chosen({"name": "mlp", "width": 2.0}, {"hidden": 1}, "model")


class TestIdentity:
    def test_of_the_same_run(self):
        before = configuration.identity(default())
        again = default()
        again.epochs, again.log_every, again.dtype = 7, 3, "bfloat16"
        again.optimizer.learning_rate = 0.5
        again.data.data_dir = "/elsewhere"
        again.mesh.stages = 3
        configuration.check_identity(configuration.identity(again), before)

    def test_of_an_older_version_without_a_later_argument(self):
        before = configuration.identity(default())
        assert None not in before["method"].values()
        assert None not in before["model"].values()

    @pytest.mark.parametrize(
        "given",
        [
            {"seed": 1},
            {"batch_size": 4},
            {"method": {"name": "bp"}},
            {"model": {"width": 0.5}},
            {"data": {"label_noise": 0.1}},
            {"method": {"beta": 0.5}},
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
            ({"JAX version": "2"}, {"JAX version": "1"}, "with JAX version = 1, now 2: choose"),
        ],
    )
    def test_with_other_queues(self, now, before, said):
        same = configuration.identity(default())
        with pytest.raises(ConfigError) as error:
            configuration.check_identity({**same, **now}, {**same, **before})
        assert said in str(error.value)
        assert "\n" not in str(error.value)
