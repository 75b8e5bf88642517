"""The run of one stage in a process of its own, which trains on while others are lost."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jdecouple import methods
from jdecouple._files import local_folder
from jdecouple.checkpoint import Checkpointer
from jdecouple.pipeline.mpmd.one_stage import OneStage
from jdecouple.train import config as configuration
from jdecouple.train import devices, hosts, loop
from jdecouple.train.elastic.feed import Reader, Receiver
from jdecouple.train.elastic.folder import StageFolder
from jdecouple.train.elastic.inbox import Inbox, route_to
from jdecouple.train.elastic.outbox import Outbox
from jdecouple.train.elastic.training import StageTraining
from jdecouple.train.elastic.whole import await_stages, join_stages, tell
from jdecouple.train.errors import ConfigError, one_line
from jdecouple.train.hosts.token import shared_token
from jdecouple.train.interrupt import Interrupt
from jdecouple.train.lock import only_run
from jdecouple.train.resume import record
from jdecouple.train.run import build


def train_stage(config: ConfigDict, workdir: str, spec: hosts.ProcessSpec) -> dict[str, Any]:
    """Trains the stage that has the number of this process, until all have come to their end.

    Process 0 then makes of them what a run in one process leaves, and evaluates it.

    Args:
        config: a configuration with `mesh.elastic`.
        workdir: one folder that all processes see.
        spec: which process this is; of the coordinator only the address is used, which says on
            which network this process listens.

    Returns:
        "step" and "finished"; when finished, on process 0, what `train_and_evaluate` returns, and
        under "stages" what each stage has missed.

    Raises:
        ConfigError: values that do not fit stages on their own, or bad input.
        NonFiniteError: the training of this stage diverged.
        CheckpointError, OSError: something could not be written.
    """
    config = _checked(config, spec)
    with one_line():
        folder = local_folder(workdir)
        token = shared_token(os.environ)
        if spec.index == 0:
            devices.introduce(config)
    run = build(config)
    if shared := run.trainer.design.crossing:
        raise ConfigError(
            f"config.mesh.elastic is {config.mesh.elastic!r}, but stages share {shared[0]}: each "
            "step would wait for all of them"
        )
    with contextlib.ExitStack() as stack:
        own = StageFolder(folder, spec.index)
        with one_line():
            if spec.index == 0:
                devices.announce(run)
                stack.enter_context(only_run(folder))
            stack.enter_context(only_run(own.path))
            checkpoints = Checkpointer(own.checkpoints, keep=config.checkpoint.keep)
            stack.enter_context(checkpoints)
        interrupt = stack.enter_context(Interrupt())
        trainer = run.trainer
        placement, route = trainer.placements[spec.index], trainer.method.route
        stage = OneStage(spec.index, trainer.stages, placement, route, trainer.schedule)
        training = StageTraining(run, stage, checkpoints, interrupt, own.path)
        with one_line():
            state, start = training.restore(folder / "checkpoints")
            if spec.index == 0:
                record(folder, run, state.step, start)
        stage.warm_up()  # the stage below waits for one that is there
        with one_line():
            _connect(training, token, spec, state.step, folder)
        step = training.train(state, start)
        left = training.leave(StageFolder(folder, spec.index + 1), step)
        if spec.index:
            return {"step": step, "finished": step == run.total_steps}
        whole = left and await_stages(folder, spec.count, step, training.is_out_of_time)
        told = join_stages(run, folder, step) if whole else None
    if step < run.total_steps or told is None:
        print(f"stopped at step {step} of {run.total_steps}: the same command continues")
        return {"step": step, "finished": False}
    plain = config.copy_and_resolve_references()
    plain.mesh.elastic = None
    result = loop.train_and_evaluate(plain, folder)  # which has nothing left but to evaluate
    tell(told)
    return {**result, "stages": told}


def _checked(config: ConfigDict, spec: hosts.ProcessSpec) -> ConfigDict:
    """The checked configuration of as many stages as processes."""
    config = configuration.validate(config)
    for key, value in (("num_stages", config.num_stages), ("mesh.stages", config.mesh.stages)):
        if value not in (None, spec.count):
            reason = f"with config.mesh.elastic each of {spec.count} processes has one stage"
            raise ConfigError(f"config.{key} is {value}: {reason}")
    method, reason = methods.get(config.method.name), ""
    if not method.route.local:
        reason = "is not local: its stages need the error of those above"
    elif method.follows_above:
        reason = "follows the weights of the stage above, which may be lost"
    if reason:
        raise ConfigError(
            f"config.mesh.elastic is {config.mesh.elastic!r}, but method {config.method.name!r} "
            f"{reason}"
        )
    config.num_stages = config.mesh.stages = spec.count
    return config


def _connect(
    training: StageTraining, token: bytes, spec: hosts.ProcessSpec, step: int, folder: Path
) -> None:
    """Opens the ways to the stages above and below, and says where this one is."""
    run, index = training.run, spec.index
    config = json.loads(run.config.to_json())
    hello = {"program": "jdecouple", "jax": jax.__version__, "num_processes": spec.count}
    address, port = spec.address or route_to(spec.host, spec.port), 0
    if not training.stage.is_last:
        training.outbox = Outbox(
            run.config.mesh.elastic_buffer,
            step,
            address,
            token,
            hello | {"stage": index + 1},
            training.tell,
        )
        port = training.outbox.port
    StageFolder(folder, index).begin(address, port, config)
    if index == 0:
        training.feed = Reader(run, step, training.is_asked)
        return
    below = StageFolder(folder, index - 1)
    training.feed = Receiver(
        Inbox(step, lambda: below.place, token, hello | {"stage": index}, config),
        training.stage,
        run.config.mesh.elastic_buffer if run.config.mesh.elastic == "replay" else 0,
        training.is_asked,
        training.outbox.starve if training.outbox else lambda: None,
        training.tell,
    )
