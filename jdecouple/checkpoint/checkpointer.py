"""The class that saves and restores checkpoints, and the document that each of them has."""

import contextlib
import functools
import itertools
import json
import operator
import os
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from jdecouple._errors import first_line, require_int
from jdecouple._files import absolute, any_folder, is_stored, make_folder, replace, size
from jdecouple.checkpoint import shelf
from jdecouple.checkpoint.document import (
    BY_STAGE,
    DOCUMENT,
    FORMAT,
    CheckpointError,
    RefusedError,
    best,
    crc,
    escaped,
    failure,
    info,
    items,
    leaves,
    read_document,
    score,
    spec,
    told,
)
from jdecouple.checkpoint.items import STATE_FILES
from jdecouple.checkpoint.orbax_setup import manager_alone, plain, quiet
from jdecouple.checkpoint.stored import read_arrays
from jdecouple.checkpoint.together import LostError, Part, Together, whole_parts
from jdecouple.pipeline.wire import is_feedback

Accept = Callable[[dict[str, Any]], str | None]
Agree = Callable[[int, dict[str, Any]], str | None]
Template = Mapping[str, Any]


class Restored(NamedTuple):
    """A checkpoint: its step, its NumPy arrays by name, and the `extra` saved with them."""

    step: int
    arrays: dict[str, np.ndarray]
    extra: dict[str, Any]


class Checkpointer(contextlib.AbstractContextManager["Checkpointer"]):
    """Saves and restores the arrays of a run below one directory.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Checkpointer(folder) as checkpoints:
    ...     checkpoints.save(10, {"block_0/w": np.arange(3)}, {"seed": 0}, metric=0.9)
    ...     checkpoints.restore({"block_0/w": np.zeros(3, int)})
    Restored(step=10, arrays={'block_0/w': array([0, 1, 2])}, extra={'seed': 0})

    In a `jax.distributed` run a single process constructs the writer; it waits for no other. Any
    process may open the same directory with ``read_only=True``.

    Args:
        directory: where the checkpoints live, on this machine or in an object store (``gs://``,
            ``s3://``); created if missing.
        keep: how many of the last checkpoints to keep. The best one is kept besides; what holds no
            checkpoint of this program is never deleted.
        read_only: only restore: nothing is created, cleaned, moved or deleted.

    Raises:
        ValueError: `keep` is not positive, or the store of `directory` cannot be reached.
        CheckpointError: the directory cannot be written.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, keep: int = 3, read_only: bool = False
    ):
        require_int(1, keep=keep)
        self.directory = absolute(any_folder(directory))
        self._keep = keep
        self._spare: int | None = None
        self._refused: set[int] = set()
        self._pending: int | None = None
        self._amendment: tuple[int, dict[str, Any]] | None = None
        self._manager: Any = None
        self._together: Together | None = None
        self._place = contextlib.ExitStack()
        quiet()
        if not read_only:
            with _one_line(f"cannot write checkpoints to {self.directory}"):
                shelf.prepare(self.directory)
                if is_stored(self.directory):  # Orbax's manager would rename
                    self._together = Together(self.directory, 0, 1, secrets.token_hex(8))
                self._open_manager()

    def share(self, together: Together) -> None:
        """Lets several processes write from now on; this is the first, which commits."""
        self._close_manager()
        self._manager = self._together = together

    def steps(self) -> list[int]:
        """The steps on disk in rising order, without unfinished and refused ones."""
        return sorted(shelf.steps_in(self.directory) - self._refused)

    @property
    def latest_step(self) -> int | None:
        """The last step on disk (`wait` first to count a save in flight), None without one."""
        return max(self.steps(), default=None)

    @property
    def best_step(self) -> int | None:
        """The step on disk with the highest metric, the earliest of equals; None without one."""
        return best(self._documents())

    def extras(self) -> dict[int, dict[str, Any]]:
        """Step -> the `extra` it was saved with, of every checkpoint whose info is sound."""
        return {step: document["extra"] for step, document in self._documents().items()}

    def save(
        self,
        step: int,
        arrays: Mapping[str, Any] | Sequence[Part],
        extra: Any,
        metric: float | None = None,
        *,
        spare: int | None = None,
    ) -> None:
        """Copies `arrays` to host memory and writes them in the background, after the last save.

        The caller may donate or overwrite them as soon as this returns.

        Args:
            step: an integer greater than every step already saved.
            arrays: name to NumPy or JAX array that this process can read; one must have elements.
                Where several processes write, the parts of this one.
            extra: small dict that `json` can write.
            metric: score of this state, higher is better; None or NaN never counts as best.
            spare: a step; the last checkpoint before it is kept, too.

        Raises:
            CheckpointError: `step` is not new, the directory is open for reading only, or this or
                the previous save could not be written.
        """
        self._require_writable()
        step = operator.index(step)
        document = {"format": FORMAT, "step": step, **score(extra, metric)}
        if isinstance(arrays, Mapping) and self._together:
            arrays = whole_parts(arrays)
        if isinstance(arrays, Mapping):
            write = self._writing(step, document, arrays)
        else:
            document["format"] = BY_STAGE
            write = functools.partial(self._manager.save, step, arrays, document)
        self.wait()
        with _one_line(self._failure(step)):
            if self._refused:
                self._set_refused_aside()
            latest = self.latest_step
        if step <= (-1 if latest is None else latest):
            raise CheckpointError(
                f"step {step} is not after the latest checkpoint, {latest}, in {self.directory}"
            )
        self._pending, self._spare = step, spare
        self._guarded(step, write)

    def amend(self, step: int, extra: Any, metric: float | None = None) -> None:
        """Gives a saved checkpoint another `extra` and `metric`, both at once or not at all.

        While that checkpoint is being written this does not wait, and the next call does it.

        Raises:
            CheckpointError: the directory is open for reading only, or a save failed.
        """
        self._require_writable()
        self._amendment = step, score(extra, metric)
        if self._pending is None or not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Blocks until the save in flight is on disk and superseded checkpoints are gone."""
        if self._pending is not None:
            self._guarded(self._pending, self._finish)
        if self._amendment is not None:
            (step, changes), self._amendment = self._amendment, None
            self._guarded(step, lambda: self._amend(step, changes))

    def set_aside(self, steps: Iterable[int]) -> Path:
        """Moves checkpoints to ``<directory>_refused``, from which nothing is restored; returns it.

        Raises:
            CheckpointError: they cannot be moved.
        """
        self.wait()
        self._refused |= {*steps}
        return self._set_refused_aside()

    def refuse(self, step: int) -> None:
        """Passes a checkpoint over from now on, as `restore` does with one that is refused."""
        self._refused.add(step)

    def close(self) -> None:
        """Waits for the save in flight and releases the directory; may be called again."""
        try:
            self.wait()
        finally:
            self._close_manager()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def restore(
        self,
        template: Template | Callable[[int], Template],
        step: int | None = None,
        *,
        accept: Accept = lambda extra: None,
        wanted: Callable[[int], Collection[str]] | None = None,
        agree: Agree = lambda step, document: None,
    ) -> Restored | None:
        """Reads the latest usable checkpoint, or the one of `step`; None if there are none.

        A checkpoint that is truncated, corrupted, foreign or none at all is refused with one
        warning and the one before it is tried. If one can be used, those refused are moved to
        ``<directory>_refused`` by the next save.

        Args:
            template: name to anything with the expected array's `shape` and `dtype`.
            step: use this checkpoint or fail.
            accept: given the `extra` of a checkpoint, says why it is to be refused, or None.
            wanted: names of the arrays of a step to read; None: all. All are compared with the
                template.
            agree: called with the step and the document of one that fits, before its arrays are
                read, says why others refuse it.

        Raises:
            CheckpointError: `step` is absent or unusable, or every checkpoint was refused.
        """
        self.wait()
        steps = self.steps() if step is None else [self._present(step)]
        refused: dict[int, str] = {}
        for candidate in reversed(steps):
            if refused:
                last = next(reversed(refused.items()))
                logging.warning("checkpoint %d refused: %s; trying %d", *last, candidate)
            try:
                expected = template(candidate) if callable(template) else template
                own = wanted(candidate) if wanted else expected
                document = self._fitting(candidate, expected, accept)
                if reason := agree(candidate, document):
                    raise RefusedError(reason)
                names = [name for name in expected if name in own]
                restored = self._load(candidate, document, names)
            except RefusedError as error:
                refused[candidate] = str(error)
            else:
                self._refused |= refused.keys()
                return restored
        if not steps:
            return None
        tried, first = ", ".join(map(str, refused)), steps[-1]
        reason = f"refused {tried}; {first}: {refused[first]}"
        raise CheckpointError(f"no usable checkpoint in {self.directory}: {reason}")

    def read(self, step: int, wanted: Callable[[str], bool] = lambda name: True) -> Restored:
        """Reads the arrays of one checkpoint that are `wanted` by name, whatever they are.

        Raises:
            CheckpointError: there is no such checkpoint, or it is unusable.
        """
        self.wait()
        try:
            document = self.document(self._present(step))
            names = [name for name in leaves(document) if wanted(name)]
            return self._load(step, document, names)
        except RefusedError as error:
            raise CheckpointError(
                f"checkpoint {step} in {self.directory} cannot be used: {error}"
            ) from error

    def _writing(
        self, step: int, document: Mapping[str, Any], arrays: Mapping[str, Any]
    ) -> Callable[[], object]:
        """What begins to write copies of the arrays, by Orbax's manager of this process."""
        on_host = jax.device_get(dict(arrays))  # may share the device's memory
        copies = {name: np.array(array, order="C") for name, array in on_host.items()}
        found = {escaped(name): [spec(array), crc(array)] for name, array in copies.items()}
        item = {escaped(name): x for name, x in copies.items() if x.size}  # Orbax takes no other
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(item),
            info=ocp.args.JsonSave(info({**document, "leaves": found})),
        )
        return lambda: self._manager.save(step, args=args, force=True)

    def _present(self, step: int) -> int:
        if step not in (steps := self.steps()):
            raise CheckpointError(
                f"no checkpoint {step} in {self.directory}; there are {steps or 'none'}"
            )
        return step

    def _documents(self) -> dict[int, dict[str, Any]]:
        """Step -> the document of every checkpoint on disk that has a sound one."""
        documents = {}
        for step in self.steps():
            with contextlib.suppress(RefusedError):
                documents[step] = read_document(self._at(step))
        return documents

    def _require_writable(self) -> None:
        if self._manager is None:
            raise CheckpointError(f"{self.directory} is closed or open for reading only")

    def _finish(self) -> None:
        """Waits for the save in flight, looks whether all of it is there, deletes older ones."""
        assert self._pending is not None
        self._manager.wait_until_finished()
        checkpoint = self._at(self._pending)
        try:
            found = items(leaves(read_document(checkpoint)))
            if self._together:
                found = {*filter(self._together.holds, found)}
            for item, name in itertools.product(found, STATE_FILES):
                if not size(checkpoint / item / name):
                    raise OSError(f"{item}/{name} is empty")
        except (RefusedError, OSError) as error:
            shelf.delete(checkpoint)
            raise OSError(f"it was not whole: {first_line(error)}") from error
        self._pending = None
        self._delete_superseded()

    def _amend(self, step: int, changes: dict[str, Any]) -> None:
        checkpoint = self._at(step)
        text = json.dumps(info(read_document(checkpoint) | changes))
        replace(checkpoint / DOCUMENT, lambda temporary: temporary.write_text(text))
        self._delete_superseded()

    def _delete_superseded(self) -> None:
        documents = self._documents()
        kept = {*sorted(documents)[-self._keep :], best(documents)}
        if self._spare is not None:
            kept.add(max((step for step in documents if step < self._spare), default=None))
        for step in sorted(documents.keys() - kept):
            shelf.delete(self._at(step))

    def _close_manager(self) -> None:
        manager, self._manager = self._manager, None
        with self._place:
            if manager is not None:
                manager.close()

    def _open_manager(self) -> None:
        """Makes a fresh Orbax manager, of this process alone; cleans what dead saves left."""
        with contextlib.suppress(Exception):  # what failed has been told
            self._close_manager()
        for path in shelf.unfinished(self.directory):
            if not (self._together and self._together.owns(path)):
                shelf.discard(path)
        if self._together:
            self._manager = self._together
            return
        self._manager = manager_alone(self._place.enter_context(plain(self.directory)))

    def _fitting(self, step: int, template: Template, accept: Accept) -> dict[str, Any]:
        """The document of a checkpoint, with the arrays alone that are expected and as expected."""
        document = self.document(step)
        if reason := accept(document["extra"]):
            raise RefusedError(reason)
        saved = {name: leaf.kind for name, leaf in leaves(document).items()}
        expected = {name: spec(array) for name, array in template.items()}
        for name in sorted(saved.keys() | expected.keys()):
            was, needed = saved.get(name, "absent"), expected.get(name, "none")
            if was != needed and is_feedback(name):
                document["leaves"].pop(escaped(name), None)  # it begins anew
            elif was != needed:
                raise RefusedError(f"leaf {name} is {was}, expected {needed}")
        return document

    def _load(self, step: int, document: dict[str, Any], wanted: Collection[str]) -> Restored:
        """Reads arrays of one checkpoint and compares them with what was saved."""
        found = leaves(document)
        read = {name: found[name] for name in wanted if name in found}
        arrays = read_arrays(self._at(step), read, document.get("folders", ()))
        return Restored(step, arrays, document["extra"])

    def document(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of itself; RefusedError where that is not sound."""
        document = read_document(self._at(step))
        if document["step"] != step:
            raise RefusedError(f"it was saved at step {document['step']}")
        return document

    def _at(self, step: int) -> Path:
        return self.directory / str(step)

    def _guarded(self, step: int, action: Callable[[], object]) -> None:
        """Runs what writes a checkpoint; a failure drops it and starts a fresh manager."""
        try:
            action()
        except LostError:
            self._pending = self._amendment = None
            raise
        except Exception as error:
            self._pending = self._amendment = None
            with contextlib.suppress(OSError):  # one line says what is wrong
                self._open_manager()
            raise CheckpointError(f"{self._failure(step)}: {told(error)}") from error

    def _failure(self, step: int) -> str:
        return failure(step, self.directory)

    def _set_refused_aside(self) -> Path:
        aside = self.directory.with_name(self.directory.name + "_refused")
        with _one_line(f"cannot move refused checkpoints to {aside}"):
            make_folder(aside)
            for step in sorted(self._refused):
                names = itertools.chain([f"{step}"], (f"{step}-{i}" for i in itertools.count(1)))
                free = next(aside / name for name in names if not (aside / name).exists())
                shelf.move(self._at(step), free)
        self._refused.clear()
        self._open_manager()
        return aside


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what}: {error.strerror or first_line(error)}") from error
