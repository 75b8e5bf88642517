"""Checkpoints of a run: asynchronous, atomic, verified on the way back.

A checkpoint is one directory, ``<directory>/<step>``, that Orbax writes under a temporary name and
renames when it is complete; older ones are deleted after it has been found whole:

- ``state`` is an Orbax PyTree item: a flat dict of arrays, whose names are percent-escaped.
- ``info`` is JSON with a CRC-32: step, metric, extra; dtype, shape and CRC-32 of every array.
"""

from jdecouple.checkpoint.alone import restore_alone, save_alone
from jdecouple.checkpoint.checkpointer import Checkpointer, CheckpointError, Restored

__all__ = ["CheckpointError", "Checkpointer", "Restored", "restore_alone", "save_alone"]
