"""The command that makes checkpoints whole whose parts several machines have written."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from jdecouple._files import local_folder
from jdecouple.checkpoint import Checkpointer, all_folders, gather


def main(argv: Sequence[str]) -> None:
    """Makes checkpoints of a run with checkpoint.apart whole, in the workdir of process 0.

    The folders of the others (checkpoints.process_1, ...) have been brought to this machine.

    Raises:
        ValueError: there is no checkpoint, or a part of it is missing or damaged.
        OSError: it cannot be written.
    """
    lines = (main.__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser("jdecouple gather", description=" ".join(lines[:2]))
    parser.add_argument("workdir", metavar="WORKDIR", help="that of process 0")
    parser.add_argument(
        "folders", metavar="FOLDER", nargs="*", help="of the others, where they are not in WORKDIR"
    )
    parser.add_argument("--step", type=int, help="by default the last and the best")
    given = parser.parse_args(argv)
    workdir = local_folder(given.workdir)
    checkpoints = Checkpointer(workdir / "checkpoints", read_only=True)
    steps = {given.step} if given.step is not None else {checkpoints.best_step}
    if given.step is None:
        steps.add(checkpoints.latest_step)
    if not (wanted := sorted(step for step in steps if step is not None)):
        raise ValueError(f"no checkpoint in {checkpoints.directory}")
    for step in wanted:
        gather(
            checkpoints.directory,
            [*all_folders(checkpoints.directory), *map(Path, given.folders)],
            step,
        )
        print(checkpoints.directory / str(step))
