"""The loop over batches: steps, metrics, evaluations and checkpoints of one process."""

import collections
import contextlib
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jdecouple import data
from jdecouple.checkpoint import Checkpointer
from jdecouple.pipeline.batch import PlacedBatch
from jdecouple.train import config as configuration
from jdecouple.train import hosts, report
from jdecouple.train.config import ConfigError, one_line
from jdecouple.train.hosts import SingleProcess, hand_out
from jdecouple.train.metrics import Clock, Means, MetricsWriter, Progress, plot_curves, read_metrics
from jdecouple.train.profile import Profile
from jdecouple.train.run import Run, Unwritten, build, check_alike
from jdecouple.trainer import State, Trainer


class NonFiniteError(RuntimeError):
    """The loss or a parameter became infinite or NaN; the message names step and block."""


def train_and_evaluate(
    config: ConfigDict | Mapping,
    workdir: str | os.PathLike[str],
    processes: hosts.SingleProcess = hosts.SINGLE_PROCESS,
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
    with one_line():
        check_alike(run.config, processes)
        checkpoints = _open(folder, run) if processes.first else Unwritten()
    processes.on_loss(checkpoints.wait)
    with checkpoints, Interrupt() as interrupt:
        with one_line():
            state, start = restore(run, checkpoints, processes)
            writer: MetricsWriter | Unwritten = Unwritten()
            if processes.first:
                report.write_config(folder, run)
                writer = MetricsWriter(folder, resume_step=state.step if start else None)
        with writer:
            profile = Profile(run.trainer, folder, run.config.profile, state.step, run.title)
            loop = Loop(run, checkpoints, writer, interrupt, profile, processes)
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


def _open(folder: Path, run: Run) -> Checkpointer:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"workdir {str(folder)!r}: {error.strerror}") from error
    return Checkpointer(folder / "checkpoints", keep=run.config.checkpoint.keep)


def restore(
    run: Run, checkpoints: Checkpointer | Unwritten, hosts: SingleProcess
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
    mine = run.trainer.to_arrays(run.trainer.abstract(addressable=True))
    arrays = hand_out(hosts, list(mine), restored.tree if restored else {})
    return run.trainer.from_arrays(step, arrays), extra


def _read(run: Run, checkpoints: Checkpointer) -> Any:
    mine = identity(run)
    found = [extra.get("identity", {}) for extra in checkpoints.extras().values()]
    if found and mine not in found:
        configuration.check_identity(mine, found[-1])
    restored = checkpoints.restore(
        run.trainer.to_arrays(run.trainer.abstract()),
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


class Interrupt:
    """Context in which the first SIGTERM or SIGINT only sets `requested`.

    A second one interrupts at once. Outside the main thread, where Python allows no handlers,
    nothing is changed.

    Attributes:
        requested: whether the run should save and stop.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


class Loop:
    """One process's pass from the restored step to the last."""

    def __init__(
        self,
        run: Run,
        checkpoints: Checkpointer | Unwritten,
        writer: MetricsWriter | Unwritten,
        interrupt: Interrupt,
        profile: Profile,
        processes: hosts.SingleProcess,
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
        """Trains to the last step, or until asked to stop.

        Args:
            state: where to begin.
            start: what the checkpoint of `state` says beside its arrays; None for a new run.

        Raises:
            NonFiniteError: the loss or a parameter is no number; nothing of it is saved.
        """
        run, config = self._run, self._config
        first = state.step
        self._saved = first if start else -1
        batches = data.train_batches(
            run.dataset.train,
            config.batch_size,
            seed=config.seed,
            share=self._trainer.local_indices(config.batch_size, config.microbatches),
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
                with one_line():
                    trainer, placed = next(prefetcher)
                profile.before(since + 1, state)
                train = trainer.step if placed.count is None else trainer.steps
                state, metrics = train(state, placed)
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

    def _put(self, batches: list[Mapping[str, Any]]) -> tuple[Trainer, PlacedBatch]:
        trainer = self._run.trainer_of(batches[0])
        return trainer, trainer.put(batches if len(batches) > 1 else batches[0])

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
        values["examples_per_second"] = (step - since) * self._config.batch_size / seconds
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
            with one_line():
                size = self._config.batch_size
                batches = data.evaluation_batches(
                    split, size, share=self._trainer.local_indices(size)
                )
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
        arrays = hosts.gather(self._processes, self._trainer.to_arrays(state))
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
        with one_line():
            self._checkpoints.save(state.step, arrays, extra, accuracy)
        self._saved = state.step

    def _last_good(self) -> str:
        self._checkpoints.wait()
        step = self._checkpoints.latest_step  # on the first process, which finds what is wrong
        return "no checkpoint was saved" if step is None else f"the last good checkpoint is {step}"
