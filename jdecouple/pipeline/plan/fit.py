"""Whether a training fits into the memory of its devices, told before anything is compiled."""

import os
from collections.abc import Iterable
from typing import Any

from jdecouple._errors import machine_bytes
from jdecouple.pipeline.plan.device_bytes import DeviceBytes

_FRACTION = 0.75  # of a GPU's memory that JAX takes by default
_FRACTION_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def usable(memory: int, platform: str) -> int:
    """Bytes that JAX uses of a device with so much memory: on GPUs, three quarters by default.

    >>> usable(16 * 10**9, "cpu")
    16000000000
    """
    if platform != "gpu":
        return memory
    given = [os.environ[name] for name in _FRACTION_NAMES if name in os.environ]
    return int(memory * (float(given[0]) if given else _FRACTION))


def memory_of(device: Any) -> int:
    """Bytes that JAX uses of a device that is there; of a CPU device, the machine's."""
    return (device.memory_stats() or {}).get("bytes_limit", machine_bytes())


def fit(planned: Iterable[DeviceBytes], memory: int) -> str:
    """Whether devices that can use so many bytes hold what is planned for each.

    Args:
        planned: what `planned_bytes` returned.
        memory: usable bytes of every device.

    Returns:
        "yes": all do, also with what stages have ahead and at the estimate's upper end.
        "perhaps": between the two others.
        "no": one does not even at the lower end of the estimate, so that the run is refused.
    """
    planned = list(planned)
    if any(each.least > memory for each in planned):
        return "no"
    most = max(each.most + each.ahead for each in planned)
    return "yes" if most <= memory else "perhaps"
