"""What the benchmarks share: the description of a machine, spreads, tables, files."""

import collections
import dataclasses
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

# Nets of equal blocks: equal numbers of blocks are equal work.
SIZES: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": 1024, "depth": 10, "batch": 256},
    "vgg": {"hidden": 32, "depth": 4, "batch": 64},
}
OTHERS_SHARE = 0.02  # of the machine that others take, beyond which a measurement is not valid
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and range of repeated measurements, in their unit."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Spread of at least one value."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1])

    def show(self, digits: int = 1) -> str:
        """The spread as text, "median (lowest to highest)"."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def describe() -> dict[str, Any]:
    """Machine, versions and command of this run."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_"))
        },
        "load_average_at_start": os.getloadavg()[0],
    }


def busy_seconds() -> float:
    """Processor time that processes have spent on all cores since boot, in seconds; Linux only.

    Without interrupts, which belong to no process: messages over loopback cause most of them.
    """
    ticks = [int(each) for each in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    user, nice, system, _, _, _, _, stolen = ticks[:8]
    return (user + nice + system + stolen) / os.sysconf("SC_CLK_TCK")


def heading(setup: dict[str, Any]) -> str:
    """The set-up as Markdown, from `describe`; its "devices", if any, name each device."""
    versions = ", ".join(f"{name} {version}" for name, version in setup["versions"].items())
    environment = shlex.join(f"{name}={value}" for name, value in setup["environment"].items())
    devices = collections.Counter(setup.get("devices", ()))
    listed = ", ".join(f"{count} x {kind}" for kind, count in devices.items())
    return (
        f"    {setup['command']}\n\n"
        f"{setup['cpu']}, {setup['cores']} cores, load average at start "
        f"{setup['load_average_at_start']:.2f}; Python {setup['python']}, {versions}"
        f"{'; ' + listed if listed else ''}{'; ' + environment if environment else ''}\n"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; all but the first column are aligned right."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    lines = [header, ruler, *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def save(path: Path, result: Any) -> None:
    """Writes a result as JSON; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, default=dataclasses.asdict) + "\n")


def _cpu_model() -> str:
    """Model name as the kernel gives it, else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
