"""Arrays in a folder of a checkpoint: an Orbax item, written and read by one process alone."""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint import future

from jdecouple.checkpoint.orbax_setup import process_alone

STATE_FILES = ("manifest.ocdbt", "_METADATA")  # without which nobody can read it


class _Arrays(ocp.type_handlers.NumpyHandler):
    """Writes NumPy arrays on any process; Orbax's own handler does so on process 0 alone.

    Nothing may change the arrays until all is written: it makes no copy of them.
    """

    async def serialize(
        self, values: Sequence[np.ndarray], infos: Sequence[Any], args: Any = None
    ) -> Sequence[future.Future]:
        async def write(value: np.ndarray, info: Any) -> None:
            await info.await_path_creation()
            place = ocp.type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=True,
                global_shape=value.shape,
                local_shape=value.shape,
                dtype=value.dtype,
                process_index=jax.process_index(),
            )
            store = await ts.open(ts.Spec(place), create=True, open=True, context=info.ts_context)
            await store.write(value, can_reference_source_data_indefinitely=True)

        async def write_all() -> None:
            await asyncio.gather(*map(write, values, infos))

        return [future.CommitFutureAwaitingContractedSignals(write_all(), name="arrays")]


def write_item(folder: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays, all of which have elements, into a new folder."""
    folder.mkdir(parents=True)
    handlers = ocp.type_handlers.create_type_handler_registry((np.ndarray, _Arrays()))
    handler = ocp.PyTreeCheckpointHandler(
        multiprocessing_options=process_alone(), type_handler_registry=handlers
    )
    with contextlib.closing(handler):
        handler.save(folder, args=ocp.args.PyTreeSave(dict(arrays)))
        handler.finalize(folder)


def read_item(folder: epath.Path, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Reads what a folder holds by the names of these arrays, and nothing else of it."""
    kinds = ocp.checkpoint_utils.construct_restore_args(dict(arrays))
    args = ocp.args.PyTreeRestore(dict(arrays), restore_args=kinds, partial_restore=True)
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=process_alone())
    with contextlib.closing(handler):
        return handler.restore(folder, args=args)
