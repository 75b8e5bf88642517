"""Joins the processes of a run."""

import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from jdecouple.methods.routes import with_whole_norm
from jdecouple.pipeline.step_metrics import StepMetrics, on_host

_COMPILE_SECONDS = 3600


def initialize(
    coordinator: str,
    num_processes: int,
    process_id: int,
    *,
    address: str = "127.0.0.1",
    transfer_port: int | None = None,
    all_devices: bool = False,
    heartbeat_timeout: int = 100,
) -> None:
    """Starts `jax.distributed` with a transport for carries between processes.

    GPUs bring their own transport (NCCL); elsewhere JAX's socket transport is used.
    Call it before anything touches a device.

    JAX's coordination service, which lets in whoever reaches it, listens on process 0 at
    `bind_address` of the coordinator's host, unless JAX_COORDINATOR_BIND_ADDRESS names another.

    Args:
        coordinator: "host:port" of process 0, the same for all.
        num_processes: processes in the run.
        process_id: index of this process.
        address: address under which the other processes reach this one.
        transfer_port: port of this process for carries; by default the coordinator's port
            + 1 + `process_id`.
        all_devices: see all devices of the machine, under SLURM and Open MPI too, where a process
            otherwise sees one GPU.
        heartbeat_timeout: seconds without a sign of life after which JAX aborts all processes.

    Raises:
        ValueError: an index out of range, or a coordinator without a port.
        OSError: on process 0, the coordinator's host has no address.
    """
    if not 0 <= process_id < num_processes:
        raise ValueError(f"process_id is {process_id}: 0 to {num_processes - 1} is allowed")
    coordinator_host, _, port = coordinator.rpartition(":")
    if not port.isdigit():
        raise ValueError(f"coordinator is {coordinator!r}: 'host:port' is needed")
    if transfer_port is None:
        transfer_port = int(port) + 1 + process_id
    listening = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    if process_id == 0 and not listening:
        listening = with_port(bind_address(coordinator_host.strip("[]")), port)
    jax.config.update("jax_cross_host_transfer_socket_address", with_port(address, transfer_port))
    jax.config.update("jax_cross_host_transport_addresses", with_port(address, 0))
    # A receiver waits for the sender's first carry, and the sender compiles before that.
    jax.config.update("jax_cross_host_transfer_timeout_seconds", _COMPILE_SECONDS)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        cluster_detection_method="deactivate" if all_devices else None,
        heartbeat_timeout_seconds=heartbeat_timeout,
        coordinator_bind_address=listening,
    )


def bind_address(host: str) -> str:
    """Address of this machine at which to listen where others are told `host`: the one it names.

    A machine may have given its own name a loopback address, as Debian does. The others know it by
    another one, so that it listens on all.

    Raises:
        OSError: `host` has no address.
    """
    try:
        ipaddress.ip_address(host)
        return host
    except ValueError:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    address = str(found[0][4][0])
    names = [name.partition(".")[0].lower() for name in (host, socket.gethostname())]
    if ipaddress.ip_address(address).is_loopback and names[0] == names[1] != "localhost":
        return "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
    return address


def with_port(address: str, port: int | str) -> str:
    """Joins both with a colon, the address in brackets if the address is one of IPv6."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def gather_metrics(metrics: StepMetrics, names: Sequence[str], *, summed: bool) -> dict[str, float]:
    """Metrics of a step of all processes as floats; every process calls it with its own.

    `names` are those of all stages, in order; `summed` says whether the blocks' losses are of one
    batch. Where they are not, one process knows their sum.
    """
    values = {name: float(value) for name, value in on_host([metrics])[0].items()}
    blocks = gather(values, [name for name in names if name.startswith("block_")])
    known = {} if summed else gather(values, ["loss"])
    losses = [value for name, value in blocks.items() if name.endswith("/loss")]
    exits = [value for name, value in blocks.items() if name.endswith("/accuracy")]
    exit_ = {"accuracy": exits[-1]} if exits else {}
    return with_whole_norm({"loss": sum(losses), **known, **exit_, **blocks})


def gather(values: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Union of the scalars of all processes; every process calls it with its own, and gets all.

    `names` are those of all processes, in one order. Scalars that several processes have agree.
    """
    own = np.array([float(values.get(name, 0)) for name in names], np.float32)
    present = np.array([name in values for name in names])
    if jax.process_count() == 1:
        all_values, held = own[None], present[None]
    else:
        _wait_for_all()
        # As integers, because a nan that is gathered ends the run where `jax_debug_nans` is set.
        bits, held = multihost_utils.process_allgather((own.view(np.int32), present))
        all_values = np.asarray(bits).view(np.float32)
    first = held.argmax(axis=0)
    return {
        name: float(all_values[first[i], i]) for i, name in enumerate(names) if held[:, i].any()
    }


def gather_rows(rows: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Rows `[n, ...]` of all processes; every process calls it with its own, and gets all.

    `held` `[n]` says which rows this process has; those that several have agree.
    """
    if jax.process_count() == 1:
        return rows
    _wait_for_all()
    bits, owned = multihost_utils.process_allgather((rows.view(np.int32), held))
    return np.asarray(bits)[np.argmax(owned, axis=0), np.arange(len(rows))].view(rows.dtype)


def _wait_for_all() -> None:
    from orbax.checkpoint.multihost import get_barrier_sync_fn  # a tenth of the start-up

    # All have received their carries first: evaluations hung now and then without this.
    get_barrier_sync_fn()(key="jdecouple_gather", timeout_ms=1000 * _COMPILE_SECONDS)
