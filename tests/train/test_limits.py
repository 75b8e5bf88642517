"""What a run cannot be: numbers without bound, too large a model, and keys that nothing reads."""

import types

import pytest
from ml_collections import ConfigDict

from jdecouple.train import memory
from jdecouple.train.config import ConfigError, filled, validate
from jdecouple.train.options import OWNERS
from jdecouple.train.run import build

TINY = {
    "data": {"name": "synthetic", "synthetic_size": 20, "image_size": 4},
    "model": {"name": "mlp", "hidden": 4, "depth": 2},
    "method": {"name": "bp"},
    "batch_size": 6,
}
NUMBERS = (-1, 0, 2**31, 2**63, 10**5000, -(10**5000), True, float("nan"), float("inf"), 1e308)


def numeric_keys(section, path=""):
    """Keys that hold numbers, or tuples of them, of a configuration with all its options."""
    for key, value in section.items():
        if isinstance(value, ConfigDict):
            yield from numeric_keys(value, f"{path}{key}.")
        elif section.get_type(key) in (int, float, tuple):
            yield f"{path}{key}", section.get_type(key)


def nested(key, value, given):
    """A copy of the mapping `given` in which the key is set."""
    first, _, rest = key.partition(".")
    return {**given, first: nested(rest, value, given.get(first, {})) if rest else value}


CASES = [*numeric_keys(filled(TINY, all_options=True))]


def outcome(function, given):
    """What a configuration is refused with; empty if it is not."""
    try:
        function(given)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("key", "kind"), CASES)
def test_any_number_is_taken_or_refused_in_one_line(key, kind):
    for number in NUMBERS:
        said = outcome(validate, nested(key, (number,) if kind is tuple else number, TINY))
        assert "\n" not in said
        assert len(said) < 400
        assert said or kind is float or isinstance(number, float) or abs(number) <= 2**31


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in OWNERS["method"].names() if name != "infopro"])
def test_any_number_builds_or_is_refused_in_one_line(method):
    small = {**TINY, "method": {"name": method}}
    for key, kind in numeric_keys(filled(small, all_options=True)):
        if key.startswith("method.") or method == "bp":
            for number in NUMBERS:
                given = nested(key, (number,) if kind is tuple else number, small)
                assert "\n" not in outcome(build, given)


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(memory, "machine_bytes", lambda: 10**8)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model.hidden": 10**9}, "'hidden': 1000000000, 'name': 'mlp'} and config.method is {'"),
        (
            {"model.hidden": 5000},
            "weights need 0.1 GB and the optimizer's state 0.2 GB, but ",
        ),
        ({"data.image_size": 1000}, "with inputs of [6, 1000, 1000, 3] and 10 classes weights"),
        ({"data.num_classes": 2**31 - 1}, "[6, 4, 4, 3] and 2147483647 classes weights need"),
        (
            {"model": {"name": "vgg", "blocks": f"{10**9}"}},
            "'1000000000', 'name': 'vgg'} and",
        ),
        ({"model": {"name": "vgg", "blocks": f"2|{10**30}"}}, "'blocks': '2|10000000000000000000"),
        (
            {"model": {"name": "vgg", "width": 1e5, "blocks": "8"}},
            "'vgg', 'width': 100000.0} and",
        ),
        ({"method": {"name": "deinforeg", "projector": "8-99999999"}}, "'projector': '8-99999999'"),
        ({"data.image_size": 10**5}, "config.data.image_size is 100000: the data need 750.0 GB"),
        ({"data.synthetic_size": 10**8}, "config.data.synthetic_size is 100000000: the data need"),
        ({"data": {"name": "digits", "image_size": 3000}}, "image_size is 3000: the data need 16"),
        (
            {"data": {"name": "csv:no", "max_length": 10**8}},
            "config.data.max_length is 100000000: the data need 2.4 GB in memory, but this machine",
        ),
        ({"data": {"name": "csv:no", "buckets": (8, 10**8)}}, "config.data.buckets is 100000000"),
    ],
)
def test_what_does_not_fit_into_memory(little_memory, given, said):
    config = TINY
    for key, value in given.items():
        config = nested(key, value, config)
    assert said in outcome(build, config)


def test_weights_spread_over_devices(monkeypatch):
    """The first weights lie on one of them, and so does all that is of one block."""
    wide = nested("model.hidden", 300, TINY)  # 0.43 MB, and Adam's moments
    cases = (1_200_000, 3, False), (600_000, 2, True), (300_000, 9, True), (1_000_000, 3, True)
    for size, count, refused in cases:
        monkeypatch.setattr(
            memory, "_device_bytes", lambda size=size, count=count: (size, "each device", count)
        )
        assert bool(outcome(build, wide)) == refused


def test_memory_of_a_device(monkeypatch):
    gpus = [types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 7})] * 3
    monkeypatch.setattr(memory.jax, "local_devices", lambda: gpus)
    monkeypatch.setattr(memory.jax, "devices", lambda: gpus)
    assert memory._device_bytes() == (7, "each device", 3)


RATES = "config.optimizer."
STEPS = {"schedule": "step_decay", "decay_epochs": (1,)}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"schedule": "constant", "end_learning_rate": 1e-5},
            "end_learning_rate is set, but schedule 'constant' takes only: learning_rate",
        ),
        (
            {**STEPS, "end_learning_rate": 1e-5},
            "end_learning_rate is set, but schedule 'step_decay' takes only: learning_rate, decay_",
        ),
        ({"decay_epochs": (1,)}, "decay_epochs is set, but schedule 'cosine' takes only: learni"),
        ({"decay_factor": 0.5}, "decay_factor is set, but schedule 'cosine' takes only: learning"),
        ({"schedule": "constant", "per_epoch": True}, "per_epoch is set, but schedule 'constant'"),
        ({"schedule": "step_decay"}, "decay_epochs is (): schedule 'step_decay' needs at least on"),
        ({"end_learning_rate": 0.1}, "end_learning_rate is 0.1: at most config.optimizer.learning"),
        ({"warmup_start": 0.5}, "warmup_start is set, but config.optimizer.warmup_epochs is 0: s"),
        ({}, ""),
        (STEPS, ""),
        ({"end_learning_rate": 1e-3, "per_epoch": True}, ""),
        ({"schedule": "constant", "end_learning_rate": 0.0, "decay_factor": 0.1}, ""),  # as it is
        ({"warmup_start": 0.5, "warmup_epochs": 1.0}, ""),
    ],
)
def test_keys_of_another_learning_rate(given, said):
    assert outcome(validate, {"optimizer": given}).startswith(said and RATES + said)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epochs": 2**31 - 1}, "config.epochs is 2147483647: at most 2147483647 steps are all"),
        ({"optimizer.warmup_epochs": 1e308}, "warmup_epochs is 1e+308: at most 715827882 epochs"),
        ({"optimizer.warmup_epochs": 2.0**31}, "warmup_epochs is 2147483648.0: at most 715827882"),
        (
            {"optimizer": {**STEPS, "decay_epochs": (1, 1e308)}},
            "decay_epochs is (1, 1e+308): ",
        ),
        ({"optimizer": {**STEPS, "decay_epochs": (0.1, 1)}}, "decay_epochs is (0.1, 1): the first"),
        ({"profile": 1, "steps": 10}, "config.profile is 1: it needs 11 steps, as the first 10 ar"),
        (
            {"method": {"name": "adl", "accumulate": 7}, "steps": 6},
            "config.method.accumulate is 7: the run has 6 step(s), so that its optimizer would not",
        ),
        (
            {"method": {"name": "adl", "accumulate": 7}, "accumulate": 2, "steps": 6},
            "config.method.accumulate is 7: the run has 6 step(s), so that its optimizer would not",
        ),
        ({"method": {"name": "adl", "accumulate": 6}, "steps": 6}, ""),
        ({"method": {"name": "dgl", "head_pool": 1}}, "there are no maps in model 'mlp'"),
        (
            {"method": {"name": "dgl", "head_pool": 5}, "model": {"name": "vgg", "blocks": "2"}},
            "config.method.head_pool is 5: the largest feature map is 4 pixels wide in model 'vgg'",
        ),
        ({"method": {"name": "dgl", "head_pool": 4}, "model": {"name": "vgg", "blocks": "2"}}, ""),
        ({"method": {"name": "early_exit", "head_pool": 1}}, ""),  # its default
        (
            {"data": {"name": "digits", "synthetic_size": 9}},
            "synthetic_size is 9: data set 'digits' holds images and takes only: validation, image",
        ),
        ({"data": {"name": "digits", "channels": 1}}, "config.data.channels is 1: data set 'digit"),
        ({"data": {"name": "digits", "num_classes": 9}}, "num_classes is 9: data set 'digits'"),
        ({"data": {"name": "digits", "data_dir": "/x"}}, "data_dir is '/x': data set 'digits'"),
        (
            {"data.download": True},
            "download is True: data set 'synthetic' holds images",
        ),
        ({"data.vocabulary_size": 9}, "vocabulary_size is 9: data set 'synthetic' holds images"),
        ({"data.buckets": (4, 9)}, "max_length is 9: data set 'synthetic' holds images"),
        ({"data": {"name": "digits", "synthetic_size": 4096, "channels": 3}}, ""),  # as they are
    ],
)
def test_values_beyond_the_run_and_keys_of_other_data(given, said):
    config = TINY
    for key, value in given.items():
        config = nested(key, value, config)
    found = outcome(build, config)
    assert said in found
    assert bool(said) == bool(found)
