"""Going on with what a workdir holds: its last checkpoint, and what has changed since."""

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from jdecouple import methods
from jdecouple._errors import first_line
from jdecouple.checkpoint import Checkpointer, CheckpointError, Restored, Together
from jdecouple.checkpoint.checkpointer import Agree
from jdecouple.data import ImageInputs, TokenDataset
from jdecouple.inference.description import Description
from jdecouple.methods.routes import loss_scale
from jdecouple.train import config as configuration
from jdecouple.train import hosts, report, sharing
from jdecouple.train.config import ConfigError, chosen
from jdecouple.train.early_stopping import EarlyStopping
from jdecouple.train.initial import begin
from jdecouple.train.metrics import MetricsWriter
from jdecouple.train.options import options
from jdecouple.train.parts import method_arguments
from jdecouple.train.rules import DTYPES
from jdecouple.train.run import Run
from jdecouple.trainer import State


def restore(
    run: Run,
    checkpoints: Checkpointer | None,
    processes: hosts.MultiProcess,
    together: Together | None = None,
) -> tuple[State, dict[str, Any] | None]:
    """The state to begin with, and what the checkpoint says of it.

    The first process, alone with `checkpoints`, says of which step. With `together` every process
    reads the arrays of its stages, else the first sends them. All call it.

    Raises:
        ConfigError: they are another run's, or the run is further than it should go.
    """

    def names(step: int) -> list[str]:
        """Of the arrays of this process's stages."""
        trainer = run.at(step).trainer
        return list(trainer.to_arrays(trainer.abstract(addressable=True)))

    restored: Restored | None = None
    own: dict[str, np.ndarray] = {}
    if checkpoints is not None and together is not None:
        ask = sharing.agreement(processes, together, names)
        restored = _read(run, checkpoints, names=names, agree=ask)
        processes.broadcast(None)
    elif checkpoints is not None:
        restored = _read(run, checkpoints)
    elif together is not None:
        own = sharing.read_what_is_asked(processes, together, names)
    position = processes.broadcast(restored and [restored.step, restored.extra])
    step, extra = position or (0, None)
    trainer = run.at(step).trainer_for(extra)
    if position is None:
        return begin(run, trainer, processes), None
    arrays = restored.arrays if restored else own
    if together is None:
        arrays = hosts.scatter(processes, names(step), arrays)
    return trainer.from_arrays(step, arrays), extra


def _read(
    run: Run,
    checkpoints: Checkpointer,
    names: Callable[[int], Collection[str]] | None = None,
    agree: Agree = lambda step, document: None,
) -> Restored | None:
    """Reads the last checkpoint that can be used: arrays of these `names` of a step, or all."""
    own = identity(run)
    extras = checkpoints.extras()
    identities = [extra.get("identity", {}) for extra in extras.values()]
    if identities and own not in identities:
        configuration.check_identity(own, identities[-1])
    last = max((step for step in extras if extras[step].get("identity") == own), default=0)
    changed = _changed(run, extras.get(last, {}).get("settings"))
    _check_ended(run, last, extras.get(last, {}), changed)

    def template(step: int) -> dict[str, Any]:
        """The arrays of a checkpoint; of another dtype, it may have scales of losses or none."""
        trainer = run.at(step).trainer_for(extras.get(step))
        arrays = trainer.to_arrays(trainer.abstract())
        before = extras.get(step, {}).get("settings", {}).get("dtype", "float32")
        if before == run.config.dtype:
            return arrays
        blocks = [unit.index for stage in trainer.stages for unit in stage.units if not unit.frozen]
        scales = loss_scale.fresh(blocks)
        scaled = scales if loss_scale.is_for(DTYPES.get(before)) else {}
        return {name: x for name, x in arrays.items() if name not in scales} | scaled

    try:
        restored = checkpoints.restore(
            template,
            accept=lambda extra: None if extra.get("identity") == own else "it is another run's",
            wanted=names,
            agree=agree,
        )
    except CheckpointError as error:  # as where the optimiser's state has other parts
        if not changed:
            raise
        raise ConfigError(f"{first_line(error)}; it was trained with {_listed(changed)}") from error
    if restored is not None and restored.step > run.total_steps:
        raise ConfigError(
            f"the workdir holds step {restored.step}: the configuration ends at {run.total_steps}"
        )
    return restored


def _changed(run: Run, before: Mapping[str, Any] | None) -> list[tuple[str, Any, Any]]:
    """Key, old and new value of what is not as in earlier settings, where these are known."""
    return configuration.changes(before, origin(run)["settings"]) if before else []


def _listed(changed: Iterable[tuple[str, Any, Any]]) -> str:
    return ", ".join(f"config.{key} = {old} (now {new})" for key, old, new in changed)


def _is_ended(run: Run, step: int, start: Mapping[str, Any]) -> bool:
    """Whether nothing is left to train behind the checkpoint of a step, which says `start`."""
    return step == run.total_steps or stopping(run, start).reason is not None


def stopping(run: Run, start: Mapping[str, Any] | None) -> EarlyStopping:
    """The early stopping of a run, with what a checkpoint says of it; None for a new run."""
    return EarlyStopping(run.config.early_stopping, (start or {}).get("early_stopping"))


def _check_ended(
    run: Run, step: int, start: Mapping[str, Any], changed: Sequence[tuple[str, Any, Any]]
) -> None:
    """Raises ConfigError where other keys have trained all that there is to train."""
    if changed and _is_ended(run, step, start):
        more = "steps" if step == run.total_steps else "early_stopping.patience"
        raise ConfigError(
            f"the workdir holds step {step}, where this configuration ends, trained with "
            f"{_listed(changed)}: choose another workdir, the same values, or more config.{more}"
        )


def origin(run: Run) -> dict[str, Any]:
    """What a checkpoint keeps of the configuration that it comes from."""
    settings = configuration.settings(run.config, run.total_steps)
    count = len(run.trainer.model.blocks)
    return {"identity": identity(run), "settings": settings, "num_blocks": count}


def describe(run: Run) -> dict[str, Any]:
    """What it takes to build the trained network again without data, as JSON."""
    config, dataset = run.config, run.dataset
    inputs = dataset.inputs
    if isinstance(inputs, ImageInputs):
        read = run.trainer.stages[0].carry["x"].dtype  # before the transform
        inputs = dataclasses.replace(inputs, dtype="uint8" if read == np.uint8 else "float32")
    known = {key: value for key, (_, value) in options("model", config.model.name).items()}
    arguments = methods.arguments(config.method.name) | method_arguments(config, dataset)
    return Description(
        inputs=inputs,
        class_names=dataset.class_names,
        model=(config.model.name, known | chosen(config, "model")),
        method=(config.method.name, arguments),
        seed=config.seed,
        dtype=None if DTYPES[config.dtype] is None else config.dtype,
        boundaries=run.trainer.boundaries,
        batch_size=config.batch_size,
        growth=config.growth.blocks or (),
        num_blocks=len(run.trainer.model.blocks),
    ).to_json()


def identity(run: Run) -> dict[str, Any]:
    """What makes a run what it is; where batches wait, it also depends on where the stages begin.

    Queues of a delayed method hold what JAX's differentiation left, in the compute dtype; another
    version of JAX may lay it out otherwise.
    """
    values, trainer = configuration.identity(run.config), run.trainer
    if isinstance(run.dataset, TokenDataset):
        values["digest of the tokens"] = run.dataset.digest
    placed = {"boundaries": list(trainer.boundaries), "dtype": run.config.dtype}
    if trainer.schedule.sums_late:  # carries alone wait
        values |= {"schedule": trainer.schedule.name, **placed}
    elif trainer.schedule.overlapping:
        values |= {**placed, "JAX version": jax.__version__}
        remats = [stage.remat for stage in trainer.stages]
        # Version 0.1.0 knew no other value, and did not write it.
        if set(remats) != {"none"} and not getattr(trainer.method.route, "replay", False):
            values["remat"] = ", ".join(remats)
    return values


def record(folder: Path, run: Run, step: int, start: Mapping[str, Any] | None) -> None:
    """Tells which keys change where a run goes on, and keeps that in `config.json`.

    A run that has nothing left to train leaves a sound `config.json` as it is.

    Args:
        folder: the workdir.
        run: what is to be trained.
        step: where it begins.
        start: what the checkpoint of `step` says beside its arrays; None for a new run.

    Raises:
        ConfigError: nothing is left to train, and other keys have trained what is there.
    """
    history: list[Mapping[str, Any]] = []
    if start is not None:
        path = folder / "config.json"
        try:
            written = _written(path)
        except (OSError, ValueError, RecursionError) as error:
            written = {}
            reason = error.strerror if isinstance(error, OSError) else first_line(error)
            logging.warning("%s (%s) is written anew: its history is lost", path, reason)
        changed = _changed(run, start.get("settings") or written.get("settings"))
        _check_ended(run, step, start, changed)
        if written and _is_ended(run, step, start):
            return
        for key, old, new in changed:
            print(f"config.{key} is {new} from step {step} on, {old} before")
        # What came later, or at this step, has trained nothing that is left.
        history += [change for change in written.get("history", ()) if change["step"] < step]
        names = ("step", "key", "old", "new")
        history += [dict(zip(names, (step, *change), strict=True)) for change in changed]
    report.write_config(folder, run, history)


def open_metrics(
    folder: Path, run: Run, step: int, start: Mapping[str, Any] | None
) -> MetricsWriter:
    """The writer of the metrics from `step` on; a line tells of earlier ones that are lost."""
    if start is None:
        return MetricsWriter(folder, resume_step=None)
    rows, evaluated = start.get("rows", 0), not start.get("evaluate")
    writer = MetricsWriter(folder, resume_step=step, evaluated=evaluated, rows=rows)
    if writer.lost and not _is_ended(run, step, start):  # else the closing table tells
        logging.warning(
            "metrics.jsonl has lost %d of the %d lines until step %d: the best steps will not be "
            "known at the end",
            *(writer.lost, writer.rows, step),
        )
    return writer


def _written(path: Path) -> dict[str, Any]:
    """The history and the settings that a `config.json` holds.

    Raises:
        OSError, ValueError, RecursionError: it cannot be read, or is none.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        config = configuration.filled(content["config"])
        settings = configuration.settings(config, content["total_steps"])
        history = [{**change, "step": int(change["step"])} for change in content.get("history", ())]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"no configuration of a run: {type(error).__name__}") from error
    return {"settings": settings, "history": history}
