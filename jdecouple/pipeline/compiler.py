"""Options that compiled calls are given, by platform."""

import functools
from typing import Any

import jax

from jdecouple.pipeline.placement import Seat

# By default XLA's library for CPUs takes over convolutions as well, on one thread, and takes the
# gradient of a filter as a convolution with a window as large as the image. It keeps the products.
_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}


def compiler_options(seat: Seat) -> dict[str, Any] | None:
    """`compiler_options` of `jax.jit` for calls on the devices of a stage, or None."""
    return _CPU if seat.devices[0].platform == "cpu" and _known() else None


@functools.cache
def _known() -> bool:
    """Whether this version of XLA knows the options: it refuses what it does not know."""
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            jax.jit(lambda: 0, compiler_options=_CPU).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
