"""Options of the compiler: given on CPUs, where the compiler knows them, and they take effect."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jdecouple.pipeline import mesh as compiler
from jdecouple.pipeline.mesh import StageDevices

pytestmark = pytest.mark.usefixtures("optimized")


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
    shapes = [jax.ShapeDtypeStruct(each, jnp.float32) for each in ((8, 8, 8, 4), (3, 3, 4, 8))]
    compiled = compiler.jit(convolve, placement).lower(*shapes).compile()
    assert "convolution(" in compiled.as_text()
    assert "ynn" not in compiled.as_text()


def squared_lengths(rows, matrix):
    """What jaxlib 0.10.1 and 0.10.2 may fuse, and get wrong in the last row (jax issue 39103)."""
    return jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(rows)


@pytest.mark.parametrize(("dtype", "count"), [(np.float32, 32_769), (np.float64, 16_385)])
def test_products_and_sums_are_right(placement, dtype, count):
    rows = np.outer(np.arange(count), [1, 0, 0]).astype(dtype)
    with jax.enable_x64(True):
        found = compiler.jit(squared_lengths, placement)(rows, np.eye(3, dtype=dtype))
    np.testing.assert_allclose(found, np.arange(count, dtype=np.float64) ** 2, rtol=1e-6)


def test_an_unknown_option_is_not_given(placement, monkeypatch):
    monkeypatch.setitem(compiler._OPTIONS, ("cpu", "device"), {"xla_cpu_no_such_option": "1"})
    assert compiler.compiler_options(placement) is None


def test_what_the_user_sets_is_not_given(placement, monkeypatch):
    assert compiler.compiler_options(placement) == compiler._CPU
    compiler._known.cache_clear()
    first, *others = compiler._CPU
    monkeypatch.setenv("XLA_FLAGS", f"--{first}=LIBRARY_FUSION_TYPE_INVALID")
    assert [*compiler.compiler_options(placement)] == others


def test_several_gpus_hide_what_they_send(placement, monkeypatch):
    def on(platform, count):
        devices = (types.SimpleNamespace(platform=platform, process_index=0),) * count
        return compiler.compiler_options(dataclasses.replace(placement, devices=devices))

    # No GPU is here to ask: any option of one is known to every XLA.
    asked = lambda backend: jax.devices()[:1]  # noqa: E731
    monkeypatch.setattr(compiler.jax, "local_devices", asked)
    assert on("gpu", 1) is on("tpu", 1) is on("tpu", 2) is None
    assert on("cpu", 1) == on("cpu", 2) == compiler._CPU
    assert on("gpu", 2) == compiler._GPUS


def test_between_processes_gradients_are_summed_one_by_one(placement):
    """So that they are under way while the backward goes on; one sum would wait for the last."""
    pair = StageDevices.on(tuple(jax.devices()[:2]))
    other = types.SimpleNamespace(platform="cpu", process_index=1)
    apart = compiler.compiler_options(
        dataclasses.replace(placement, devices=(*pair.devices, other))
    )
    x = jax.device_put(jnp.ones((4, 3)), pair.batched)

    def gradients(kernels, x):
        return jax.grad(lambda kernels: jnp.sum((x @ kernels[0]) @ kernels[1]))(kernels)

    counts = []
    for options in (compiler.compiler_options(pair), apart):
        function = jax.jit(gradients, compiler_options=options, out_shardings=pair.replicated)
        text = function.lower([jnp.ones((3, 3))] * 2, x).compile().as_text()
        counts.append(text.count(" all-reduce("))
    assert counts == [1, 2]
