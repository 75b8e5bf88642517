"""Items of checkpoints on their way between processes that share no folder.

They go as files, in pieces, over the links of `hosts`, so that no process holds more than a piece.
"""

import functools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdecouple.checkpoint import Apart
from jdecouple.checkpoint.apart import take_in
from jdecouple.checkpoint.document import RefusedError, items, leaves
from jdecouple.train import hosts
from jdecouple.train.hosts.link import Message

PIECE = 1 << 24  # bytes


def bring(
    processes: hosts.MultiProcess,
    together: Apart,
    step: int,
    document: Mapping[str, Any],
    wanted: Collection[str],
) -> str | None:
    """Brings each process the items of a checkpoint that it wants and has not; all call it.

    Those that are on no machine are left out.

    Args:
        processes: of the run.
        together: this one's side of its checkpoints.
        step: of the checkpoint.
        document: its document.
        wanted: names of items, each process's own.

    Returns:
        What is damaged of those that have come here, in one line; None if nothing.
    """
    checkpoint, found = together.directory / str(step), leaves(document)
    places = {item: together.find(step, item) for item in sorted(items(found))}
    lacking = [item for item in wanted if not (checkpoint / item).is_dir()]
    asked = processes.collect([lacking, [item for item, place in places.items() if place]])
    plan = []
    for item in places if processes.first else ():
        takers = [index for index, (_, (lack, _), _) in enumerate(asked) if item in lack]
        givers = [index for index, (_, (_, held), _) in enumerate(asked) if item in held]
        plan += [[item, giver, takers] for giver in givers[:1] if takers]
    damaged = None
    for item, giver, takers in processes.broadcast(plan):
        source = places[item] if processes.index == giver else None
        pieces = _carried(processes, source, giver, takers)
        if processes.index not in takers:
            for _ in pieces:
                pass
            continue
        try:
            take_in(checkpoint, item, found, functools.partial(_write, pieces))
        except RefusedError as error:
            damaged = f"{item} of process {giver}: {error}"
    return damaged


def _carried(
    processes: hosts.MultiProcess, source: Path | None, giver: int, takers: Collection[int]
) -> Iterator[tuple[str, np.ndarray]]:
    """The pieces of the item that lies at `source`, where this is the giver, on every taker."""
    pieces = _read(source) if source else iter(())
    while True:
        name, piece = next(pieces, (None, None))
        messages = processes.collect(name, [] if piece is None else [piece])
        given = messages[giver] if messages else Message("data")
        empty = given._replace(arrays=[])
        own = processes.distribute(
            [given if index in takers else empty for index in range(processes.count)]
        )
        if own.value is None:
            return
        if own.arrays:
            yield own.value, own.arrays[0]


def _read(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The files of a folder by their names in it, a piece after the other."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            yield name, np.empty(0, np.uint8)  # one without bytes is a file, too
            with path.open("rb") as file:
                while piece := file.read(PIECE):
                    yield name, np.frombuffer(piece, np.uint8)


def _write(pieces: Iterator[tuple[str, np.ndarray]], folder: Path) -> None:
    for name, piece in pieces:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(piece.data)
