"""A naive simulation of the delayed methods: every number in a dictionary by (stage, batch).

NumPy in float64, written from the papers' definitions (DDG 1804.10574, Features Replay 1807.04511,
FDG 1906.09108, ADL 2012.03747; DSP 1909.02625 as PETRA's code has it) for stages of dense layers
with tanh, the very last layer without, under softmax cross-entropy. It shares nothing with the
library, throws nothing away, and asserts that every message is used in the iteration in which it
should arrive.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

Layer = tuple[np.ndarray, np.ndarray]  # kernel [in, out], bias [out]
Layers = list[Layer]  # of one stage, or of one gradient


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run is told; the first three as PyTorch's SGD reads them."""

    lr: float | Callable[[int], float]  # a function gets the number of updates of the stage
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    first_stage_lr_scale: float = 1.0
    beta: float = 1.0
    current_weights: bool = False
    accumulate: int = 1
    accumulate_mean: bool = False


@dataclasses.dataclass(frozen=True)
class Use:
    """How old what one backward used was, in updates."""

    stage: int
    batch: int
    weights: int  # updates of the stage since the weights that the activations came from
    error: int  # updates of the last stage since the weights at the loss


def forward(layers: Layers, x: np.ndarray, *, is_last: bool) -> list[np.ndarray]:
    """Input and outputs of all layers of a stage."""
    outputs = [x]
    for number, (kernel, bias) in enumerate(layers):
        x = x @ kernel + bias
        linear = is_last and number == len(layers) - 1
        outputs.append(x if linear else np.tanh(x))
        x = outputs[-1]
    return outputs


def backward(
    layers: Layers, outputs: list[np.ndarray], error: np.ndarray, *, is_last: bool
) -> tuple[Layers, np.ndarray]:
    """Gradients of a stage, and the error at its input; `outputs` as `forward` gives them."""
    gradients: Layers = []
    for number in reversed(range(len(layers))):
        linear = is_last and number == len(layers) - 1
        if not linear:
            error = error * (1 - outputs[number + 1] ** 2)
        gradients.insert(0, (outputs[number].T @ error, error.sum(axis=0)))
        error = error @ layers[number][0].T
    return gradients, error


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean softmax cross-entropy and its gradient."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    loss = -np.log(probabilities[rows, labels]).mean()
    error = probabilities.copy()
    error[rows, labels] -= 1
    return float(loss), error / len(labels)


class Simulation:
    """One training run of "ddg", "fr", "fdg", "adl" or "dsp".

    Attributes:
        weights: current layers of every stage.
        updates: optimiser steps that every stage has taken: the version of its weights.
        losses: mean cross-entropy by batch, as far as batches have reached the last stage.
        uses: what every backward used, in order.
        errors: by (stage, batch), the error at the stage's input that it sent down.
    """

    def __init__(self, method: str, weights: list[Layers], settings: Settings):
        assert method in ("ddg", "fr", "fdg", "adl", "dsp")
        self.method = method
        self.settings = settings
        self.num_stages = len(weights)
        self.weights = [[(w.copy(), b.copy()) for w, b in layers] for layers in weights]
        self.updates = [0] * self.num_stages
        self.velocity = [[(0 * w, 0 * b) for w, b in layers] for layers in weights]
        self.pending: list[list[Layers]] = [[] for _ in weights]
        self.losses: dict[int, float] = {}
        self.uses: list[Use] = []
        self.errors: dict[tuple[int, int], np.ndarray] = {}
        # Batch b enters in iteration b; `first` is the oldest batch since the last draining.
        self.iteration = 0
        self.first = 0
        self.batches: list[tuple[np.ndarray, np.ndarray]] = []
        self._sent: dict[tuple[str, int, int], int] = {}  # iteration, by (what, stage, batch)
        self._outputs: dict[tuple[int, int], list[np.ndarray]] = {}
        self._weights_then: dict[tuple[int, int], Layers] = {}
        self._version_then: dict[tuple[int, int], int] = {}
        self._version_at_loss: dict[int, int] = {}

    def step(self, x: np.ndarray, labels: np.ndarray) -> float:
        """One iteration with a new batch; returns the loss that became known in it, or NaN."""
        self.batches.append((x, labels))
        known = len(self.losses)
        self._iterate()
        return list(self.losses.values())[-1] if len(self.losses) > known else np.nan

    def finish(self) -> None:
        """Iterations without a new batch until every stage has used every batch."""
        wanted = {
            (k, b) for k in range(self.num_stages) for b in range(self.first, len(self.batches))
        }
        while not wanted <= {(use.stage, use.batch) for use in self.uses}:
            self._iterate()
        self.first = self.iteration = len(self.batches)

    def _iterate(self) -> None:
        if self.method in ("fdg", "adl"):
            self._pipelined(self.iteration)
        elif self.method == "dsp":
            self._forward_first(self.iteration)
        else:
            self._forward_locked(self.iteration)
        self.iteration += 1

    def _pipelined(self, t: int) -> None:
        """FDG: no stage waits for another within an iteration, so their order is free."""
        last = self.num_stages - 1
        for k in range(last):
            self._backward(k, t - 2 * last + k, t)
            self._forward(k, t - k, t, sent=t - 1)
        self._forward(last, t - last, t, sent=t - 1)
        self._backward(last, t - last, t)

    def _forward_first(self, t: int) -> None:
        """DSP(1, ..., 1, 0; 2(K-1), ..., 2, 0): as FDG, but each stage forwards, then goes back."""
        last = self.num_stages - 1
        for k in range(self.num_stages):
            self._forward(k, t - k, t, sent=t - 1)
            self._backward(k, t - 2 * last + k, t)

    def _forward_locked(self, t: int) -> None:
        """DDG and Features Replay: one forward through all stages, then all backward."""
        for k in range(self.num_stages):
            self._forward(k, t, t, sent=t)
        for k in range(self.num_stages):
            self._backward(k, t - (self.num_stages - 1 - k), t)

    def _exists(self, batch: int) -> bool:
        return self.first <= batch < len(self.batches)

    def _ahead(self, k: int) -> Layers:
        """What a forward computes with."""
        return self.weights[k]

    def _forward(self, k: int, batch: int, t: int, sent: int) -> None:
        if not self._exists(batch):
            return
        if k:
            assert self._sent["output", k - 1, batch] == sent
            x = self._outputs[k - 1, batch][-1]
        else:
            x = self.batches[batch][0]
        is_last = k == self.num_stages - 1
        layers = self._ahead(k)
        self._outputs[k, batch] = forward(layers, x, is_last=is_last)
        self._weights_then[k, batch] = layers
        self._version_then[k, batch] = self.updates[k]
        self._sent["output", k, batch] = t

    def _backward(self, k: int, batch: int, t: int) -> None:
        if not self._exists(batch):
            return
        is_last = k == self.num_stages - 1
        layers, version = self._weights_then[k, batch], self._version_then[k, batch]
        outputs = self._outputs[k, batch]
        if self.method in ("fr", "dsp"):
            layers, version = self.weights[k], self.updates[k]
            outputs = forward(layers, outputs[0], is_last=is_last)
        if self.settings.current_weights:
            layers = self.weights[k]
        if is_last:
            self.losses[batch], error = cross_entropy(outputs[-1], self.batches[batch][1])
            self._version_at_loss[batch] = version
        else:
            assert self._sent["error", k + 1, batch] == t - 1
            error = self.settings.beta * self.errors[k + 1, batch]
        gradients, self.errors[k, batch] = backward(layers, outputs, error, is_last=is_last)
        self._sent["error", k, batch] = t
        age = self.updates[-1] - self._version_at_loss[batch]
        self.uses.append(Use(k, batch, self.updates[k] - version, age))
        self.pending[k].append(gradients)
        if len(self.pending[k]) == self.settings.accumulate:
            self._update(k)

    def _update(self, k: int) -> None:
        """SGD as in PyTorch: decay added to the gradient, then momentum."""
        s = self.settings
        rate = s.lr(self.updates[k]) if callable(s.lr) else s.lr
        rate *= s.first_stage_lr_scale if k == 0 else 1.0
        scale = 1 / s.accumulate if s.accumulate_mean else 1.0
        moved, velocities = [], []
        for number, layer in enumerate(self.weights[k]):
            pairs = []
            for part, value in enumerate(layer):
                gradient = scale * sum(each[number][part] for each in self.pending[k])
                gradient = gradient + s.weight_decay * value
                velocity = s.momentum * self.velocity[k][number][part] + gradient
                direction = gradient + s.momentum * velocity if s.nesterov else velocity
                pairs.append((value - rate * direction, velocity))
            (kernel, kernel_velocity), (bias, bias_velocity) = pairs
            moved.append((kernel, bias))
            velocities.append((kernel_velocity, bias_velocity))
        self.weights[k], self.velocity[k] = moved, velocities  # new lists: the old ones are kept
        self.updates[k] += 1
        self.pending[k] = []
