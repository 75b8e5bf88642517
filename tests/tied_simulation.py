"""A naive simulation of delayed methods on three stages, of which the first and the last share.

Written from the definitions, with every number in a dictionary by (stage, batch): the vectors T go
into tanh(x T) and, turned, into the logits h T'. T moves once an iteration, by the sum of what the
backwards of that iteration found for it; the other weights as in `delayed_simulation`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdecouple.methods.objectives import cross_entropy

STAGES = 3
LAST = STAGES - 1


def first(own: Any, table: Any, x: Any, label: Any) -> Any:
    return jnp.tanh(jnp.tanh(x @ table) @ own)


def middle(own: Any, table: Any, x: Any, label: Any) -> Any:
    return jnp.tanh(x @ own)


def last(own: Any, table: Any, x: Any, label: Any) -> Any:
    return cross_entropy(jnp.tanh(x @ own) @ table.T, label)


FUNCTIONS = (first, middle, last)


class TiedSimulation:
    """One training run of "fdg", "ddg" or "fr" by SGD with momentum.

    Attributes:
        own: weights of every stage.
        table: what the first and the last stage share.
        ages: updates of the table between a forward and the use of its gradient, by stage.
    """

    def __init__(self, method: str, own: list, table: Any, rate: float, momentum: float):
        self.method, self.rate, self.momentum = method, rate, momentum
        self.own, self.table = list(own), table
        self.velocity = [jnp.zeros_like(each) for each in (*own, table)]
        self.ages: list[list[int]] = [[], [], []]
        self._iteration = self._updates = 0
        self._batches: list[dict] = []
        self._inputs: dict = {}
        self._then: dict = {}
        self._errors: dict = {}

    def step(self, batch: dict | None) -> None:
        """An iteration; without a batch it drains."""
        if batch is not None:
            self._batches.append(batch)
            self._inputs[0, self._iteration] = batch["x"]
        t, found = self._iteration, []
        if self.method == "fdg":
            for k in reversed(range(STAGES)):  # each takes what the others left an iteration ago
                if k < LAST:
                    found.append(self._backward(k, t - 2 * LAST + k))
                self._forward(k, t - k)
            found.append(self._backward(LAST, t - LAST))
        else:
            for k in range(STAGES):
                self._forward(k, t)
            found = [self._backward(k, t - (LAST - k)) for k in range(STAGES)]
        tables = [each for each in found if each is not None]
        if tables:
            self.table, self.velocity[STAGES] = self._moved(
                self.table, self.velocity[STAGES], sum(tables)
            )
            self._updates += 1
        self._iteration += 1

    def _linearized(self, k: int, batch: int) -> Any:
        label = self._batches[batch]["label"]
        x = self._inputs[k, batch]
        return jax.vjp(lambda *each: FUNCTIONS[k](*each, label), self.own[k], self.table, x)

    def _forward(self, k: int, batch: int) -> None:
        if (k, batch) not in self._inputs or not 0 <= batch < len(self._batches):
            return
        out, pullback = self._linearized(k, batch)
        self._then[k, batch] = pullback, self._updates
        if k < LAST:
            self._inputs[k + 1, batch] = out

    def _backward(self, k: int, batch: int) -> Any:
        """Moves the stage's own weights; returns the gradient of the table, if it has one."""
        if not 0 <= batch < len(self._batches):
            return None
        pullback, then = self._then[k, batch]
        if self.method == "fr":
            pullback, then = self._linearized(k, batch)[1], self._updates
        error = jnp.ones(()) if k == LAST else self._errors[k + 1, batch]
        own, table, self._errors[k, batch] = pullback(error)
        self.own[k], self.velocity[k] = self._moved(self.own[k], self.velocity[k], own)
        self.ages[k].append(self._updates - then)
        return None if k == 1 else table

    def _moved(self, weights: Any, velocity: Any, gradient: Any) -> tuple[Any, Any]:
        velocity = self.momentum * velocity + gradient
        return weights - self.rate * velocity, velocity


def weights(seed: int, words: int, width: int) -> tuple[list, Any]:
    """Weights of the stages, and the table."""
    rng = np.random.default_rng(seed)
    square = [jnp.asarray(rng.normal(size=(width, width)) / width**0.5) for _ in range(STAGES)]
    return square, jnp.asarray(rng.normal(size=(words, width)) / words**0.5)
