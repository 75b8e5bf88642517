"""Checkpoints of a run: asynchronous, atomic, verified on the way back.

A checkpoint is one directory, ``<directory>/<step>``, that Orbax writes under a temporary name and
renames when it is complete; older ones are deleted after it has been found whole:

- ``state`` is an Orbax PyTree item: a flat dict of arrays, whose names are percent-escaped. Where
  several processes write, there is one such item a stage and process, ``stage_0.process_0``; where
  they see no common folder, each has its own (`jdecouple.checkpoint.apart`).
- ``info`` is JSON with a CRC-32: step, metric, extra; dtype, shape and CRC-32 of every array.
"""

from jdecouple.checkpoint.alone import restore_alone, save_alone
from jdecouple.checkpoint.apart import Apart, all_folders, gather
from jdecouple.checkpoint.checkpointer import Checkpointer, Restored
from jdecouple.checkpoint.document import CheckpointError
from jdecouple.checkpoint.together import Part, Together, own_parts

__all__ = [
    "Apart",
    "CheckpointError",
    "Checkpointer",
    "Part",
    "Restored",
    "Together",
    "all_folders",
    "gather",
    "own_parts",
    "restore_alone",
    "save_alone",
]
