"""Checkpoints of a run: asynchronous, atomic, verified on the way back.

A checkpoint is one directory, ``<directory>/<step>``, that Orbax writes under a temporary name and
renames when it is complete:

- ``state`` is an Orbax PyTree item: a flat dict of arrays, whose names are percent-escaped.
- ``info`` is JSON with a CRC-32: step, metric, extra; dtype, shape and CRC-32 of every array.
"""

import contextlib
import functools
import itertools
import json
import operator
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from jdecouple._errors import first_line, require_int

FORMAT = 1
_DELETED = ".deleted"
_escaped = functools.partial(quote, safe="")

Accept = Callable[[dict[str, Any]], str | None]


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or none of those present can be used."""


class _RefusedError(Exception):
    """Why one checkpoint is not used, in one line."""


class Restored(NamedTuple):
    """A checkpoint: its step, its NumPy arrays by name, and the `extra` saved with them."""

    step: int
    arrays: dict[str, np.ndarray]
    extra: dict[str, Any]


class Checkpointer(contextlib.AbstractContextManager["Checkpointer"]):
    """Saves and restores the arrays of a run below one directory.

    >>> with tempfile.TemporaryDirectory() as folder, Checkpointer(folder) as checkpoints:
    ...     checkpoints.save(10, {"block_0/w": np.arange(3)}, {"seed": 0}, metric=0.9)
    ...     checkpoints.restore({"block_0/w": np.zeros(3, int)})
    Restored(step=10, arrays={'block_0/w': array([0, 1, 2])}, extra={'seed': 0})

    In a `jax.distributed` run a single process constructs the writer; it waits for no other. Any
    process may open the same directory with ``read_only=True``.

    Args:
        directory: where the checkpoints live; created if missing.
        keep: how many of the last checkpoints to keep. The best one is kept besides; what holds no
            checkpoint of this program is never deleted.
        read_only: only restore: nothing is created, cleaned, moved or deleted.

    Raises:
        ValueError: `keep` is not positive.
        CheckpointError: the directory cannot be written.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, keep: int = 3, read_only: bool = False
    ):
        require_int(1, keep=keep)
        self.directory = Path(directory).absolute()
        self._keep, self._policy = keep, _AllBut()
        self._refused: set[int] = set()
        self._pending: int | None = None
        self._manager: Any = None
        # Orbax reports each save at INFO; what fails reaches the caller as a CheckpointError.
        logging.get_absl_logger().addFilter(_is_not_orbax)
        sys.unraisablehook = _without_late_reads
        if not read_only:
            with _one_line(f"cannot write checkpoints to {self.directory}"):
                self.directory.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self.directory).close()
            self._open_manager()

    def steps(self) -> list[int]:
        """The steps on disk in rising order, without unfinished and refused ones."""
        names = os.listdir(self.directory) if self.directory.exists() else []
        steps = {int(name) for name in names if name.isdecimal() and str(int(name)) == name}
        return sorted(steps - self._refused)

    @property
    def latest_step(self) -> int | None:
        """The last step on disk (`wait` first to count a save in flight), None without one."""
        return max(self.steps(), default=None)

    @property
    def best_step(self) -> int | None:
        """The step on disk with the highest metric, the earliest of equals; None without one."""
        return _best(self._documents())

    def extras(self) -> dict[int, dict[str, Any]]:
        """Step -> the `extra` it was saved with, of every checkpoint whose info is sound."""
        return {step: document["extra"] for step, document in self._documents().items()}

    def save(
        self,
        step: int,
        arrays: Mapping[str, Any],
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
            extra: small dict that `json` can write.
            metric: score of this state, higher is better; None or NaN never counts as best.
            spare: a step; the last checkpoint before it is kept, too.

        Raises:
            CheckpointError: `step` is not new, the directory is open for reading only, or this or
                the previous save could not be written.
        """
        if self._manager is None:
            raise CheckpointError(f"{self.directory} is open for reading only")
        step = operator.index(step)
        metric = None if metric is None or np.isnan(metric) else float(metric)
        on_host = jax.device_get(dict(arrays))  # may share the device's memory
        copies = {name: np.array(array, order="C") for name, array in on_host.items()}
        document = {
            "format": FORMAT,
            "step": step,
            "metric": metric,
            "extra": json.loads(json.dumps(extra)),
            "leaves": {_escaped(name): [_spec(x), _crc(x)] for name, x in copies.items()},
        }
        self.wait()
        if self._refused:
            self._set_refused_aside()
        latest = self.latest_step
        if step <= (-1 if latest is None else latest):
            raise CheckpointError(
                f"step {step} is not after the latest checkpoint, {latest}, in {self.directory}"
            )
        documents = self._documents() | {step: document}
        kept = {*sorted(documents)[-self._keep :], _best(documents)}
        if spare is not None:
            kept.add(max((each for each in documents if each < spare), default=None))
        self._policy.superseded = documents.keys() - kept
        self._pending = step
        info = {"document": document, "crc32": _document_crc(document)}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_item(copies)), info=ocp.args.JsonSave(info)
        )
        self._guarded(lambda: self._manager.save(step, args=args, force=True))

    def wait(self) -> None:
        """Blocks until the save in flight is on disk and superseded checkpoints are gone."""
        if self._pending is not None:
            self._guarded(self._manager.wait_until_finished)
            self._pending = None
            shutil.rmtree(self.directory / _DELETED, ignore_errors=True)

    def set_aside(self, steps: Iterable[int]) -> Path:
        """Moves checkpoints to ``<directory>_refused``, from which nothing is restored; returns it.

        Raises:
            CheckpointError: they cannot be moved.
        """
        self.wait()
        self._refused |= {*steps}
        return self._set_refused_aside()

    def close(self) -> None:
        """Waits for the save in flight and releases the directory; may be called again."""
        try:
            self.wait()
        finally:
            manager, self._manager = self._manager, None
            if manager is not None:
                manager.close()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def restore(
        self,
        template: Mapping[str, Any],
        step: int | None = None,
        *,
        accept: Accept = lambda extra: None,
    ) -> Restored | None:
        """Reads the latest usable checkpoint, or the one of `step`; None if there are none.

        A checkpoint that is truncated, corrupted, foreign or none at all is refused with one
        warning and the one before it is tried. If one can be used, those refused are moved to
        ``<directory>_refused`` by the next save.

        Args:
            template: name to anything with the expected array's `shape` and `dtype`.
            step: use this checkpoint or fail.
            accept: given the `extra` of a checkpoint, says why it is to be refused, or None.

        Raises:
            CheckpointError: `step` is absent or unusable, or every checkpoint was refused.
        """
        self.wait()
        steps = self.steps()
        if step is not None:
            if step not in steps:
                raise CheckpointError(
                    f"no checkpoint {step} in {self.directory}; there are {steps or 'none'}"
                )
            steps = [step]
        refused: dict[int, str] = {}
        for candidate in reversed(steps):
            if refused:
                last = next(reversed(refused.items()))
                logging.warning("checkpoint %d refused: %s; trying %d", *last, candidate)
            try:
                restored = self._load(candidate, template, accept)
            except _RefusedError as error:
                refused[candidate] = str(error)
            else:
                self._refused |= refused.keys()
                return restored
        if not steps:
            return None
        tried, first = ", ".join(map(str, refused)), steps[-1]
        reason = f"refused {tried}; {first}: {refused[first]}"
        raise CheckpointError(f"no usable checkpoint in {self.directory}: {reason}")

    def _documents(self) -> dict[int, dict[str, Any]]:
        """Step -> the document of every checkpoint on disk that has a sound one."""
        documents = {}
        for step in self.steps():
            with contextlib.suppress(_RefusedError):
                documents[step] = _read_document(self.directory / str(step))
        return documents

    def _open_manager(self) -> None:
        """Makes a fresh Orbax manager, of this process alone; cleans what dead saves left."""
        if self._manager is not None:
            with contextlib.suppress(Exception):  # what failed has been told
                self._manager.close()
        shutil.rmtree(self.directory / _DELETED, ignore_errors=True)
        alone = _process_alone()
        handlers = {
            "state": ocp.StandardCheckpointHandler(multiprocessing_options=alone),
            "info": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        }
        options = ocp.CheckpointManagerOptions(
            create=False,
            cleanup_tmp_directories=True,
            lightweight_initialize=True,
            save_root_metadata=False,
            # A rename is atomic: a kill never leaves half a checkpoint under its step.
            todelete_subdir=_DELETED,
            multiprocessing_options=alone,
            preservation_policy=self._policy,
        )
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )

    def _load(self, step: int, template: Mapping[str, Any], accept: Accept) -> Restored:
        """Reads one checkpoint and compares it with what was saved and with what is expected."""
        document = _read_document(self.directory / str(step))
        if document["step"] != step:
            raise _RefusedError(f"it was saved at step {document['step']}")
        if reason := accept(document["extra"]):
            raise _RefusedError(reason)
        saved = {unquote(name): spec for name, (spec, _) in document["leaves"].items()}
        expected = {name: _spec(array) for name, array in template.items()}
        for name in sorted(saved.keys() | expected.keys()):
            was, wanted = saved.get(name, "absent"), expected.get(name, "none")
            if was != wanted:
                raise _RefusedError(f"leaf {name} is {was}, expected {wanted}")
        arrays = {name: np.empty(array.shape, array.dtype) for name, array in template.items()}
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=_process_alone())
        state = epath.Path(self.directory) / str(step) / "state"
        try:
            with contextlib.closing(handler):
                stored = handler.restore(state, args=ocp.args.StandardRestore(_item(arrays)))
        except Exception as error:  # Orbax and TensorStore raise many kinds on damaged files.
            raise _RefusedError(f"unreadable ({_told(error)})") from error
        arrays |= {unquote(name): array for name, array in stored.items()}
        for name, array in arrays.items():
            if [_spec(array), _crc(array)] != document["leaves"][_escaped(name)]:
                raise _RefusedError(f"leaf {name} is corrupted")
        return Restored(step, arrays, document["extra"])

    def _guarded(self, action: Callable[[], object]) -> None:
        """Runs an Orbax call; a failure drops the save in flight and starts a fresh manager."""
        try:
            action()
        except Exception as error:
            step, self._pending = self._pending, None
            self._open_manager()
            raise CheckpointError(
                f"checkpoint {step} could not be written to {self.directory}: {_told(error)}"
            ) from error

    def _set_refused_aside(self) -> Path:
        aside = self.directory.with_name(self.directory.name + "_refused")
        with _one_line(f"cannot move refused checkpoints to {aside}"):
            aside.mkdir(exist_ok=True)
            for step in sorted(self._refused):
                names = itertools.chain([f"{step}"], (f"{step}-{i}" for i in itertools.count(1)))
                free = next(aside / name for name in names if not (aside / name).exists())
                os.rename(self.directory / str(step), free)
        self._refused.clear()
        self._open_manager()
        return aside


class _AllBut:
    """Orbax preservation policy: all but what the last save has superseded.

    Orbax's `LatestN` counts and deletes directories of other programs; its `BestN` reads metrics
    from a file that these checkpoints do not have.
    """

    superseded: Set[int] = frozenset()

    def should_preserve(self, checkpoints: Sequence[Any], **context: Any) -> list[bool]:
        return [checkpoint.step not in self.superseded for checkpoint in checkpoints]


def _best(documents: Mapping[int, dict[str, Any]]) -> int | None:
    """Step of the highest metric, the earliest of equals."""
    scored = [(d["metric"], -step) for step, d in documents.items() if d["metric"] is not None]
    return -max(scored)[1] if scored else None


def _item(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What Orbax holds of `arrays`: it takes none without elements."""
    return {_escaped(name): array for name, array in arrays.items() if array.size}


def _read_document(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "info" / "metadata"
    if not path.is_file():
        raise _RefusedError("not a checkpoint of this program (no info/metadata)")
    try:
        info = json.loads(path.read_bytes())
        document, crc = info["document"], info["crc32"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _RefusedError(f"info/metadata is damaged ({_told(error)})") from error
    if crc != _document_crc(document):
        raise _RefusedError("info/metadata is damaged (checksum)")
    if document["format"] != FORMAT:
        raise _RefusedError(f"format {document['format']}, this program reads {FORMAT}")
    return document


def _process_alone() -> Any:
    """Returns Orbax options under which this process waits for no other."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"jdecouple_{own}"
    )


def _spec(array: Any) -> str:  # such as "float32[3,4]"
    return f"{array.dtype.name}[{','.join(map(str, array.shape))}]"


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(array.reshape(-1).view(np.uint8).data)


def _document_crc(document: Any) -> int:
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)[:200]}"


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what}: {error.strerror}") from error


def _is_not_orbax(record: Any) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname or logging.level_debug()


def _without_late_reads(unraisable: Any, hook: Any = sys.unraisablehook) -> None:
    """Leaves out what TensorStore tells of other reads after one of them has failed."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        hook(unraisable)
