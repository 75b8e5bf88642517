"""Where the processes of one machine run: each on its part of the cores and of the GPUs."""

import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")

_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology"


class Place(NamedTuple):
    """Where a process runs: its cores (none: all), and environment variables."""

    cores: Sequence[int]
    variables: Mapping[str, str]


def parts(items: Sequence[T], count: int) -> list[Sequence[T]]:
    """Consecutive parts of a sequence, as equal as can be; where it is too short, some share.

    >>> parts([0, 1, 2, 3, 4], 2), parts([0, 1], 3), parts([], 2)
    ([[0, 1], [2, 3, 4]], [[0], [0], [1]], [[], []])
    """
    bounds = [index * len(items) // count for index in range(count + 1)]
    return [items[bounds[i] : max(bounds[i + 1], bounds[i] + 1)] for i in range(count)]


def cores() -> list[int]:
    """Cores that this process may use, those of one chip together; none where none can be pinned.

    So are hardware threads of one core: in order of their numbers two parts would have one each.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    return sorted(os.sched_getaffinity(0), key=_place_on_chip)


def _place_on_chip(core: int) -> tuple[int, int, int]:
    folder = Path(_TOPOLOGY.format(core))
    try:
        chip, own = (int((folder / f"{x}_id").read_text()) for x in ("physical_package", "core"))
    except (OSError, ValueError):
        return 0, core, core
    return chip, own, core


def gpus(environ: Mapping[str, str], root: Path = Path("/")) -> list[str]:
    """GPUs that JAX would use here, as CUDA_VISIBLE_DEVICES names them; JAX is not imported."""
    platforms = environ.get("JAX_PLATFORMS", "")
    if not cuda_plugins() or (platforms and not {"cuda", "gpu"} & {*platforms.split(",")}):
        return []
    if "CUDA_VISIBLE_DEVICES" in environ:
        names = map(str.strip, environ["CUDA_VISIBLE_DEVICES"].split(","))
        return [name for name in names if name not in ("", "-1")]
    count = sum("/dev/" in name for name in nvidia_devices(root))
    return list(map(str, range(count)))


def nvidia_devices(root: Path = Path("/")) -> list[str]:
    """What the driver of NVIDIA shows of each GPU of this machine."""
    found = [*root.glob("dev/nvidia[0-9]*"), *root.glob("proc/driver/nvidia/gpus/*")]
    return sorted(map(str, found))


def cuda_plugins() -> dict[str, str]:
    """Versions of the installed plugins that bring CUDA to JAX; none of them is imported."""
    found = {}
    for name in _PLUGINS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
