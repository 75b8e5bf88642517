"""How a run goes on from what its workdir holds, on however many processes."""

from typing import Any

import jax

from jdecouple import config as configuration
from jdecouple.checkpoint import Checkpointer
from jdecouple.config import ConfigError
from jdecouple.hosts import Alone, hand_out
from jdecouple.processes import Unwritten
from jdecouple.run import Run
from jdecouple.trainer import State


def restore(
    run: Run, checkpoints: Checkpointer | Unwritten, hosts: Alone
) -> tuple[State, dict[str, Any] | None]:
    """The state to begin with, and what the checkpoint says of it.

    The first process reads the checkpoint, and hands every other one the arrays of its stages.

    Args:
        run: what the configuration stands for.
        checkpoints: where they are, on the first process.
        hosts: the processes; all call it.

    Raises:
        ConfigError: they are another run's, or the run is further than it should go.
    """
    restored = _read(run, checkpoints) if isinstance(checkpoints, Checkpointer) else None
    found = hosts.broadcast(restored and [restored.step, restored.extra])
    if found is None:
        return run.trainer.init(), None
    step, extra = found
    mine = run.trainer.arrays(run.trainer.abstract(mine=True))
    arrays = hand_out(hosts, list(mine), restored.tree if restored else {})
    return run.trainer.with_arrays(step, arrays), extra


def _read(run: Run, checkpoints: Checkpointer) -> Any:
    mine = identity(run)
    found = [extra.get("identity", {}) for extra in checkpoints.extras().values()]
    if found and mine not in found:
        configuration.check_identity(mine, found[-1])
    restored = checkpoints.restore(
        run.trainer.arrays(run.trainer.abstract()),
        accept=lambda extra: None if extra.get("identity") == mine else "it is another run's",
    )
    if restored is not None and restored.step > run.total_steps:
        raise ConfigError(
            f"the workdir holds step {restored.step}: the configuration ends at {run.total_steps}"
        )
    return restored


def identity(run: Run) -> dict[str, Any]:
    """What makes a run what it is; a delayed method also depends on where the stages begin.

    Its queues hold what JAX's differentiation left, in the compute dtype; another version of JAX
    may lay it out otherwise.
    """
    found = configuration.identity(run.config)
    if run.trainer.schedule.overlapping:
        found |= {
            "boundaries": list(run.trainer.boundaries),
            "dtype": run.config.dtype,
            "JAX version": jax.__version__,
        }
    return found
