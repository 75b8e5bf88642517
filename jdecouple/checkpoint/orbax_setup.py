"""What Orbax needs to write any folder, from one process, without a word of its own."""

import contextlib
import logging as python_logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that it is writing
# Orbax takes these for a pattern, TensorStore a backslash for a slash; neither takes other bytes
# than UTF-8.
_NOT_PLAIN = re.compile(r"[*?[\\\udc80-\udcff]")
_DESCRIPTORS = "/proc/self/fd"  # where Linux has another path of every open folder
_ORBAX = re.compile(rf"tensorstore|{os.sep}orbax{os.sep}")


def process_alone() -> Any:
    """Returns Orbax options under which this process waits for no other."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"jdecouple_{own}"
    )


def manager_alone(place: epath.Path) -> ocp.CheckpointManager:
    """Returns Orbax's manager of the checkpoints in a folder, of this process alone."""
    alone = process_alone()
    handlers = {
        "state": ocp.StandardCheckpointHandler(multiprocessing_options=alone),
        "info": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    }
    options = ocp.CheckpointManagerOptions(
        create=False,
        lightweight_initialize=True,
        save_root_metadata=False,
        multiprocessing_options=alone,
    )
    return ocp.CheckpointManager(place, options=options, item_handlers=handlers)


@contextlib.contextmanager
def plain(directory: Path) -> Iterator[epath.Path]:
    """Another path of `directory` where its own has what Orbax does not take as it stands.

    Raises:
        ValueError: This system has no other path for it.
    """
    if not _NOT_PLAIN.search(str(directory)):
        yield epath.Path(directory)
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        place = epath.Path(f"{_DESCRIPTORS}/{descriptor}")
        if not place.exists():
            raise ValueError(
                f"checkpoints cannot be in {directory}: a path in UTF-8 without * ? [ \\ is needed"
            )
        yield place
    finally:
        os.close(descriptor)


def quiet() -> None:
    """Silences Orbax: it reports each save, and what fails reaches its caller as an error."""
    logging.get_absl_logger().addFilter(_is_not_orbax)
    python_logging.getLogger("asyncio").addFilter(_is_not_of_a_task)
    sys.unraisablehook = _without_late_reads


def _is_not_orbax(record: Any) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname or logging.level_debug()


def _is_not_of_a_task(record: Any) -> bool:
    """Leaves out what asyncio tells of other files after one of them has failed."""
    message = record.getMessage()
    return "never retrieved" not in message or not _ORBAX.search(message)


def _without_late_reads(unraisable: Any, hook: Any = sys.unraisablehook) -> None:
    """Leaves out what TensorStore tells of other reads after one of them has failed."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        hook(unraisable)
