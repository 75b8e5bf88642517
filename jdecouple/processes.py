"""What a run asks of several processes: work for all, one configuration, one that writes."""

import json
from typing import Any

import jax
from ml_collections import ConfigDict

from jdecouple.config import ConfigError
from jdecouple.hosts import Alone
from jdecouple.trainer import Trainer


class Unwritten:
    """Takes what the first process writes, metrics and checkpoints, on the others."""

    latest_step = best_step = None

    def __enter__(self) -> "Unwritten":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def write(self, *values: Any) -> None:
        """Writes nothing."""

    def save(self, *values: Any) -> None:
        """Saves nothing."""

    def wait(self) -> None:
        """Has nothing to wait for."""


def check_processes(trainer: Trainer, config: ConfigDict) -> None:
    """Raises ConfigError for what several processes cannot do."""
    if jax.process_count() == 1:
        return
    for key in ("profile", "sufficient_direction"):
        if config[key]:
            raise ConfigError(f"config.{key} is {config[key]}: it needs a run of one process")
    used = frozenset().union(*(seat.processes for seat in trainer.seats))
    if idle := sorted({*range(jax.process_count())} - used):
        raise ConfigError(
            f"the stages take no device of process {', '.join(map(str, idle))}: "
            f"{jax.process_count()} processes with {len(jax.devices())} device(s) need more "
            "config.mesh.stages or a larger config.mesh.data"
        )


def check_alike(config: ConfigDict, processes: Alone) -> None:
    """Raises ConfigError on the first process if another one was started for another run."""
    if processes.count != jax.process_count():
        raise ConfigError(
            f"jax.distributed runs {jax.process_count()} processes: give train_and_evaluate what "
            "jdecouple.hosts.join returned"
        )
    own = json.loads(config.to_json())
    for index, other in enumerate(processes.collect(own)):
        for key in own:
            if other.value[key] != own[key]:
                raise ConfigError(
                    f"process {index} has config.{key} = {other.value[key]}, process 0 {own[key]}"
                )
