"""Which process of which run this one is: from flags or from the environment."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

_JOB_PORTS = 2**12  # the highest ports; the number of a job chooses one, as in JAX
_NAMES = {"coordinator": "COORDINATOR_ADDRESS", "count": "NUM_PROCESSES", "index": "PROCESS_ID"}
_FLAGS = {"coordinator": "--coordinator", "count": "--num_processes", "index": "--process_index"}


@dataclasses.dataclass(frozen=True)
class ProcessSpec:
    """Which process of which run one is.

    Attributes:
        coordinator: "host:port" at which process 0 waits for the others.
        count: processes in the run.
        index: number of this process, from 0.
        address: address under which the others reach this one; None: that of the route to the
            coordinator.
        launched: whether SLURM or Open MPI started it, one process a GPU.

    Raises:
        ValueError: a coordinator without a port, fewer than 2 processes, an index out of range.
    """

    coordinator: str
    count: int
    index: int
    address: str | None = None
    launched: bool = False

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ValueError(
                f"the coordinator is {self.coordinator!r}: host:port is needed, such as "
                "10.0.0.1:12345"
            )
        if self.count < 2:
            raise ValueError(f"{self.count} processes: at least 2 are needed for a coordinator")
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"the process index is {self.index}: 0 to {self.count - 1} is allowed for "
                f"{self.count} processes"
            )

    @property
    def host(self) -> str:
        """Name or address of the machine of process 0."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Port at which process 0 waits."""
        return int(self.coordinator.rpartition(":")[2])


def detect_cluster(
    environ: Mapping[str, str],
    *,
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    address: str | None = None,
) -> ProcessSpec | None:
    """Finds out which process of which run this one is; None where it is a run of its own.

    What a flag leaves open the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID say (or COORDINATOR_ADDRESS, NUM_PROCESSES and PROCESS_ID), then those of SLURM
    (in a job step) or Open MPI. `count=1` is a run of its own, whatever the environment says.

    >>> detect_cluster({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2"}, index=1)
    ProcessSpec(coordinator='h:1', count=2, index=1, address=None, launched=False)

    The flags have the names of the attributes of `ProcessSpec`, `environ` is the environment.

    Raises:
        ValueError: in one line: some of the three without the rest, or a bad value.
    """
    if count == 1 and coordinator is None and not index:
        return None
    flags: dict[str, Any] = {"coordinator": coordinator, "count": count, "index": index}
    flags = {key: value for key, value in flags.items() if value is not None}
    launcher = _slurm(environ) or _open_mpi(environ)
    given = {**launcher, **_variables(environ), **flags}
    if not given or (given == launcher and given["count"] == 1):
        if address is not None:
            raise ValueError("--transport_address is given, but this is a run of one process")
        return None
    if missing := [_FLAGS[key] for key in _FLAGS if key not in given]:
        known = [_FLAGS[key] for key in _FLAGS if key in given]
        raise ValueError(
            f"{' and '.join(known)} given without {' and '.join(missing)}: a run of several "
            "processes needs all three"
        )
    return ProcessSpec(**given, address=address, launched=bool(launcher))


def _variables(environ: Mapping[str, str]) -> dict[str, Any]:
    """What the variables say that are named after JAX; nothing without the coordinator's."""
    prefix = next((p for p in ("JAX_", "") if environ.get(f"{p}COORDINATOR_ADDRESS")), None)
    if prefix is None:
        return {}
    return {
        key: environ[variable] if key == "coordinator" else _number(environ, variable)
        for key, name in _NAMES.items()
        if (variable := next(filter(environ.get, (prefix + name, name)), ""))
    }


def _slurm(environ: Mapping[str, str]) -> dict[str, Any]:
    """What a SLURM job step says; process 0 is on its first node."""
    if not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= environ.keys():
        return {}
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", environ["SLURM_STEP_NODELIST"])
    if tasks not in environ or not first:
        return {}
    port = _port(environ, _number(environ, "SLURM_JOB_ID"))
    return {
        "coordinator": f"{first[1]}{first[2] or ''}:{port}",
        "count": _number(environ, tasks),
        "index": _number(environ, "SLURM_PROCID"),
    }


def _open_mpi(environ: Mapping[str, str]) -> dict[str, Any]:
    """What mpirun says; before version 5 also its machine, where process 0 is."""
    count, index = "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"
    if not {count, index} <= environ.keys():
        return {}
    values: dict[str, Any] = {"count": _number(environ, count), "index": _number(environ, index)}
    uri = re.match(
        r"(\d+)\..*?;tcp6?://(?:\[([^,\]]+)|([^,:]+))", environ.get("OMPI_MCA_orte_hnp_uri", "")
    )
    if uri:
        host = f"[{uri[2]}]" if uri[2] else uri[3]
        values["coordinator"] = f"{host}:{_port(environ, int(uri[1]) // 2**12)}"
    return values


def _port(environ: Mapping[str, str], job: int) -> int:
    if environ.get("JAX_COORDINATOR_PORT"):
        return _number(environ, "JAX_COORDINATOR_PORT")
    return job % _JOB_PORTS + 2**16 - _JOB_PORTS


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ[name]
    if not value.isdecimal():
        raise ValueError(f"the variable {name} is {value!r}: a whole number is needed")
    return int(value)
