"""Metrics that cost nothing: the learning rate, and the memory that was in use."""

import resource
import sys
from collections.abc import Sequence

import jax

from jdecouple.train.phases import Phase


def learning_rates(phases: Sequence[Phase], step: int, *, freeze: bool = True) -> dict[str, float]:
    """What the schedule says for step number `step`, the first being 1.

    A step that a late error or an overflow sets back sets back that of its block, which is not
    counted here; nor are factors on the updates of single parts.

    Args:
        phases: those of the run.
        step: number of the step.
        freeze: whether blocks train no more when others are added. If they do, each began its own
            course when it was added, and "block_{i}/learning_rate" tells of each.

    Returns:
        "learning_rate", of the first block that is trained.
    """
    begun = [phase for phase in phases if phase.start < step] or [phases[0]]
    current = begun[-1]
    if freeze:
        return {"learning_rate": float(current.learning_rate(step - 1 - current.start))}
    counts = [0, *(len(phase.trainer.model.blocks) for phase in begun)]
    rates: dict[str, float] = {}
    for phase, first, end in zip(begun, counts, counts[1:], strict=False):
        rate = float(current.learning_rate(step - 1 - phase.start))
        rates |= {f"block_{index}/learning_rate": rate for index in range(first, end)}
    return {"learning_rate": rates["block_0/learning_rate"], **(rates if len(begun) > 1 else {})}


def memory() -> dict[str, float]:
    """The most bytes in use since the process began.

    Returns:
        "device_memory_peak", of the fullest of this process's devices; where they do not count it,
        as on CPUs, "process_memory_peak", all that the process had in memory.
    """
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in statistics if "peak_bytes_in_use" in each]
    if peaks:
        return {"device_memory_peak": float(max(peaks))}
    unit = 1 if sys.platform == "darwin" else 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"process_memory_peak": float(most * unit)}
