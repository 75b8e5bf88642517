"""Whether all processes see the workdir, and what they then do together with its checkpoints."""

import contextlib
import secrets
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from jdecouple._files import absolute, is_stored
from jdecouple.checkpoint import Apart, Checkpointer, Part, Together
from jdecouple.checkpoint.document import Leaf, RefusedError, elsewhere, items, leaves
from jdecouple.checkpoint.stored import read_arrays
from jdecouple.train import hosts
from jdecouple.train.bringing import bring
from jdecouple.train.errors import ConfigError
from jdecouple.train.lock import only_run

SECONDS = 3.0  # in which all must have written their parts where one of them has gone


@contextlib.contextmanager
def share(
    processes: hosts.MultiProcess,
    folder: Path,
    checkpoints: Checkpointer | None,
    *,
    apart: bool = False,
) -> Iterator[Together | None]:
    """Context of this process's side of checkpoints that all write; None where the first does.

    That is where not all see one folder and none is to have one of its own, which is `apart`. All
    call it, the first with its open `checkpoints`.

    Raises:
        ConfigError: the folder of this process is not on its machine, is in use or cannot be
            written; or the first process has no checkpoints but others have.
    """
    token = processes.broadcast(secrets.token_hex(8)) if processes.count > 1 else ""
    own = (processes.index, processes.count, token)
    together: Together | None = None
    with contextlib.ExitStack() as stack:
        if token and _is_seen(processes, folder, token):
            together = Together(absolute(folder), *own)
        elif token and apart:
            if is_stored(folder):
                raise ConfigError(
                    f"config.checkpoint.apart needs a folder of this machine: {folder}"
                )
            together = Apart(absolute(folder), *own)
            if not processes.first:
                stack.enter_context(only_run(together.directory))
            compare(processes, together, checkpoints)
        if together is not None and checkpoints is not None:
            checkpoints.share(together)
        yield together


def _is_seen(processes: hosts.MultiProcess, folder: Path, token: str) -> bool:
    """Whether all processes see one folder.

    The first leaves a file there, in which name there is a token that nobody can have guessed, and
    every other one that sees it leaves one beside it.
    """
    marks = [folder / f".seen-{token}-{index}" for index in range(processes.count)]
    if processes.first:
        marks[0].touch()
    processes.broadcast(None)
    with contextlib.suppress(OSError):
        if not processes.first and marks[0].exists():
            marks[processes.index].touch()
    processes.collect(None)
    seen = processes.broadcast(processes.first and all(mark.exists() for mark in marks))
    if processes.first:
        for mark in marks:
            mark.unlink(missing_ok=True)
    return seen


def compare(
    processes: hosts.MultiProcess, together: Apart, checkpoints: Checkpointer | None
) -> None:
    """Tells the first where all have their parts, and the others which of them are committed."""
    place = f"{socket.gethostname()}:{together.directory}"
    messages = processes.collect([place, together.committed()])
    steps = checkpoints.steps() if checkpoints is not None else []
    for index, (_, (where, held), _) in enumerate(messages):
        if held and not steps:
            raise ConfigError(
                f"process {index} has parts of checkpoints {', '.join(map(str, held))} in {where}, "
                f"but {together.directory} has none: bring those, or move these away"
            )
    together.folders = [message.value[0] for message in messages]
    together.settle(processes.broadcast(steps), clear=False)


def settle(
    processes: hosts.MultiProcess,
    checkpoints: Checkpointer | None,
    together: Together | None,
    lists: Sequence[Mapping[str, Leaf]] = (),
) -> None:
    """Waits for the last save; folders apart from the first's then have what that has.

    The first is given what all have `listed` of the next one.
    """
    if checkpoints is not None:
        checkpoints.wait()
    elif together is not None:
        together.wait()
    if isinstance(together, Apart):
        together.settle(processes.broadcast(checkpoints and checkpoints.steps()))
        together.lists = lists


def listed(together: Together | None, parts: Sequence[Part]) -> Mapping[str, Leaf] | None:
    """What the first process is to know of what this one is about to save."""
    return together.listed(parts) if isinstance(together, Apart) else None


def finish(checkpoints: Checkpointer, together: Together | None) -> None:
    """Finishes a save, on the first process, for which the one that has gone is not needed."""
    if together is None or together.is_written(SECONDS):
        checkpoints.wait()


def agreement(
    processes: hosts.MultiProcess, together: Together, names: Callable[[int], Collection[str]]
) -> Callable[[int, dict[str, Any]], str | None]:
    """What the first process asks of a checkpoint that it can use: why others refuse it.

    Of a step it wants the arrays with these `names`.
    """

    def agree(step: int, document: dict[str, Any]) -> str | None:
        told = {key: x for key, x in document.items() if key != "extra"}
        processes.broadcast([step, told])
        own = _bring(processes, together, step, told, names(step))
        refused = [message.value for message in processes.collect(own)]
        return next((reason for reason in refused if reason is not None), None)

    return agree


def read_what_is_asked(
    processes: hosts.MultiProcess, together: Together, names: Callable[[int], Collection[str]]
) -> dict[str, np.ndarray]:
    """The arrays that this process has read last, by `names` of a step; it is not the first.

    It answers what the first asks by `agreement`, until that says None.
    """
    arrays: Mapping[str, Any] = {}
    while (asked := processes.broadcast(None)) is not None:
        step, document = asked
        own, found = names(step), leaves(document)
        reason = _bring(processes, together, step, document, own)
        wanted = {name: found[name] for name in own if name in found}
        try:
            folder = together.directory / str(step)
            arrays = read_arrays(folder, wanted, document.get("folders", ()))
        except RefusedError as error:
            reason = reason or f"process {processes.index}: {error}"
        processes.collect(reason)
    return dict(arrays)


def _bring(
    processes: hosts.MultiProcess,
    together: Together,
    step: int,
    document: Mapping[str, Any],
    names: Collection[str],
) -> str | None:
    """Brings what this process needs to read arrays; returns what is damaged of that."""
    if not isinstance(together, Apart):
        return None
    found = leaves(document)
    own = items({name: found[name] for name in names if name in found})
    return bring(processes, together, step, document, own)


def gather(
    processes: hosts.MultiProcess, together: Together | None, checkpoints: Checkpointer | None
) -> None:
    """Makes the last and the best checkpoint whole in the folder of the first; all call it."""
    if not isinstance(together, Apart):
        return
    ends = {checkpoints.latest_step, checkpoints.best_step} if checkpoints else set()
    for step in processes.broadcast(sorted(ends - {None})):
        document = processes.broadcast(checkpoints and checkpoints.document(step))
        wanted = items(leaves(document)) if processes.first else set()
        reason = bring(processes, together, step, document, wanted)
        missing = [x for x in sorted(wanted) if not (together.directory / str(step) / x).is_dir()]
        if reason or missing:
            reason = reason or elsewhere(missing[0], document["folders"])
            logging.warning("checkpoint %d is not whole: %s", step, reason)


def stage_of(trainer: Any) -> Callable[[str], int]:
    """The stage of an array, by the name that it has in a checkpoint."""
    owners = {f"stage_{stage.index}": stage.index for stage in trainer.stages}
    for stage in trainer.stages:
        owners |= {f"block_{unit.index}": stage.index for unit in stage.units}
    return lambda name: owners[name.partition("/")[0]]
