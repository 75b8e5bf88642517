"""The devices that a plan is for: those at hand, or others as they are described."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jdecouple._errors import machine_bytes, require_int, require_number
from jdecouple.models.convolution import convolve
from jdecouple.pipeline.mesh import StageDevices, described, jit
from jdecouple.pipeline.partition import check_speeds

_LEAST_SECONDS = 0.1  # of a timing
_IMAGES, _SIDE, _CHANNELS = 32, 16, 64  # of a convolution of typical size
_ROWS, _WIDTH = 512, 1024  # of a product


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices and the links between them.

    Attributes:
        count: how many there are.
        memory: bytes of each.
        shared: whether all have these bytes together, as the devices of a machine's CPU do.
        flops: floating-point operations that each does in a second; None is measured here.
        speeds: of each, by which `flops`, or what is measured here, is multiplied; none: all 1.
        bandwidth: bytes per second of a link in one direction.
        latency: seconds that a message takes beside its bytes.
        at_hand: whether they are JAX's own.
        note: where the memory is from, if it is not given.

    Raises:
        ValueError: a number out of range.
    """

    count: int
    memory: float = math.inf
    shared: bool = False
    flops: float | None = None
    speeds: tuple[float, ...] = ()
    bandwidth: float = math.inf
    latency: float = 0.0
    at_hand: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        require_int(1, count=self.count)
        require_number(latency=self.latency)
        if self.speeds:
            check_speeds(self.speeds, self.count)
        for name in ("memory", "flops", "bandwidth"):
            if (value := getattr(self, name)) not in (None, math.inf):
                require_number(positive=True, **{name: value})

    @classmethod
    def here(cls) -> "Devices":
        """Those of this process, as JAX tells of them; messages cost nothing."""
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        shared = limit is None
        memory = float(machine_bytes() if limit is None else limit)
        return cls(len(jax.devices()), memory, shared=shared, at_hand=True, note="that of here")

    @property
    def devices(self) -> tuple[Any, ...]:
        """Each as `jdecouple.make_mesh` takes it."""
        return tuple(jax.devices()) if self.at_hand else described(self.count)

    def speed(self, group: Sequence[Any]) -> float:
        """The speed of a group of `devices` that share work evenly: that of the slowest."""
        known = dict(zip(self.devices, self.speeds, strict=False))
        return min(known.get(device, 1.0) for device in group)


def measured_flops(dtype: Any, maps: bool) -> tuple[float, str]:
    """What the device at hand does in a second, of what training is mostly made of.

    That is a forward and backward of a convolution, where there are `maps`, or of a product of
    matrices, in a dtype.

    Returns:
        Floating-point operations per second, and what was timed.
    """
    dtype = jnp.dtype(dtype or jnp.float32)
    forward: Callable[..., jax.Array]
    if maps:
        shape = (_IMAGES, _SIDE, _SIDE, _CHANNELS)
        x, weights = jnp.ones(shape, dtype), jnp.ones((3, 3, _CHANNELS, _CHANNELS), dtype)
        forward, operations = _convolved, 2.0 * x.size * 9 * _CHANNELS
        what = f"a 3 x 3 convolution of {list(shape)}"
    else:
        x, weights = jnp.ones((_ROWS, _WIDTH), dtype), jnp.ones((_WIDTH, _WIDTH), dtype)
        forward, operations = jnp.matmul, 2.0 * x.size * _WIDTH
        what = f"a product of [{_ROWS}, {_WIDTH}] and [{_WIDTH}, {_WIDTH}]"

    def work(x: jax.Array, weights: jax.Array) -> Any:
        out, pull_back = jax.vjp(forward, x, weights)
        return pull_back(out)

    run = jit(work, StageDevices.on((jax.local_devices()[0],)))
    jax.block_until_ready(run(x, weights))
    count, seconds = 1, 0.0
    while True:
        start = time.perf_counter()
        jax.block_until_ready([run(x, weights) for _ in range(count)])
        seconds = time.perf_counter() - start
        if seconds >= _LEAST_SECONDS:
            break
        count *= 4
    return 3 * operations * count / seconds, f"{what}, {dtype}, and its gradients"


def _convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return convolve(x, kernel, 1, 1)


def label(device: Any) -> str:
    """What a device is called."""
    if platform := getattr(device, "platform", ""):
        return f"{platform} {device.id}"
    return f"device {device.id}"
