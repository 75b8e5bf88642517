"""Rules by which an example leaves a network at an early exit.

A rule scores what an exit answers, higher where it is surer. An example leaves at the first exit
where its score has been above the threshold `patience` exits in succession, this one included. The
last exit always answers.

- ``cosine``, of DeInfoReg (arXiv 2506.18193): the cosine of the logits and of those of the exit
  before, if both have the same arg-max. Its threshold is 0.8 in the paper. There is no exit before
  the first, so no example leaves there. The authors' code decides once for a whole batch, and a
  miss does not set its count back; here every example leaves by itself, and a miss does.
- ``confidence``: the largest probability.
- ``entropy``, of BranchyNet (arXiv 1709.01686): the negative entropy of the probabilities, divided
  by log(classes): from -1 to 0. There an example leaves whose entropy is below T nats, which is the
  threshold -T / log(classes) here.
- ``margin``: the difference of the two largest probabilities.

>>> import numpy as np
>>> logits = np.array([[[0.1, 0.0], [3.0, 0.0]], [[2.0, 0.0], [4.0, 0.0]]])  # [exits, n, classes]
>>> exits(Rule("confidence", 0.9), logits)
array([1, 0])
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdecouple._errors import require_int, require_one_of, require_type
from jdecouple.inference.logits import check_logits, check_numbers, scaled

NAMES = ("cosine", "confidence", "entropy", "margin")


@dataclasses.dataclass(frozen=True)
class Rule:
    """When an example leaves.

    >>> Rule("cosine", 0.8, patience=2).for_exits(3).thresholds
    (0.8, 0.8, 0.8)

    Attributes:
        name: One of `NAMES`.
        thresholds: What a score must exceed: of all exits, or of each. Nothing exceeds
            `math.inf`. That of the last exit is not looked at.
        patience: Number of exits in succession whose scores must be above their thresholds.
        temperatures: What logits are divided by before they are scored: of all exits, or of each.

    Raises:
        TypeError: A threshold or temperature is no number.
        ValueError: An unknown name, or a number that is not allowed.
    """

    name: str
    thresholds: float | tuple[float, ...]
    patience: int = 1
    temperatures: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        require_one_of(NAMES, name=self.name)
        require_int(1, patience=self.patience)
        thresholds = check_numbers("thresholds", self.thresholds, never=True)
        temperatures = check_numbers("temperatures", self.temperatures, positive=True)
        object.__setattr__(self, "thresholds", thresholds)
        object.__setattr__(self, "temperatures", temperatures)
        object.__setattr__(self, "patience", int(self.patience))

    def for_exits(self, count: int) -> "Rule":
        """The same rule with a threshold and a temperature for each of `count` exits.

        Raises:
            ValueError: It is one for another number of exits.
        """
        require_int(1, exits=count)
        return dataclasses.replace(
            self,
            thresholds=_for_each("thresholds", self.thresholds, count),
            temperatures=_for_each("temperatures", self.temperatures, count),
        )

    def to_json(self) -> dict[str, Any]:
        """The rule as `json` can write it: an infinite threshold is None.

        >>> Rule("margin", (0.5, math.inf)).to_json()
        {'name': 'margin', 'thresholds': [0.5, None], 'patience': 1, 'temperatures': 1.0}
        """
        content = dataclasses.asdict(self)
        for field in ("thresholds", "temperatures"):
            values = content[field]
            if isinstance(values, tuple):
                content[field] = [None if value == math.inf else value for value in values]
            elif values == math.inf:
                content[field] = None
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Rule":
        """The rule that `to_json` wrote.

        Raises:
            TypeError: It is no mapping, or holds no numbers where some are needed.
            ValueError: A key is missing or unknown, or a value is not allowed.
        """
        require_type(Mapping, rule=content)
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [str(key) for key in content if key not in known]
        if unknown or not {"name", "thresholds"} <= content.keys():
            raise ValueError(
                f"the rule has the keys {', '.join(map(str, content))}: name and thresholds are "
                f"needed, {' and '.join(known[2:])} are allowed"
            )
        given = content["thresholds"]
        many = isinstance(given, list | tuple)
        listed = [math.inf if value is None else value for value in (given if many else [given])]
        return cls(**{**content, "thresholds": listed if many else listed[0]})


def score(name: str, logits: jax.Array, previous: jax.Array | None = None) -> jax.Array:
    """How sure an exit is of every example.

    It is a pure function of device or NumPy arrays, and may be traced.

    >>> score("confidence", np.array([[0.0, 0.0]])).tolist()
    [0.5]

    Args:
        name: One of `NAMES`.
        logits: `[n, classes]`, with 2 classes or more.
        previous: Those of the exit before, which `cosine` alone reads; None at the first exit.

    Returns:
        Scores `[n]` in float32 (or wider, as the logits are). That of `cosine` is minus infinity
        where there is no exit before or its arg-max differs, and 0 where all logits are.

    Raises:
        ValueError: The name is unknown, or the shapes do not fit.
    """
    require_one_of(NAMES, name=name)
    logits = _floats(logits)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"logits have shape {list(logits.shape)}: [n, classes] with 2 classes is needed"
        )
    if name == "cosine":
        return _cosine(logits, previous)
    probabilities = jax.nn.softmax(logits, axis=-1)
    if name == "confidence":
        return jnp.max(probabilities, axis=-1)
    if name == "margin":
        highest, second = jnp.moveaxis(jax.lax.top_k(probabilities, 2)[0], -1, 0)
        return highest - second
    return -jnp.sum(jax.scipy.special.entr(probabilities), axis=-1) / math.log(logits.shape[1])


def leave(scores: Any, threshold: Any, streak: Any, patience: Any) -> tuple[Any, Any]:
    """Who leaves at an exit that is not the last, of device or of NumPy arrays.

    Args:
        scores: Of this exit, `[n]`.
        threshold: Of this exit.
        streak: For how many exits in succession, up to the one before, each score was above its
            threshold: integers `[n]`, 0 at first.
        patience: That of the rule.

    Returns:
        Whether each example leaves, `[n]`, and the new streak, `[n]`.
    """
    streak = (streak + 1) * (scores > threshold)
    return streak >= patience, streak


def exits(rule: Rule, logits: np.ndarray) -> np.ndarray:
    """Index of the exit that every example leaves at.

    Args:
        rule: When an example leaves.
        logits: Of all exits, `[exits, n, classes]`.

    Returns:
        Integers `[n]` from 0 to exits - 1.

    Raises:
        TypeError: The rule is none, or the logits are no numbers.
        ValueError: The rule is one for another number of exits, or the logits are not finite.
    """
    require_type(Rule, rule=rule)
    logits = check_logits(logits)
    rule = rule.for_exits(len(logits))
    return first_leaving(scores(rule, logits), np.asarray(rule.thresholds), rule.patience)


def scores(rule: Rule, logits: np.ndarray) -> np.ndarray:
    """Scores `[exits, n]` of checked logits `[exits, n, classes]`; those of the last are infinite.

    The thresholds of the rule, which is one for these exits, are not looked at.
    """
    now = scaled(logits, rule.temperatures)
    early = [score(rule.name, now[k], now[k - 1] if k else None) for k in range(len(now) - 1)]
    last = np.full(logits.shape[1], math.inf, np.float32)
    return np.stack([*map(np.asarray, early), last])


def first_leaving(scores: np.ndarray, thresholds: np.ndarray, patience: int) -> np.ndarray:
    """Index of the exit `[n]` that every example leaves at, from scores `[exits, n]`."""
    last = len(scores) - 1
    left = np.full(scores.shape[1], last)
    streak = np.zeros_like(left)
    for exit, threshold in enumerate(thresholds[:last].astype(np.float32)):
        leaves, streak = leave(scores[exit], threshold, streak, patience)
        left[leaves & (left == last)] = exit
    return left


def _for_each(field: str, values: float | tuple[float, ...], count: int) -> tuple[float, ...]:
    each = values if isinstance(values, tuple) else (values,) * count
    if len(each) != count:
        raise ValueError(
            f"the rule has {len(each)} {field}: one is needed for each of {count} exits"
        )
    return each


def _cosine(logits: jax.Array, previous: jax.Array | None) -> jax.Array:
    if previous is None:
        return jnp.full(logits.shape[0], -math.inf, logits.dtype)
    previous = _floats(previous)
    if previous.shape != logits.shape:
        raise ValueError(
            f"logits have shape {list(logits.shape)} and {list(previous.shape)} at the exit "
            "before: one shape is needed"
        )
    one, other = (_unit_length(values) for values in (logits, previous))
    cosine = jnp.clip(jnp.sum(one * other, axis=-1), -1, 1)
    same = jnp.argmax(logits, axis=-1) == jnp.argmax(previous, axis=-1)
    return jnp.where(same, cosine, -math.inf)


def _unit_length(values: jax.Array) -> jax.Array:
    """Rows of length 1; the largest entry is divided out first, since squares may overflow."""
    largest = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    # XLA multiplies by the reciprocal, which it takes for 0 where it is subnormal.
    factor = jnp.where(largest > 1, 0.125, 1.0)
    values = values * factor / jnp.where(largest > 0, largest * factor, 1)
    length = jnp.linalg.norm(values, axis=-1, keepdims=True)
    return values / jnp.where(length > 0, length, 1)


def _floats(values: Any) -> jax.Array:
    array = jnp.asarray(values)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
