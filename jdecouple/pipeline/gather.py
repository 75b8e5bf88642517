"""Brings what the processes of a run measured together."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils


def gather(values: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Union of the scalars of all processes; every process calls it and gets the whole.

    Args:
        values: scalars of this process by name.
        names: all names of all processes, in one order.

    Returns:
        Every named scalar that some process has; where several have it they agree, and the
        first is taken.
    """
    own = np.array([float(values.get(name, np.nan)) for name in names], np.float32)
    present = np.array([name in values for name in names])
    if jax.process_count() == 1:
        rows, held = own[None], present[None]
    else:
        rows, held = multihost_utils.process_allgather((own, present))
    owner = held.argmax(axis=0)
    return {name: float(rows[owner[i], i]) for i, name in enumerate(names) if held[:, i].any()}
