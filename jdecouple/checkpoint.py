"""Checkpoints of a run: asynchronous, atomic, verified on the way back.

One checkpoint is one directory, ``<directory>/<step>``, that Orbax writes under a temporary name
and renames when it is whole; `jdecouple._checkpoint_format` says what it holds.
"""

import contextlib
import dataclasses
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from jdecouple import _checkpoint_format as form

_DELETED = ".deleted"


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or none of those present can be used."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpointer.restore` returns.

    Attributes:
        step: the step that the checkpoint was saved at.
        tree: nested dict of the template's structure; leaves are NumPy arrays.
        extra: the JSON-able dict that was saved with it.
    """

    step: int
    tree: Any
    extra: dict[str, Any]


class Checkpointer:
    """Saves and restores the state of a run below one directory.

    In a `jax.distributed` run a single process constructs the writer; no barrier with the others
    is entered. Any process may open the same directory with ``read_only=True``.

    Args:
        directory: where the checkpoints live; created if missing.
        keep: how many of the last checkpoints to keep (the best one is kept besides).
        read_only: only restore: nothing is created, cleaned, moved or deleted.

    Raises:
        ValueError: `keep` is not positive.
        CheckpointError: the directory cannot be written.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, keep: int = 3, read_only: bool = False
    ):
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep must be a positive integer, got {keep!r}")
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._metrics: dict[int, float | None] = {}
        self._refused: tuple[int, ...] = ()
        self._pending: int | None = None
        self._manager: Any = None
        # Orbax reports each save at INFO; what fails reaches the caller as a CheckpointError.
        logging.get_absl_logger().addFilter(_is_not_orbax)
        if not read_only:
            _require_writable(self.directory)
            self._manager = self._open_manager()

    def steps(self) -> list[int]:
        """Returns the steps on disk in rising order, without unfinished and refused ones.

        Raises:
            CheckpointError: the directory cannot be listed.
        """
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(
                f"cannot read checkpoints in {self.directory}: {error.strerror}"
            ) from error
        found = {int(name) for name in names if name.isdecimal() and str(int(name)) == name}
        return sorted(found.difference(self._refused))

    @property
    def latest_step(self) -> int | None:
        """The last step on disk (`wait` first to count a save in flight), None without one."""
        return max(self.steps(), default=None)

    @property
    def best_step(self) -> int | None:
        """The step on disk with the highest metric, the earliest of equals; None without one."""
        return _best(self._known_metrics())

    def save(
        self, step: int, tree: Mapping[str, Any], extra: dict[str, Any], metric: float | None = None
    ) -> None:
        """Copies `tree` to host memory and writes it in the background.

        The caller may donate or overwrite the leaves as soon as this returns. A save still in
        flight is waited for first.

        Args:
            step: greater than every step already saved.
            tree: nested dict with string keys; leaves are arrays or scalars of any shape and
                numeric dtype. Every leaf must be addressable by this process.
            extra: small dict that `json` can write.
            metric: score of this state, higher is better; None or NaN never counts as best.

        Raises:
            CheckpointError: `step` is not new, the directory is open for reading only, or this
                or the previous save could not be written.
            ValueError: `step` is negative, or `tree` has no leaves or one that lives elsewhere.
            TypeError: a key, a leaf, `step` or `extra` is of the wrong type.
        """
        if self._manager is None:
            raise CheckpointError(f"{self.directory} is open for reading only")
        if isinstance(step, bool) or not isinstance(step, int | np.integer):
            raise TypeError(f"step must be an integer, got {step!r}")
        step = int(step)
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        metric = None if metric is None or np.isnan(metric) else float(metric)
        leaves = form.host_copies(tree)
        info = form.describe(step, metric, extra, leaves)
        self.wait()
        self._set_refused_aside()
        latest = self.latest_step
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"step {step} is not after the latest checkpoint, {latest}, in {self.directory}"
            )
        self._known_metrics()
        self._metrics[step] = metric
        self._pending = step
        self._guarded(lambda: self._start_save(step, leaves, info))

    def wait(self) -> None:
        """Blocks until the save in flight is on disk and superseded checkpoints are gone.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._pending is not None:
            self._guarded(self._manager.wait_until_finished)
            self._pending = None
            shutil.rmtree(self.directory / _DELETED, ignore_errors=True)

    def close(self) -> None:
        """Waits for the save in flight and releases the directory; may be called again.

        Raises:
            CheckpointError: the save in flight could not be written.
        """
        try:
            self.wait()
        finally:
            manager, self._manager = self._manager, None
            if manager is not None:
                manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def extras(self) -> dict[int, dict[str, Any]]:
        """Returns step -> the `extra` it was saved with, of every checkpoint that has one."""
        found = {}
        for step in self.steps():
            with contextlib.suppress(form.RefusedError):
                found[step] = form.read_document(self.directory / str(step))["extra"]
        return found

    def restore(
        self,
        template: Mapping[str, Any],
        step: int | None = None,
        *,
        accept: Callable[[dict[str, Any]], str | None] = lambda extra: None,
    ) -> Restored | None:
        """Reads the latest usable checkpoint, or the one of `step`.

        A checkpoint that is truncated, corrupted, foreign or none at all is refused with one
        warning and the one before it is tried. If one is found, those refused are moved to
        ``<directory>_refused`` by the next save.

        Args:
            template: nested dict of the expected structure; leaves have `shape` and `dtype`
                (arrays, `jax.ShapeDtypeStruct`) or are scalars.
            step: use this checkpoint or fail.
            accept: given the `extra` of a checkpoint, says why it is to be refused, or None.

        Returns:
            The checkpoint with bit-equal NumPy leaves, or None if there are no checkpoints.

        Raises:
            CheckpointError: `step` is absent or unusable, or every checkpoint was refused.
        """
        self.wait()
        specs = form.specs(template)
        steps = self.steps()
        if step is not None:
            if step not in steps:
                present = f"there are {steps}" if steps else "there are none"
                raise CheckpointError(f"no checkpoint {step} in {self.directory}; {present}")
            steps = [step]
        if not steps:
            return None
        reasons = {}
        for candidate, before in zip(steps[::-1], [*steps[-2::-1], None], strict=True):
            try:
                arrays, extra = form.load(self.directory / str(candidate), candidate, specs, accept)
            except form.RefusedError as error:
                reasons[candidate] = str(error)
                if before is not None:
                    logging.warning(
                        "checkpoint %d refused: %s; trying %d", candidate, error, before
                    )
                continue
            self._refused += tuple(reasons)
            return Restored(candidate, form.unflatten(template, arrays), extra)
        listed = ", ".join(map(str, reasons))
        raise CheckpointError(
            f"no usable checkpoint in {self.directory}: refused {listed}; "
            f"{steps[-1]}: {reasons[steps[-1]]}"
        )

    def _open_manager(self) -> Any:
        """An Orbax manager that counts this process alone; cleans what dead saves left."""
        import orbax.checkpoint as ocp

        shutil.rmtree(self.directory / _DELETED, ignore_errors=True)
        alone = form.process_alone()
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add(
            "state", ocp.args.StandardSave, form.sealing_handler()(multiprocessing_options=alone)
        )
        registry.add(
            "info", ocp.args.JsonSave, ocp.JsonCheckpointHandler(multiprocessing_options=alone)
        )
        return ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                create=False,
                cleanup_tmp_directories=True,
                lightweight_initialize=True,
                save_root_metadata=False,
                # A rename is atomic: a kill never leaves half a checkpoint under its step.
                todelete_subdir=_DELETED,
                multiprocessing_options=alone,
                preservation_policy=_LastAndBest(self._keep, self._metrics),
            ),
            handler_registry=registry,
        )

    def _start_save(self, step: int, leaves: Mapping[str, Any], info: dict[str, Any]) -> None:
        import orbax.checkpoint as ocp

        items = ocp.args.Composite(
            state=ocp.args.StandardSave(form.stored(leaves)), info=ocp.args.JsonSave(info)
        )
        self._manager.save(step, args=items, force=True)

    def _guarded(self, action: Callable[[], object]) -> None:
        """Runs an Orbax call; a failure drops the save in flight and starts a fresh manager."""
        try:
            action()
        except Exception as error:
            step, self._pending = self._pending, None
            if step is not None:
                self._metrics.pop(step, None)
            with contextlib.suppress(Exception):
                self._manager.close()
            self._manager = self._open_manager()
            raise CheckpointError(
                f"checkpoint {step} could not be written to {self.directory}: "
                f"{form.one_line(error)}"
            ) from error

    def _known_metrics(self) -> dict[int, float | None]:
        """Metric of every step on disk whose `info` can be read."""
        steps = self.steps()
        for step in steps:
            if step not in self._metrics:
                try:
                    self._metrics[step] = form.read_document(self.directory / str(step))["metric"]
                except form.RefusedError:
                    continue
        return {step: self._metrics[step] for step in steps if step in self._metrics}

    def _set_refused_aside(self) -> None:
        if not self._refused:
            return
        aside = self.directory.with_name(self.directory.name + "_refused")
        try:
            aside.mkdir(exist_ok=True)
            for step in self._refused:
                os.rename(self.directory / str(step), _unused(aside, str(step)))
                self._metrics.pop(step, None)
        except OSError as error:
            raise CheckpointError(
                f"cannot move refused checkpoints to {aside}: {error.strerror}"
            ) from error
        self._refused = ()
        self._manager.close()
        self._manager = self._open_manager()


class _LastAndBest:
    """Orbax preservation policy: the last `keep` checkpoints, the best, and whatever is not ours.

    A directory whose metric is not known was not written by this program, or is damaged: it is
    never deleted, and takes no place among the last.
    """

    def __init__(self, keep: int, metrics: Mapping[int, float | None]):
        self._keep = keep
        self._metrics = metrics

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each of `checkpoints` (which have a `step`) whether it stays."""
        del context
        ours = {c.step: self._metrics[c.step] for c in checkpoints if c.step in self._metrics}
        kept = {*sorted(ours)[-self._keep :], _best(ours)}
        return [c.step not in ours or c.step in kept for c in checkpoints]


def _best(metrics: Mapping[int, float | None]) -> int | None:
    """Step of the highest metric, the earliest of equals."""
    scored = [(metric, -step) for step, metric in metrics.items() if metric is not None]
    return -max(scored)[1] if scored else None


def _unused(directory: Path, name: str) -> Path:
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(1)))
    return next(directory / n for n in names if not (directory / n).exists())


def _require_writable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise CheckpointError(
            f"cannot write checkpoints to {directory}: {error.strerror}"
        ) from error


def _is_not_orbax(record: Any) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname or logging.level_debug()
