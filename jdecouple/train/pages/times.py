"""How long a run has trained until a step."""

import bisect
import math
from collections.abc import Sequence

from jdecouple.train.metrics import Line


class Seconds:
    """Seconds of training until a step; NaN where they are not known.

    Every line of the training says how fast the steps since the line before it were. Steps behind
    the last one are taken to be as fast as those before it, and so are, after a resumption, those
    of the line's interval that were trained before. A model that grows has a line where it does.
    Evaluations are left out, and so is what a process does before its first step. Steps that were
    lost and trained again count once.

    >>> fast = {"step": 100, "split": "train", "examples_per_second": 800.0}
    >>> slow = {"step": 200, "split": "train", "examples_per_second": 400.0}
    >>> until = Seconds([fast, slow], batch_size=8)
    >>> until(0), until(50), until(100), until(200), until(210)
    (0.0, 0.5, 1.0, 3.0, 3.2)

    Args:
        lines: those of `metrics.jsonl`.
        batch_size: examples of a step.
    """

    def __init__(self, lines: Sequence[Line], batch_size: float):
        self._steps, self._seconds, self._of_step = [0], [0.0], math.nan
        for line in lines:
            step, speed = line["step"], line.get("examples_per_second")
            if line["split"] != "train" or step <= self._steps[-1]:
                continue
            if not speed or speed < 0:  # from here on nothing is known
                self._of_step = math.nan
                return
            self._of_step = batch_size / speed
            self._seconds.append(self._seconds[-1] + (step - self._steps[-1]) * self._of_step)
            self._steps.append(step)

    def __call__(self, step: int) -> float:
        """The seconds until `step` is done."""
        k = bisect.bisect_left(self._steps, step)
        if k == len(self._steps):
            return self._seconds[-1] + (step - self._steps[-1]) * self._of_step
        if self._steps[k] == step:
            return self._seconds[k]
        share = (step - self._steps[k - 1]) / (self._steps[k] - self._steps[k - 1])
        return self._seconds[k - 1] + share * (self._seconds[k] - self._seconds[k - 1])
