"""From a configuration to the learning rate, and to the optimiser that it moves."""

from typing import Any

from ml_collections import ConfigDict

from jdecouple import optim
from jdecouple.train.config import chosen
from jdecouple.train.errors import ConfigError, one_line
from jdecouple.train.options import options
from jdecouple.train.rules import MOST


def schedule(config: ConfigDict, total_steps: int, steps_per_epoch: int) -> optim.Schedule:
    """The learning rate by the number of batches before.

    Raises:
        ConfigError: epochs that are too long to count, or that end before the first step.
        ValueError: what the schedule refuses.
    """
    section = config.optimizer
    epochs = {"warmup_epochs": (section.warmup_epochs,), "decay_epochs": section.decay_epochs}
    for key, values in epochs.items():
        if any(epoch * steps_per_epoch > MOST for epoch in values):
            most = f"at most {MOST / steps_per_epoch:.0f} epochs are allowed"
            raise ConfigError(f"config.optimizer.{key} is {section[key]}: {most}")
    boundaries = [round(epoch * steps_per_epoch) for epoch in section.decay_epochs]
    if boundaries and not boundaries[0]:
        raise ConfigError(
            f"config.optimizer.decay_epochs is {section.decay_epochs}: the first is before step 1"
        )
    arguments = {
        "constant": (),
        "cosine": (section.end_learning_rate, total_steps),
        "step_decay": (boundaries, section.decay_factor),
    }
    make_schedule = optim.get_schedule(section.schedule)
    made = make_schedule(section.learning_rate, *arguments[section.schedule])
    if section.per_epoch:
        made = optim.per_epoch(made, steps_per_epoch)
    if section.warmup_epochs:
        steps = max(1, round(section.warmup_epochs * steps_per_epoch))
        made = optim.warmup(made, steps, section.warmup_start)
    return made


def optimizer(config: ConfigDict, schedule: optim.Schedule, accumulate: int) -> Any:
    """The optimiser of a configuration, which steps at every `accumulate`-th batch.

    With a corrector it is to be told its delay. What the optimiser or the corrector refuses is
    raised.
    """
    section = config.optimizer
    made = optim.get(section.name)(optim.every(schedule, accumulate), **chosen(config, "optimizer"))
    if config.corrector.name == "none":
        return made
    with one_line(config.corrector, "config.corrector"):
        corrected = optim.corrected(made, config.corrector.name, **_corrector_options(config))
        corrected(1.0)
    return corrected


def _corrector_options(config: ConfigDict) -> dict[str, Any]:
    """Those that are set; a momentum to be compensated is by default that of the optimizer."""
    given = chosen(config, "corrector")
    if config.corrector.name == "spike_compensation" and "momentum" not in given:
        _, default = options("optimizer", config.optimizer.name).get("momentum", (float, 0))
        given["momentum"] = config.optimizer.get("momentum", default)
        if not given["momentum"]:
            raise ConfigError(
                "config.corrector.name is 'spike_compensation', which makes up for momentum: "
                f"optimizer {config.optimizer.name!r} has none; set that of sgd"
            )
    return given


def by_batches(schedule: optim.Schedule, accumulate: int) -> optim.Schedule:
    """The learning rate of the step that a batch goes into, by the number of batches before it."""
    return lambda batches: schedule(batches // accumulate * accumulate)
