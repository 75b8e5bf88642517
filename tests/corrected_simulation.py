"""Correctors of late gradients on top of the naive simulation, each written from its paper.

NumPy in float64; nothing is shared with the library. Every formula is that of SGD: SpecTrain's
(1809.02839, weight prediction), Ajanthan's (2505.01099, look-ahead), Kosson's (2003.11666, spike
compensation), Zmushko's (2606.30634, error feedback) and PipeMare's (1910.05124, rates).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from delayed_simulation import Layers, Settings, Simulation


def mapped(function: Any, *trees: Layers) -> Layers:
    """A function of arrays, over the layers of a stage."""
    return [
        tuple(function(*arrays) for arrays in zip(*layer, strict=True))
        for layer in zip(*trees, strict=True)
    ]


class CorrectedSimulation(Simulation):
    """A run of a delayed method with a corrector in every stage; `options` are by its name."""

    def __init__(
        self,
        method: str,
        weights: list[Layers],
        settings: Settings,
        correctors: Sequence[str],
        options: Mapping[str, Mapping[str, Any]],
    ):
        super().__init__(method, weights, settings)
        assert not settings.nesterov
        assert not settings.weight_decay
        assert not callable(settings.lr)
        self.correctors, self.options = correctors, options
        self.before = [list(layers) for layers in self.weights]  # a step ago
        self.steps: list[list[Layers]] = [[] for _ in weights]  # all, as SGD would make them

    def delay(self, k: int) -> float:
        """Steps of a stage between a forward and the step with its gradient."""
        above = self.num_stages - 1 - k
        batches = max(2 * above - 1, 0) if self.method in ("fdg", "adl") else above
        return batches / self.settings.accumulate

    def _momentum(self, k: int) -> Layers:
        """Momentum times the distance of the last step."""
        m = self.options["look_ahead"]["momentum"]
        return mapped(lambda now, before: m * (now - before), self.weights[k], self.before[k])

    def _ahead(self, k: int) -> Layers:
        w, delay, corrector = self.weights[k], self.delay(k), self.correctors[k]
        if corrector == "weight_prediction" and delay:
            ahead = self.options[corrector].get("horizon", 1) * delay * self.settings.lr
            ahead *= self.settings.first_stage_lr_scale if k == 0 else 1
            return mapped(lambda w, v: w - ahead * v, w, self.velocity[k])
        if corrector == "look_ahead" and delay:
            return mapped(np.add, w, self._momentum(k))
        return w

    def _update(self, k: int) -> None:
        s, delay, corrector = self.settings, self.delay(k), self.correctors[k]
        options = self.options.get(corrector, {})
        w, passes, rate = self.weights[k], self.pending[k], s.lr
        if k == 0:
            rate *= s.first_stage_lr_scale
        scale = 1 / s.accumulate if s.accumulate_mean else 1.0
        g = mapped(lambda *each: scale * sum(each), *passes)
        v = self.velocity[k] = mapped(lambda v, g: s.momentum * v + g, self.velocity[k], g)
        self.steps[k].append(mapped(lambda v: -rate * v, v))
        step = self.steps[k][-1]
        if corrector == "look_ahead" and delay:
            share = 1 - options["momentum"]
            step = mapped(lambda d, u: d + share * u, self._momentum(k), step)
        elif corrector == "spike_compensation":
            m = options["momentum"]
            a, b = m**delay, sum(m**i for i in range(int(delay)))
            step = mapped(lambda v, g: -rate * (a * v + b * g), v, g)
        elif corrector == "error_feedback" and delay:
            late = math.ceil(delay)
            known = len(self.steps[k]) > late
            wrong = self.steps[k][-1 - late] if known else mapped(np.zeros_like, step)
            strength = options.get("strength", 1)
            step = mapped(lambda u, e: u + strength * (u - e), step, wrong)
        elif corrector == "rate_scaling" and delay:
            share = 1 - min(self.updates[k] / options["steps"], 1) if options.get("steps") else 1
            power = options.get("power", 1) * share
            step = mapped(lambda u: u / max(delay, 1) ** power, step)
        self.before[k] = w
        self.weights[k] = mapped(np.add, w, step)
        self.updates[k] += 1
        self.pending[k] = []
