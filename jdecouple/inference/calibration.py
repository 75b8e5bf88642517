"""What a rule of leaving early costs and answers, thresholds for a wish, and temperatures.

All of it works on saved logits `[exits, n, classes]` and labels `[n]`. Of what is chosen on them,
other examples of the same kind give the same only on average.
"""

import math
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from jdecouple._errors import require_int, require_number, require_type
from jdecouple.inference import rules
from jdecouple.inference.logits import (
    check_labels,
    check_logits,
    check_numbers,
    log_probabilities,
    scaled,
)
from jdecouple.inference.rules import Rule
from jdecouple.inference.search import Wish, find, mean_cost, sweep

HOTTEST = 20.0
"""The largest temperature; its reciprocal is the smallest."""

_HALVINGS = 32  # of the range of log(temperature), from 6 to 1e-9


class Outcome(NamedTuple):
    """What a rule does with labelled examples.

    Attributes:
        accuracy: fraction of right answers.
        cost: mean cost of an example, in the unit of the costs that were given.
        shares: fraction of the examples that leaves at each exit, `[exits]`.
    """

    accuracy: float
    cost: float
    shares: np.ndarray


def temperatures(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Temperature of every exit that makes the labels most likely (Guo et al., arXiv 1706.04599).

    The mean negative log likelihood of `logits / temperature` is convex in the reciprocal of the
    temperature; the zero of its slope is found by bisection. Where there is none, as for an exit
    that is always right, the temperature is the bound: `HOTTEST` or its reciprocal. It is 1 where
    nothing depends on it, because the classes of an example all have the same logit.

    Args:
        logits: Of all exits, `[exits, n, classes]`.
        labels: Classes `[n]`.

    Returns:
        Temperatures `[exits]`, for validation examples: they are fitted to these.

    Raises:
        TypeError: Logits are no numbers or labels no integers.
        ValueError: Shapes do not fit, or a value is not allowed; there is no example.
    """
    logits = check_logits(logits, least=1)
    labels = check_labels(labels, logits)
    return np.array([_temperature(exit.astype(np.float64), labels) for exit in logits])


def _temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    true = logits[np.arange(len(labels)), labels]

    def slope(log_temperature: float) -> float:
        """That of the loss by the reciprocal of the temperature; it falls with the argument."""
        weights = np.exp(log_probabilities(logits * math.exp(-log_temperature)))
        return float(np.mean(np.sum(weights * logits, axis=-1) - true))

    if np.all(logits == logits[:, :1]):
        return 1.0
    bound = math.log(HOTTEST)
    low, high = -bound, bound
    if slope(low) <= 0:
        return 1 / HOTTEST
    if slope(high) >= 0:
        return HOTTEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return math.exp((low + high) / 2)


def expected_calibration_error(
    logits: np.ndarray, labels: np.ndarray, *, temperatures: Any = 1.0, bins: int = 15
) -> np.ndarray:
    """Expected calibration error of every exit (Guo et al., arXiv 1706.04599, equation 3).

    The examples are put into bins of equal width by the largest probability; a bin holds its upper
    end. The error is the mean, over all examples, of the distance between the accuracy and the
    mean largest probability of their bin.

    Args:
        logits: Of all exits, `[exits, n, classes]`.
        labels: Classes `[n]`.
        temperatures: What the logits are divided by: of all exits, or of each.
        bins: Number of bins; 15 in the paper.

    Returns:
        Errors `[exits]`, from 0 to 1.

    Raises:
        TypeError: Logits or temperatures are no numbers, or labels no integers.
        ValueError: Shapes do not fit, or a value is not allowed; there is no example.
    """
    require_int(1, bins=bins)
    logits = check_logits(logits, least=1)
    labels = check_labels(labels, logits)
    errors = []
    for exit in scaled(logits, temperatures):
        surest = np.exp(log_probabilities(exit).max(axis=-1))
        correct = exit.argmax(axis=-1) == labels
        place = np.clip(np.ceil(surest * bins).astype(np.int64) - 1, 0, bins - 1)
        gaps = np.bincount(place, correct - surest, bins)
        errors.append(np.abs(gaps).sum() / len(labels))
    return np.array(errors)


def outcome(rule: Rule, logits: np.ndarray, labels: np.ndarray, costs: Any) -> Outcome:
    """Accuracy and mean cost of a rule.

    Args:
        rule: When an example leaves.
        logits: Of all exits, `[exits, n, classes]`.
        labels: Classes `[n]`.
        costs: Of answering at each exit, that of the exits before it included, `[exits]`:
            floating-point operations, seconds, or any other measure.

    Raises:
        TypeError: The rule is none, logits or costs are no numbers, or labels no integers.
        ValueError: Shapes do not fit, or a value is not allowed; there is no example.
    """
    require_type(Rule, rule=rule)
    logits, labels, costs = _check(logits, labels, costs)
    left = rules.exits(rule, logits)
    answers = logits.argmax(axis=-1)[left, np.arange(len(labels))]
    shares = np.bincount(left, minlength=len(costs)) / len(labels)
    return Outcome(float(np.mean(answers == labels)), mean_cost(left, costs), shares)


def choose(
    name: str,
    logits: np.ndarray,
    labels: np.ndarray,
    costs: Any,
    *,
    accuracy: float | None = None,
    cost: float | None = None,
    patience: int = 1,
    temperatures: Any = 1.0,
) -> Rule:
    """A rule whose thresholds meet a wish on these examples.

    With `accuracy` it is one that costs little, with `cost` one that answers well; the wish itself
    is always met. `jdecouple.inference.search` describes the search, which is greedy and monotone.

    Args:
        name: One of `rules.NAMES`.
        logits: Of all exits, `[exits, n, classes]`, from validation examples.
        labels: Classes `[n]`.
        costs: Of answering at each exit, that of the exits before it included, `[exits]`.
        accuracy: The smallest fraction of right answers, or
        cost: the largest mean cost, in the unit of `costs`.
        patience: That of the rule.
        temperatures: What the rule divides logits by: of all exits, or of each.

    Returns:
        A rule with a threshold for each exit.

    Raises:
        TypeError: Logits or costs are no numbers, or labels no integers.
        ValueError: Shapes do not fit, or a value is not allowed; there is no example; there are two
            wishes or none; or the wish cannot be met, with what can.
    """
    if (accuracy is None) == (cost is None):
        raise ValueError(
            f"accuracy is {accuracy} and cost is {cost}: one of them is needed, and not both"
        )
    logits, labels, costs = _check(logits, labels, costs)
    rule = Rule(name, math.inf, patience, temperatures).for_exits(len(logits))
    correct = logits.argmax(axis=-1) == labels
    hits = None if accuracy is None else _least_hits(accuracy, len(labels))
    if cost is not None:
        require_number(cost=cost)
    wish = Wish(hits, cost)
    state = find(rules.scores(rule, logits), correct, costs, rule.patience, wish)
    if not wish.met(state):
        found = f"the lowest mean cost is {state.cost}"
        if cost is None:
            found = f"{state.hits / len(labels)} at a mean cost of {state.cost} is the best found"
        asked = f"accuracy {accuracy}" if cost is None else f"cost {cost}"
        raise ValueError(f"{asked} cannot be met by {name} with patience {patience}: {found}")
    return Rule(name, tuple(map(float, state.thresholds)), rule.patience, rule.temperatures)


def _least_hits(accuracy: float, count: int) -> int:
    """The smallest number of right answers, of `count`, that is such a fraction."""
    require_type(Real, accuracy=accuracy)
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy is {accuracy}: a fraction from 0 to 1 is needed")
    hits = math.floor(accuracy * count)  # which may be rounded, one way or the other
    return next(h for h in (hits - 1, hits, hits + 1) if h / count >= accuracy)


def curves(
    logits: np.ndarray,
    labels: np.ndarray,
    costs: Any,
    *,
    patience: int = 1,
    temperatures: Any = 1.0,
    levels: int = 50,
) -> dict[str, np.ndarray]:
    """Accuracy against mean cost.

    Args:
        logits: Of all exits, `[exits, n, classes]`.
        labels: Classes `[n]`.
        costs: Of answering at each exit, that of the exits before it included, `[exits]`.
        patience: That of the rules.
        temperatures: What the logits are divided by: of all exits, or of each.
        levels: Number of thresholds, quantiles of the scores, at which a rule is measured.

    Returns:
        Pairs `[points, 2]` of a mean cost and an accuracy. Every rule has those of one threshold
        for all exits, from one that nobody exceeds to one that all do, "exits" those of every exit
        alone, "ensemble" those of the mean of the logits of every exit and the exits before it.

    Raises:
        TypeError: Logits or costs are no numbers, or labels no integers.
        ValueError: Shapes do not fit, or a value is not allowed; there is no example.
    """
    require_int(1, levels=levels)
    logits, labels, costs = _check(logits, labels, costs)
    correct = logits.argmax(axis=-1) == labels
    every = np.arange(len(labels))
    found = {}
    for name in rules.NAMES:
        rule = Rule(name, math.inf, patience, temperatures).for_exits(len(logits))
        scores = rules.scores(rule, logits)
        points = []
        for threshold in sweep(scores, levels):
            left = rules.first_leaving(scores, np.full(len(logits), threshold), rule.patience)
            points.append((mean_cost(left, costs), correct[left, every].mean()))
        found[name] = np.array(points)
    counts = np.arange(1, len(logits) + 1).reshape(-1, 1, 1)
    means = np.cumsum(scaled(logits, temperatures), axis=0, dtype=np.float64) / counts
    found["exits"] = np.stack([costs, correct.mean(axis=1)], axis=1)
    found["ensemble"] = np.stack([costs, (means.argmax(-1) == labels).mean(axis=1)], axis=1)
    return found


def _check(
    logits: np.ndarray, labels: np.ndarray, costs: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All three, checked."""
    logits = check_logits(logits, least=1)
    labels = check_labels(labels, logits)
    checked = check_numbers("costs", costs)
    if not isinstance(checked, tuple) or len(checked) != len(logits):
        given = len(checked) if isinstance(checked, tuple) else "no"
        raise ValueError(f"there are {given} costs: one is needed for each of {len(logits)} exits")
    if min(checked) < 0 or list(checked) != sorted(checked):
        raise ValueError(
            f"costs are {list(checked)}: numbers of at least 0 that never fall are needed, each "
            "with those of the exits before it"
        )
    return logits, labels, np.array(checked)
