"""Joins the processes of a run."""

import jax


def initialize(
    coordinator: str,
    num_processes: int,
    process_id: int,
    *,
    address: str = "127.0.0.1",
    transfer_port: int | None = None,
) -> None:
    """Starts `jax.distributed` with a transport for messages between processes.

    GPUs bring their own transport (NCCL); elsewhere JAX's socket transport is used.
    Call it before anything touches a device.

    Args:
        coordinator: "host:port" of process 0, the same for all.
        num_processes: processes in the run.
        process_id: index of this process.
        address: address under which the other processes reach this one.
        transfer_port: port of this process for messages; by default the coordinator's port
            + 1 + `process_id`.

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
    jax.config.update("jax_cross_host_transfer_socket_address", f"{address}:{transfer_port}")
    jax.config.update("jax_cross_host_transport_addresses", f"{address}:0")
    jax.distributed.initialize(coordinator, num_processes, process_id)
