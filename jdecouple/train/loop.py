"""The loop over batches: steps, metrics, evaluations and checkpoints of one process."""

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from jdecouple import data, growth
from jdecouple._errors import OneLine
from jdecouple._files import any_folder
from jdecouple.checkpoint import Checkpointer, Part, Together, own_parts
from jdecouple.methods.routes.stage import NORM
from jdecouple.pipeline.batch import PlacedBatch
from jdecouple.pipeline.step_metrics import StepMetrics, on_host
from jdecouple.train import bits, devices, gauges, hosts, notebook, report, sharing
from jdecouple.train import config as configuration
from jdecouple.train.divergence import (
    Range,
    fault,
    largest_weight,
    left_out,
    not_finite,
    weights_of,
)
from jdecouple.train.errors import one_line
from jdecouple.train.interrupt import Interrupt
from jdecouple.train.lock import only_run
from jdecouple.train.metrics import Interval, Progress, clock, read_metrics
from jdecouple.train.profile import Profile
from jdecouple.train.resume import describe, origin, record, restore, stopping
from jdecouple.train.run import Run, build, check_alike
from jdecouple.train.tracking import Callback
from jdecouple.train.tracking.table import check_installed
from jdecouple.train.tracking.writers import Writers, open_writers
from jdecouple.trainer import State, Trainer

IN_A_ROW = 32
"""Batches of one bucket in a row where something waits in the stages, which ends at another's."""


class NonFiniteError(OneLine, RuntimeError):
    """The loss or a parameter became infinite or NaN; the message names step and block."""


@notebook.stop_button()
def train_and_evaluate(
    config: ConfigDict | Mapping,
    workdir: str | os.PathLike[str],
    processes: hosts.MultiProcess | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Trains as a configuration says; continues what the workdir already holds.

    In a notebook the progress is a bar, and the curves are shown at the end.

    Args:
        config: made from `jdecouple.config.default()`.
        workdir: folder for `config.json`, `metrics.jsonl`, `checkpoints/` and `curves.png`, and
            with `config.profile` `profile/` and `timeline.png`; made if missing; on this machine,
            or in an object store, such as ``gs://bucket/run``. Of several
            processes the first alone reads and writes it, but for the checkpoints: where all see
            the same folder, or with `checkpoint.apart`, each writes and reads those of its stages.
        processes: what `jdecouple.train.hosts.join` returned, where there are several.
        callbacks: functions of a step, a split and values, or writers (`jdecouple.train.tracking`):
            the first process calls each with what every line of `metrics.jsonl` holds.

    Returns:
        "step"; "finished" (False after a signal such as Ctrl-C, which saves and returns); "reason"
        where early stopping has finished it before its last step; and, when finished, on the first
        process, "test" (metrics at the last step),
        "test_at_best_validation" and "best_test" (the papers' figure: the best step by test
        accuracy, never a result). The last two are left out where `metrics.jsonl` has lost lines.

    Raises:
        ConfigError: bad values or input, or a workdir that another run uses, in one line;
            checkpoints are left untouched.
        NonFiniteError: the training diverged; the last good checkpoint is kept.
        CheckpointError: a checkpoint could not be written.
        OSError: the metrics could not be written, as on a full disk.
        TrackingError: a callback, or a writer of the user's own, has raised an exception.
        StoppedError: in a notebook, after the stop button, so that cells behind do not run.
    """
    with one_line():
        folder = any_folder(workdir)
    config = configuration.validate(config)
    if config.mesh.elastic is not None:
        raise configuration.ConfigError(
            f"config.mesh.elastic is {config.mesh.elastic!r}: it needs a process for every stage, "
            "of jdecouple launch --num_processes K -- train ..."
        )
    processes = processes or hosts.SingleProcess()
    if processes.first:
        check_installed(config.tracking)
        devices.introduce(config)
    run = build(config)
    if processes.first:
        devices.announce(run)
    title = f"{run.config.method.name} on {run.config.data.name}"  # of the pictures
    checkpoints = writer = None  # on the first process alone
    with contextlib.ExitStack() as stack:
        with one_line():
            check_alike(run.config, processes)
            if processes.first:
                stack.enter_context(only_run(folder))
                keep = run.config.checkpoint.keep
                checkpoints = stack.enter_context(Checkpointer(folder / "checkpoints", keep=keep))
            apart = run.config.checkpoint.apart
            place = (processes, folder / "checkpoints", checkpoints)
            together = stack.enter_context(sharing.share(*place, apart=apart is not None))
            if checkpoints is not None:
                processes.on_loss(lambda: sharing.finish(checkpoints, together))
        interrupt = stack.enter_context(Interrupt())
        with one_line():
            state, start = restore(run, checkpoints, processes, together)
            if processes.first:
                record(folder, run, state.step, start)
                given = (folder, run, state.step, start, callbacks)
                writer = stack.enter_context(open_writers(*given))
        profile = Profile(run.trainer, folder, run.config.profile, state.step, title)
        loop = Loop(run, checkpoints, writer, interrupt, profile, processes, together)
        state = loop.train(state, start)
        early = loop.stopping.reason if state.step < run.total_steps else None
        finished = early is not None or state.step >= run.total_steps
        if finished and apart == "gather":
            with one_line():
                sharing.gather(processes, together, checkpoints)
        result: dict[str, Any] = {"step": state.step, "finished": finished}
        if early is not None:
            result["reason"] = early
        if checkpoints is None or writer is None:
            return result
        curves = report.try_plot_curves(folder, title=title)
        where = f"at step {state.step} of {run.total_steps}"
        if early is not None:
            print(f"ended {where} by early stopping: {early}")
        if finished:
            with one_line():
                result |= report.summary(read_metrics(folder), state.step, writer.rows)
            report.show(result, folder, checkpoints.best_step, curves)
        if notebook.is_active():
            notebook.close(curves, None if finished else f"stopped {where}")
        elif not finished:
            print(f"stopped {where}: the same command continues")
        return result


@dataclasses.dataclass
class Loop:
    """One process's pass from the restored step to the last."""

    run: Run
    checkpoints: Checkpointer | None  # the first process's alone, as is the writer
    writer: Writers | None
    interrupt: Interrupt
    profile: Profile
    processes: hosts.MultiProcess
    together: Together | None = None  # where all processes write checkpoints

    def train(self, state: State, start: dict[str, Any] | None) -> State:
        """Trains from `state` to the last step, or until asked to stop.

        `start` is what the checkpoint of `state` says beside its arrays; None for a new run.
        """
        first = state.step
        run = self.run = self.run.at(first)
        config = run.config
        batches = data.train_batches(
            run.dataset.train,
            config.batch_size,
            seed=config.seed,
            share=run.trainer.local_indices(config.batch_size, config.microbatches),
            buckets=config.data.buckets or (),
            in_a_row=IN_A_ROW if run.trainer.waits else 1,
        )
        progress = Progress(run.total_steps, first, config.batch_size, self.processes.first)
        self.stopping = stopping(run, start)
        if start:
            batches.set_state(start["iterator"])
            progress.print(f"continuing from step {first} of {run.total_steps}")
        ends = [run.eval_every, config.checkpoint.every or run.eval_every]
        if config.sufficient_direction:  # measured on the state of its line
            ends.append(config.log_every)
        limits = [step for step in run.grows if first < step < run.total_steps]
        pairs = itertools.pairwise((first, *limits, run.total_steps))
        sizes = (data.group_sizes(*pair, config.chunk, *ends) for pair in pairs)
        groups = data.Groups(batches, itertools.chain.from_iterable(sizes))
        self._placed, self._trainer = first, run.trainer_for(start)
        self._saved = first if start else -1
        self._origin = origin(run) | {"inference": describe(run)}
        self._interval = Interval(first, clock(0.0), start and start["means"])
        self._range = Range(run.trainer.latency, start and start.get("range"))
        if self._range.suspect is not None:
            self._warn(f"checkpoint {first} is suspect")
        if start is None:
            self._weigh(state)
        self._pending: list[tuple[range, int, StepMetrics]] = []  # metrics on devices
        with (
            data.Prefetcher(groups, self._put) as prefetcher,
            contextlib.closing(progress),
            contextlib.closing(self.profile) as profile,
        ):
            if start and start.pop("evaluate", False):  # the process before did not come to it
                self._extra = start
                self._evaluate(state, progress)
            while state.step < run.total_steps and self.stopping.reason is None:
                if state.step in run.grows:
                    state = self._grow(state, progress)
                since, began = state.step, clock(prefetcher.wait_seconds)
                with one_line():
                    trainer, placed = next(prefetcher)
                profile.before(since + 1, state)
                state, self._trainer = trainer.take_over(self._trainer, state), trainer
                train = trainer.step if placed.count is None else trainer.steps
                state, metrics = train(state, placed)
                step = state.step
                if news := profile.after(step, state):
                    progress.print(news)
                steps = range(since + 1, step + 1)
                self._pending.append((steps, state.since, metrics))
                stop = self.processes.stops(step, self.interrupt.requested)
                ends_phase = step == run.total_steps or step in run.grows
                evaluate = ends_phase or step % run.eval_every == 0
                every = config.checkpoint.every
                save = evaluate or stop or bool(every and step % every == 0)
                shown: dict[str, Any] = {}
                if save or any(map(self._ends_interval, steps)):
                    rows = self._collect()
                    now = clock(prefetcher.wait_seconds)
                    for number, row in rows:
                        self._count(number, row)
                        if self._ends_interval(number):  # the steps of a chunk share its time
                            share = (number - since) / len(steps)
                            shown = self._log(number, state, began + share * (now - began))
                progress.update(step, shown)
                if save:
                    self._save(state, prefetcher.state, evaluate)
                if evaluate:
                    self._evaluate(state, progress)
                if stop:
                    break
        sharing.settle(self.processes, self.checkpoints, self.together)
        return state

    def _put(self, batches: list[Mapping[str, Any]]) -> tuple[Trainer, PlacedBatch]:
        run = self.run.at(self._placed + 1)  # batches are placed before it is their turn
        self._placed += len(batches)
        trainer = run.trainer_of(batches[0])
        return trainer, trainer.put(batches if len(batches) > 1 else batches[0])

    def _grow(self, state: State, progress: Progress) -> State:
        """Adds the blocks that the next step trains; the same from a checkpoint as from memory."""
        before = self.run.trainer
        arrays = hosts.gather(self.processes, before.to_arrays(state))
        self.run = self.run.at(state.step + 1)
        self._origin = origin(self.run) | {"inference": describe(self.run)}
        trainer, count = self.run.trainer, len(before.model.blocks)
        self._trainer = trainer
        names = [
            name
            for name in trainer.to_arrays(trainer.abstract(addressable=True))
            if int(name.split("/")[0].removeprefix("block_")) < count
        ]
        arrays = hosts.scatter(self.processes, names, arrays)
        state = growth.from_arrays(trainer, state.step, arrays)
        if self._range.suspect is None:  # another sum of losses, another range
            self._range = Range(trainer.latency)
            self._weigh(state)
        frozen = "frozen" if self.run.config.growth.freeze else "trained on"
        progress.print(
            f"step {state.step}: grown from {count} to {len(trainer.model.blocks)} blocks, the "
            f"first {count} are {frozen}"
        )
        return state

    def _weigh(self, state: State) -> None:
        """Begins the range of weights."""
        trainer = self.run.trainer
        weights = own_parts(weights_of(trainer.to_arrays(state)), sharing.stage_of(trainer))
        messages = self.processes.collect(largest_weight(blocks_of(weights)))
        self._range.weigh(state.step, max((each.value for each in messages), default=0.0))

    def _ends_interval(self, step: int) -> bool:
        """Whether a line is due: every `log_every` steps, where a phase ends, for a long rest."""
        if step in self.run.grows:
            return True
        every = self.run.config.log_every
        rest = step % every
        last = step == self.run.total_steps
        return not rest or (last and (2 * rest >= every or step < every))

    def _collect(self) -> list[tuple[int, Mapping[str, Any]]]:
        """Waits for the steps since the last call; gives the first process each one's metrics.

        They are {} where no batch has reached the loss yet.
        """
        latency = self.run.trainer.latency
        numbers = [(step, since) for steps, since, _ in self._pending for step in steps]
        found = on_host([metrics for *_, metrics in self._pending])
        rows: list[dict[str, Any]] = []
        for (steps, *_), metrics in zip(self._pending, found, strict=True):
            columns = {name: np.atleast_1d(values).tolist() for name, values in metrics.items()}
            rows += [{name: columns[name][i] for name in columns} for i in range(len(steps))]
        self._pending = []
        summed = not self.run.trainer.schedule.sums_late
        merged = hosts.merge_metrics(self.processes, rows, summed=summed)
        pairs = zip(numbers, merged, strict=self.processes.first)
        return [(step, row if step > since + latency else {}) for (step, since), row in pairs]

    def _count(self, step: int, row: Mapping[str, Any]) -> None:
        """Adds the metrics of a step to the means; stops at a loss that is not finite."""
        if not row:
            return
        if (reason := fault(row)) is not None:
            raise NonFiniteError(f"{reason} at step {step}; {self._last_good()}")
        norms = [name for name in row if name.endswith(NORM)]
        self._interval.add(row, finite=bool(left_out(row)), late=norms)
        if np.isfinite(row["loss"]):
            self._warn(self._range.add(step, float(row["loss"])))

    def _log(self, step: int, state: State, now: np.ndarray) -> dict[str, Any]:
        """Writes the line of the interval that ends here; returns what the console shows."""
        size = self.run.config.batch_size
        values = self._interval.end(step, now, size)
        diagnosed = jax.device_get(self.run.diagnose(state) if self.run.diagnose else {})
        values |= {name: float(value) for name, value in diagnosed.items() if np.isfinite(value)}
        freeze = self.run.config.growth.freeze
        values |= gauges.learning_rates(self.run.phases, step, freeze=freeze) | gauges.memory()
        values |= bits.units(values, self.run.dataset, "train")
        self._write(step, "train", values)
        shown: dict[str, Any] = {"epoch": f"{step * size / len(self.run.dataset.train):.2f}"}
        names = ("loss", "accuracy", "bits_per_byte")
        shown |= {name: values[name] for name in names if name in values}
        return shown | {"input wait": f"{values['input_wait']:.1%}"}

    def _write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        if self.writer is not None:
            self.writer.write(step, split, values)

    def _evaluate(self, state: State, progress: Progress) -> None:
        """Evaluates validation and test, and writes that into the checkpoint of the state."""
        accuracy, began = None, time.perf_counter()
        size, trainer = self.run.config.batch_size, self.run.trainer
        for split in filter(len, (self.run.dataset.validation, self.run.dataset.test)):
            with one_line():
                batches = data.evaluation_batches(split, size, share=trainer.local_indices(size))
                values = trainer.evaluate(state, batches)
            values |= bits.units(values, self.run.dataset, split.name)
            self._write(state.step, split.name, values)
            if split.name == "validation":
                accuracy = values["accuracy"]
                if state.step > self.run.phases[-1].start:  # the whole model is there
                    self.stopping.add(state.step, accuracy)
            listed = " ".join(f"{value:.2%}" for value in report.exits(values).values())
            progress.print(f"step {state.step} {split.name:10} accuracy per exit: {listed}")
            if found := report.exits(values, "bits_per_byte").values():
                listed = " ".join(f"{value:.4f}" for value in found)
                progress.print(f"step {state.step} {split.name:10} bits per byte: {listed}")
        if self.checkpoints is not None:
            self.checkpoints.amend(state.step, self._extra | self._counts(), accuracy)
        self._interval.leave_out(time.perf_counter() - began)

    def _save(self, state: State, iterator: Any, evaluate: bool) -> None:
        """Saves a state; one that is yet to be evaluated says so, and whoever restores it does."""
        if state.step == self._saved:
            return
        self._saved = state.step
        trainer, arrays = self.run.trainer, self.run.trainer.to_arrays(state)
        parts: Any
        if self.together is None:
            parts = hosts.gather(self.processes, arrays)
            blocks = list(parts.items())
        else:
            parts = own_parts(arrays, sharing.stage_of(trainer))
            blocks = blocks_of(parts)
        # In float16, what overflows in a queue is left out in its turn.
        queues = "stage_" if self.run.config.dtype == "float16" else None
        found = [not_finite(blocks, but=queues), largest_weight(blocks)]
        messages = self.processes.collect([*found, sharing.listed(self.together, parts)])
        if self.checkpoints is None:
            sharing.settle(self.processes, None, self.together)
            if self.together is not None:
                self.together.save(state.step, parts)
            return
        spoilt, largest, lists = zip(*(message.value for message in messages), strict=True)
        for name in filter(None, spoilt):
            raise NonFiniteError(
                f"{name} is not finite after step {state.step}; {self._last_good()}"
            )
        self._warn(self._range.weigh(state.step, max(largest)))
        self._extra = {"iterator": iterator, "means": self._interval.means, **self._origin}
        self._extra |= {"range": self._range.values, **self._counts()}
        if self._trainer.waits and self._trainer is not trainer:
            self._extra["length"] = self._trainer.options["example"]["x"].shape[1]
        due = {"evaluate": True} if evaluate else {}
        spare = self._range.suspect
        sharing.settle(self.processes, self.checkpoints, self.together, lists)
        self.checkpoints.save(state.step, parts, self._extra | due, spare=spare)

    def _counts(self) -> dict[str, Any]:
        rows = {}
        if self.writer is not None:
            self.writer.flush()  # a checkpoint counts no line that a kill may take
            rows = {"rows": self.writer.rows}
        counts_evaluations = self.run.config.early_stopping.patience is not None
        return rows | ({"early_stopping": self.stopping.values} if counts_evaluations else {})

    def _sides(self) -> tuple[list[int], list[int]]:
        """Steps of the checkpoints that are good, and of those that are suspect."""
        assert self.checkpoints is not None  # the first process finds what is wrong
        self.checkpoints.wait()
        steps, suspect = self.checkpoints.steps(), self._range.suspect
        good = [step for step in steps if suspect is None or step < suspect]
        return good, steps[len(good) :]

    def _warn(self, reason: str | None) -> None:
        if reason is not None and self.checkpoints is not None:
            good, _ = self._sides()
            last = f"the last good one is {good[-1]}" if good else "there is none before"
            logging.warning(
                "%s: checkpoints from step %d on may be spoilt, %s; to go back, stop, move the "
                "later ones elsewhere and give the same command",
                *(reason, self._range.suspect, last),
            )

    def _last_good(self) -> str:
        """Which checkpoint a diverged run goes on from; the suspect ones are moved away."""
        assert self.checkpoints is not None
        good, bad = self._sides()
        if not good and not bad:
            return "no checkpoint was saved"
        text = f"the last good checkpoint is {good[-1]}" if good else "no good checkpoint is left"
        if bad:
            with one_line():
                aside = self.checkpoints.set_aside(bad)
            text += f" ({', '.join(map(str, bad))}, suspect, moved to {aside.name}/)"
        goes_on = "goes on from there" if good else "begins anew"
        return f"{text}; the same command {goes_on}, a lower learning rate may help"


def blocks_of(parts: Iterable[Part]) -> list[tuple[str, np.ndarray]]:
    """Names and elements of parts of arrays."""
    return [(part.name, part.block) for part in parts]
