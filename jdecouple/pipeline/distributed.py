"""Joins the processes of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

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
    """
    if not 0 <= process_id < num_processes:
        raise ValueError(f"process_id is {process_id}: 0 to {num_processes - 1} is allowed")
    _, _, port = coordinator.rpartition(":")
    if not port.isdigit():
        raise ValueError(f"coordinator is {coordinator!r}: 'host:port' is needed")
    if transfer_port is None:
        transfer_port = int(port) + 1 + process_id
    host = f"[{address}]" if ":" in address else address
    jax.config.update("jax_cross_host_transfer_socket_address", f"{host}:{transfer_port}")
    jax.config.update("jax_cross_host_transport_addresses", f"{host}:0")
    # A receiver waits for the sender's first carry, and the sender compiles before that.
    jax.config.update("jax_cross_host_transfer_timeout_seconds", _COMPILE_SECONDS)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        cluster_detection_method="deactivate" if all_devices else None,
        heartbeat_timeout_seconds=heartbeat_timeout,
    )


def gather_metrics(metrics: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Metrics of a step of all processes as floats; every process calls it with its own.

    `names` are those of all stages, in order.
    """
    values = {name: float(value) for name, value in metrics.items()}
    blocks = gather(values, [name for name in names if name.startswith("block_")])
    losses = [value for name, value in blocks.items() if name.endswith("/loss")]
    exits = [value for name, value in blocks.items() if name.endswith("/accuracy")]
    return {"loss": sum(losses), **({"accuracy": exits[-1]} if exits else {}), **blocks}


def gather(values: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Union of the scalars of all processes; every process calls it with its own, and gets all.

    `names` are those of all processes, in one order. Scalars that several processes have agree.
    """
    own = np.array([float(values.get(name, 0)) for name in names], np.float32)
    present = np.array([name in values for name in names])
    if jax.process_count() == 1:
        all_values, held = own[None], present[None]
    else:
        from orbax.checkpoint.multihost import get_barrier_sync_fn  # a tenth of the start-up

        # All have received their carries first: evaluations hung now and then without this.
        get_barrier_sync_fn()(key="jdecouple_gather", timeout_ms=1000 * _COMPILE_SECONDS)
        # As integers, because a nan that is gathered ends the run where `jax_debug_nans` is set.
        bits, held = multihost_utils.process_allgather((own.view(np.int32), present))
        all_values = np.asarray(bits).view(np.float32)
    first = held.argmax(axis=0)
    return {
        name: float(all_values[first[i], i]) for i, name in enumerate(names) if held[:, i].any()
    }
