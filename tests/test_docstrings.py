"""The examples in docstrings print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import jdecouple

MODULES = {
    name: [
        test
        for test in doctest.DocTestFinder().find(importlib.import_module(name))
        if test.examples
    ]
    for _, name, _ in pkgutil.walk_packages(jdecouple.__path__, "jdecouple.")
}


SLOW = ("data.augment", "growth", "models.vgg", "train.plan")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name.partition(".")[2] in SLOW else [])
        for name, examples in MODULES.items()
        if examples
    ],
)
def test_examples(name):
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for example in MODULES[name]:
        runner.run(example)
    assert not runner.failures
