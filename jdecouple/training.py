"""The loop: from a configuration to a trained model, with metrics, checkpoints and resume."""

import collections
import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from jdecouple import config as configuration
from jdecouple import data, hosts, methods, models, optim, report
from jdecouple.bucketing import by_length, check_buckets
from jdecouple.checkpoint import Checkpointer
from jdecouple.config import ConfigError, chosen
from jdecouple.diagnostics import SufficientDirection
from jdecouple.interrupt import Interrupt
from jdecouple.metrics import Clock, Means, MetricsWriter, Progress, plot_curves, read_metrics
from jdecouple.pipeline import make_mesh, propose
from jdecouple.processes import Unwritten, check_alike, check_processes
from jdecouple.profile import Profile
from jdecouple.resume import identity, restore
from jdecouple.state import PlacedChunk
from jdecouple.trainer import State, Trainer


class NonFiniteError(RuntimeError):
    """The loss or a parameter became infinite or NaN; the message names step and block."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a configuration stands for, built and checked, with nothing on disk yet."""

    config: ConfigDict
    dataset: data.Dataset
    trainer: Trainer
    total_steps: int
    eval_every: int
    diagnose: Callable[[State], dict[str, jax.Array]]
    trainer_of: Callable[[Mapping[str, Any]], Trainer]
    """The trainer of a batch: `trainer`, or one like it for texts of another length."""

    @property
    def title(self) -> str:
        """Heading of the run's pictures."""
        return f"{self.config.method.name} on {self.config.data.name}"


def build(config: ConfigDict | Mapping) -> Run:
    """Builds data set, model, method, optimiser and trainer of a configuration.

    Raises:
        ConfigError: in one line, whatever is wrong with the values or the data.
    """
    config = configuration.validate(config)
    with _one_line():
        dataset = data.load(config.data.name, **_data_arguments(config))
        steps_per_epoch = data.steps_per_epoch(dataset.train, config.batch_size)
        total_steps = config.steps or config.epochs * steps_per_epoch
        inputs = dataset.model_arguments()
        name = config.model.name
        what = f"data set {dataset.name!r} holds {dataset.kind}"
        configuration.check_model_reads(name, inputs, what)
        model = models.get(name)(
            dataset.num_classes,
            **inputs,
            rngs=nnx.Rngs(config.seed),
            **chosen(config.model, configuration.model_arguments(name), "model"),
        )
        method = methods.get(config.method.name, **_method_arguments(config, dataset))
        make_trainer = functools.partial(
            Trainer,
            model,
            method,
            _optimizer(config, total_steps, steps_per_epoch, method.route.accumulate),
            microbatches=config.microbatches,
            num_classes=dataset.num_classes,
            seed=config.seed,
            transform=dataset.transform(config.data.augment),
            dtype=configuration.DTYPES[config.dtype],
            clip_norm=config.clip_norm,
            remat=config.remat,
            fuse=False if config.profile else None,  # a timeline shows stages
            max_in_flight=config.max_in_flight,
        )
        example = dataset.train.gather(np.arange(config.batch_size))
        probe = functools.partial(make_trainer, example=example)
        placement = _placement(config, probe, len(model.blocks))
        placement |= {"schedule": config.schedule, "engine": config.engine}
        make_trainer = functools.partial(make_trainer, **placement)
        trainer = make_trainer(example=example)
        trainer_of = by_length(trainer, example, make_trainer)
        trainer.check_chunk(config.chunk)
        if config.data.buckets:
            check_buckets(trainer)
        check_processes(trainer, config)
        diagnose = SufficientDirection(trainer) if config.sufficient_direction else _nothing
    eval_every = config.eval_every or steps_per_epoch
    return Run(config, dataset, trainer, total_steps, eval_every, diagnose, trainer_of)


def train_and_evaluate(
    config: ConfigDict | Mapping,
    workdir: str | os.PathLike[str],
    processes: hosts.Alone = hosts.ALONE,
) -> dict[str, Any]:
    """Trains as a configuration says; continues what the workdir already holds.

    Args:
        config: made from `jdecouple.config.default()`.
        workdir: folder for `config.json`, `metrics.jsonl`, `checkpoints/` and `curves.png`, and
            with `config.profile` `profile/` and `timeline.png`; made if missing. Of several
            processes the first alone reads and writes it.
        processes: what `jdecouple.hosts.join` returned, where there are several.

    Returns:
        "step"; "finished" (False after SIGTERM or Ctrl-C, which save and return); and, when
        finished, on the first process, "test" (metrics at the last step),
        "test_at_best_validation" and "best_test" (the papers' figure: the best step by test
        accuracy, never a result).

    Raises:
        ConfigError: bad values or input, in one line; checkpoints are left untouched.
        NonFiniteError: the training diverged; the last good checkpoint is kept.
    """
    run = build(config)
    folder = Path(workdir)
    with _one_line():
        check_alike(run.config, processes)
        checkpoints = _open(folder, run) if processes.first else Unwritten()
    processes.on_loss(checkpoints.wait)
    with checkpoints, Interrupt() as interrupt:
        with _one_line():
            state, start = restore(run, checkpoints, processes)
            writer: MetricsWriter | Unwritten = Unwritten()
            if processes.first:
                report.write_config(folder, run)
                writer = MetricsWriter(folder, resume_step=state.step if start else None)
        with writer:
            profile = Profile(run.trainer, folder, run.config.profile, state.step, run.title)
            loop = _Loop(run, checkpoints, writer, interrupt, profile, processes)
            state = loop.train(state, start)
        if processes.first:
            plot_curves(folder, title=run.title)
    result = {"step": state.step, "finished": state.step >= run.total_steps}
    if not processes.first:
        return result
    if result["finished"]:
        result |= report.summary(read_metrics(folder))
        report.show(result, folder, checkpoints.best_step)
    else:
        print(f"stopped at step {state.step} of {run.total_steps}: the same command continues")
    return result


class _Loop:
    """One process's pass from the restored step to the last."""

    def __init__(
        self,
        run: Run,
        checkpoints: Checkpointer | Unwritten,
        writer: MetricsWriter | Unwritten,
        interrupt: Interrupt,
        profile: Profile,
        processes: hosts.Alone,
    ):
        self._run = run
        self._config = run.config
        self._trainer = run.trainer
        self._checkpoints = checkpoints
        self._writer = writer
        self._interrupt = interrupt
        self._profile = profile
        self._pending: list[tuple[range, dict[str, jax.Array]]] = []  # steps, metrics of each
        self._rows: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()
        self._processes = processes
        self._means = Means()
        self._saved = -1
        self._line = (0, Clock.now(0.0))  # step and time of the last line

    def train(self, state: State, start: dict[str, Any] | None) -> State:
        run, config = self._run, self._config
        first = state.step
        self._saved = first if start else -1
        batches = data.train_batches(
            run.dataset.train,
            config.batch_size,
            seed=config.seed,
            share=self._trainer.share(config.batch_size, config.microbatches),
            buckets=config.data.buckets or (),
        )
        if start:
            batches.set_state(start["iterator"])
            self._means = Means(start["means"])
        self._line = (first, Clock.now(0.0))
        progress = Progress(
            run.total_steps, first, config.batch_size, enabled=self._processes.first
        )
        if first:
            progress.print(f"continuing from step {first} of {run.total_steps}")
        ends = [run.eval_every, config.checkpoint.every or run.eval_every]
        if config.sufficient_direction:  # measured on the state of its line
            ends.append(config.log_every)
        groups = data.Groups(batches, data.group_sizes(first, run.total_steps, config.chunk, *ends))
        with (
            data.Prefetcher(groups, self._put) as prefetcher,
            contextlib.closing(progress),
            contextlib.closing(self._profile) as profile,
        ):
            while state.step < run.total_steps:
                since, began = state.step, Clock.now(prefetcher.wait_seconds)
                with _one_line():
                    trainer, chunk = next(prefetcher)
                profile.before(since + 1, state)
                state, metrics = trainer.run_chunk(state, chunk)
                step = state.step
                if news := profile.after(step, state):
                    progress.print(news)
                self._pending.append((range(since + 1, step + 1), metrics))
                stop = self._processes.stops(step, self._interrupt.requested)
                evaluate = step == run.total_steps or step % run.eval_every == 0
                every = config.checkpoint.every
                save = evaluate or stop or bool(every and step % every == 0)
                shown = self._log_chunk(since, began, state, prefetcher)
                if save:
                    self._collect(step)
                progress.update(step, shown)
                accuracy = self._evaluate(state, progress) if evaluate else None
                if save:
                    self._save(state, prefetcher.state, accuracy)
                if stop:
                    break
        self._checkpoints.wait()
        return state

    def _put(self, batches: list[Mapping[str, Any]]) -> tuple[Trainer, PlacedChunk]:
        trainer = self._run.trainer_of(batches[0])
        return trainer, trainer.put_chunk(batches)

    def _log_chunk(
        self, since: int, began: Clock, state: State, prefetcher: data.Prefetcher
    ) -> dict[str, Any]:
        """Writes the lines that are due after the steps from `since` on; they share its time."""
        shown: dict[str, Any] = {}
        for step in range(since + 1, state.step + 1):
            if self._closes_interval(step):
                self._collect(step)
                now = Clock.now(prefetcher.wait_seconds)
                share = (step - since) / (state.step - since)
                shown = self._log(step, state, began.towards(now, share))
        return shown

    def _closes_interval(self, step: int) -> bool:
        """Whether a line is due: every `log_every` steps, and for a long enough rest."""
        every = self._config.log_every
        rest = step % every
        last = step == self._run.total_steps
        return not rest or (last and (2 * rest >= every or step < every))

    def _collect(self, last: int) -> None:
        """Waits for the steps since the last call up to `last`; stops at one that is not finite."""
        columns = jax.device_get([metrics for _, metrics in self._pending])
        for (steps, _), found in zip(self._pending, columns, strict=True):
            values = [np.atleast_1d(column).tolist() for column in found.values()]
            rows = [dict(zip(found, row, strict=True)) for row in zip(*values, strict=True)]
            self._rows.extend(zip(steps, rows or [{}] * len(steps), strict=True))
        self._pending = []
        due = []
        while self._rows and self._rows[0][0] <= last:
            due.append(self._rows.popleft())
        merged = hosts.merged_rows(self._processes, [row for _, row in due])
        for (step, _), row in zip(due, merged, strict=self._processes.first):
            if step <= self._trainer.latency:  # no batch has reached the loss yet
                continue
            self._means.add(row)
            if not np.isfinite(row["loss"]):
                bad = [
                    name.split("/")[0]
                    for name, value in row.items()
                    if name.endswith("/loss") and not np.isfinite(value)
                ]
                raise NonFiniteError(
                    f"the loss of {bad[0] if bad else 'the model'} is {row['loss']} "
                    f"at step {step}; {self._last_good()}"
                )

    def _log(self, step: int, state: State, now: Clock) -> dict[str, Any]:
        """Writes the means since the last line; returns what the console shows."""
        values = self._means.take()
        diagnosed = jax.device_get(self._run.diagnose(state))
        values |= {name: float(value) for name, value in diagnosed.items() if np.isfinite(value)}
        since, began = self._line
        seconds = now.time - began.time
        values["images_per_second"] = (step - since) * self._config.batch_size / seconds
        values["input_wait"] = (now.waited - began.waited) / seconds
        self._line = (step, now)
        self._writer.write(step, "train", values)
        epoch = step * self._config.batch_size / len(self._run.dataset.train)
        shown: dict[str, Any] = {
            "epoch": f"{epoch:.2f}",
            **{k: values[k] for k in ("loss", "accuracy") if k in values},
        }
        return {**shown, "input wait": f"{values['input_wait']:.1%}"}

    def _evaluate(self, state: State, progress: Progress) -> float | None:
        """Evaluates validation and test; returns the validation accuracy, if there is one."""
        accuracy = None
        began = time.perf_counter()
        for split in (self._run.dataset.validation, self._run.dataset.test):
            if not len(split):
                continue
            with _one_line():
                size = self._config.batch_size
                batches = data.evaluation_batches(split, size, share=self._trainer.share(size))
                values = self._trainer.evaluate(state, batches)
            self._writer.write(state.step, split.name, values)
            if split.name == "validation":
                accuracy = values["accuracy"]
            exits = [v for k, v in values.items() if k.startswith("exit_") and "accuracy" in k]
            listed = " ".join(f"{value:.2%}" for value in exits)
            progress.print(f"step {state.step} {split.name:10} accuracy per exit: {listed}")
        # Evaluation is no part of the training speed.
        since, clock = self._line
        self._line = (since, clock._replace(time=clock.time + time.perf_counter() - began))
        return accuracy

    def _save(self, state: State, iterator: Any, accuracy: float | None) -> None:
        if state.step == self._saved:
            return
        arrays = hosts.gather(self._processes, self._trainer.arrays(state))
        for name, value in arrays.items():
            if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
                raise NonFiniteError(
                    f"{name} is not finite after step {state.step}; {self._last_good()}"
                )
        extra = {
            "iterator": iterator,
            "means": self._means.state,
            "identity": identity(self._run),
        }
        with _one_line():
            self._checkpoints.save(state.step, arrays, extra, accuracy)
        self._saved = state.step

    def _last_good(self) -> str:
        self._checkpoints.wait()
        step = self._checkpoints.latest_step  # on the first process, which finds what is wrong
        return "no checkpoint was saved" if step is None else f"the last good checkpoint is {step}"


def _open(folder: Path, run: Run) -> Checkpointer:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"workdir {str(folder)!r}: {error.strerror}") from error
    return Checkpointer(folder / "checkpoints", keep=run.config.checkpoint.keep)


def _nothing(state: State) -> dict[str, jax.Array]:
    del state
    return {}


def _placement(
    config: ConfigDict, make_trainer: Callable[..., Trainer], num_blocks: int
) -> dict[str, Any]:
    """The Trainer's arguments on stages and devices: as given, or as proposed by simulation."""
    section, devices = config.mesh, len(jax.devices())
    boundaries = config.boundaries if config.split is None else config.split
    given = {"num_stages": config.num_stages, "boundaries": boundaries}
    if section.replicas is not None:
        return {**given, "mesh": make_mesh(replicas=section.replicas)}
    stages = section.stages or config.num_stages
    if stages is None:
        stages = max(1, min(num_blocks, devices // section.data))
    if not section.propose:
        return {**given, "mesh": make_mesh(stages, section.data)}
    probe = make_trainer(num_stages=1, mesh=make_mesh(1))
    schedule = probe.method.route.schedules[0] if config.schedule == "auto" else config.schedule
    proposal = propose(
        probe.block_costs(),
        stages,
        devices,
        schedule=schedule,
        microbatches=config.microbatches,
        batch_size=config.batch_size,
    )
    if jax.process_index() == 0:
        print(f"proposal: {proposal}")
    return {"boundaries": proposal.boundaries, "mesh": make_mesh(replicas=proposal.replicas)}


def _data_arguments(config: ConfigDict) -> dict[str, Any]:
    section = config.data
    names = (
        *("data_dir", "download", "validation", "label_noise"),
        *("image_size", "vocabulary_size", "glove"),
    )
    sizes = ("synthetic_size", "channels", "num_classes") if section.name == "synthetic" else ()
    given = {name: section[name] for name in (*names, *sizes)}
    length = section.buckets[-1] if section.buckets else section.max_length
    return {**given, "max_length": length, "seed": config.seed}


def _method_arguments(config: ConfigDict, dataset: data.Dataset) -> dict[str, Any]:
    """What the configuration sets, and the images' statistics where the method asks for them."""
    allowed = methods.arguments(config.method.name)
    known = {key: value for key, value in dataset.method_arguments().items() if key in allowed}
    return known | chosen(config.method, allowed, "method")


def _optimizer(config: ConfigDict, total_steps: int, steps_per_epoch: int, accumulate: int) -> Any:
    section = config.optimizer
    rate = section.learning_rate
    if section.schedule == "cosine":
        schedule = optim.cosine(rate, section.end_learning_rate, total_steps)
    elif section.schedule == "step_decay":
        boundaries = [round(epoch * steps_per_epoch) for epoch in section.decay_epochs]
        schedule = optim.step_decay(rate, boundaries, section.decay_factor)
    else:
        schedule = optim.constant(rate)
    if section.per_epoch:
        schedule = optim.per_epoch(schedule, steps_per_epoch)
    if section.warmup_epochs:
        steps = max(1, round(section.warmup_epochs * steps_per_epoch))
        schedule = optim.warmup(schedule, steps, section.warmup_start)
    schedule = optim.every(schedule, accumulate)
    allowed = configuration.optimizer_arguments(section.name)
    own = {key: section[key] for key in section if key not in configuration.LEARNING_RATE}
    return optim.get(section.name)(schedule, **chosen(own, allowed, "optimizer"))


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Turns what is raised about given values, files or data into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, OSError) as error:
        text = str(error).strip() or type(error).__name__
        raise ConfigError(text.splitlines()[0]) from error
