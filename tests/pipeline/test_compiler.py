"""Options of the compiler: given on CPUs, where the compiler knows them, and they take effect."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jdecouple.pipeline import mesh as compiler
from jdecouple.pipeline.mesh import StageDevices


@pytest.fixture
def placement():
    compiler._known.cache_clear()
    yield StageDevices.on((jax.devices()[0],))
    compiler._known.cache_clear()


def convolve(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def test_convolutions_stay_with_the_compiler(placement):
    options = compiler.compiler_options(placement)
    if options is None:
        pytest.skip("this version of XLA does not know the options")
    shapes = [jax.ShapeDtypeStruct(each, jnp.float32) for each in ((8, 8, 8, 4), (3, 3, 4, 8))]
    compiled = jax.jit(convolve, compiler_options=options).lower(*shapes).compile()
    assert "convolution(" in compiled.as_text()
    assert "ynn" not in compiled.as_text()


def test_an_unknown_option_is_not_given(placement, monkeypatch):
    monkeypatch.setattr(compiler, "_CPU", {"xla_cpu_no_such_option": "1"})
    assert compiler.compiler_options(placement) is None


def test_other_platforms_get_none(placement):
    gpu = types.SimpleNamespace(platform="gpu")
    assert compiler.compiler_options(dataclasses.replace(placement, devices=(gpu,))) is None
