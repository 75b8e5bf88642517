"""The search for thresholds that meet a wish on saved scores.

It lowers thresholds greedily, from ones that nothing exceeds, and they never rise again: an example
then never leaves later than before, and the mean cost falls from move to move. The thresholds of an
exit come from a grid of `LEVELS` quantiles of its scores. Each lies halfway between two scores, so
that a device which rounds otherwise moves no example across. A move lowers one exit to any lower
level, together with the `patience - 1` exits before it, without which nobody could leave there.

Every turn looks at all moves. Those that gain right answers come first, the largest gain before
others. Then comes the move that saves most cost for each answer it loses, among those that leave a
wished accuracy met. On the way to a wished cost, once that move reaches it, the one is taken which
loses least of all that reach it. What a move gains and saves is exact for a patience of 1 and an
estimate for more, so every state is counted anew, and a move that does not hold is taken back.

One threshold for all exits is tried too, at every quantile, and the best state that was seen wins.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jdecouple.inference.rules import first_leaving

LEVELS = 100

_BELOW_ALL = 1e-3  # from the lowest score to a threshold that all exceed
_NONE_LOST = 1e-9  # for a ratio above that of every move that loses an answer


class State(NamedTuple):
    """What thresholds lead to.

    Attributes:
        thresholds: `[exits]`; that of the last is infinite.
        hits: number of right answers.
        cost: mean cost of an example.
    """

    thresholds: np.ndarray
    hits: int
    cost: float


class Wish(NamedTuple):
    """What the answers of all examples together shall be: one of the two.

    Attributes:
        hits: the smallest number of right answers, or None.
        cost: the largest mean cost, or None.
    """

    hits: int | None
    cost: float | None

    def met(self, state: State) -> bool:
        """Whether a state will do."""
        if self.hits is not None:
            return state.hits >= self.hits
        return self.cost is None or state.cost <= self.cost

    def least_hits(self, state: State) -> int:
        """The smallest number of right answers that a move from `state` may lead to."""
        if self.hits is not None:
            return min(self.hits, state.hits + 1)
        return state.hits + 1 if self.met(state) else 0


def find(
    scores: np.ndarray, correct: np.ndarray, costs: np.ndarray, patience: int, wish: Wish
) -> State:
    """The best state that was found, or that which comes nearest, where none meets the wish.

    For an accuracy that is the cheapest state, and for a cost that with most right answers.

    Args:
        scores: `[exits, n]`; the last row is not looked at.
        correct: Whether each exit answers each example rightly, `[exits, n]`.
        costs: Of answering at each exit, `[exits]`, never falling.
        patience: That of the rule.
        wish: What shall be met.
    """
    every = np.arange(scores.shape[1])

    def count(thresholds: np.ndarray) -> State:
        left = first_leaving(scores, thresholds, patience)
        return State(thresholds, int(correct[left, every].sum()), mean_cost(left, costs))

    states = [count(np.full(len(scores), shared)) for shared in sweep(scores)]
    states += _lower(scores, correct, costs, patience, wish, count)
    met = [state for state in states if wish.met(state)]
    if (wish.hits is not None) == bool(met):
        return min(met or states, key=lambda state: (state.cost, -state.hits))
    return max(met or states, key=lambda state: (state.hits, -state.cost))


def sweep(scores: np.ndarray, levels: int = LEVELS) -> np.ndarray:
    """Falling thresholds for all exits together, from the scores `[exits, n]` of all but the last.

    Nothing exceeds the first; all finite scores exceed the last.
    """
    return grid(scores[:-1].ravel(), levels)


def grid(scores: np.ndarray, levels: int = LEVELS) -> np.ndarray:
    """Falling thresholds `[levels + 1]`; one more of `levels` equal parts exceeds each.

    Nothing exceeds the first; all finite scores exceed the last. Each lies between two scores if a
    float32 does, and else at the lower one.

    >>> [float(f"{value:.3f}") for value in grid(np.array([0.0, 1.0, 2.0, 3.0]), 2)]
    [inf, 1.5, -0.001]
    """
    thresholds = np.full(levels + 1, np.inf, np.float32)
    finite = np.sort(scores[np.isfinite(scores)].astype(np.float32))[::-1]
    if len(finite):
        distinct = np.unique(finite)
        last = -(-np.arange(1, levels + 1) * len(finite) // levels) - 1  # that exceeds each
        place = np.searchsorted(distinct, finite[last])
        upper = distinct[place]
        lower = np.where(place > 0, distinct[place - 1], distinct[0] - 2 * _BELOW_ALL)
        middle = ((lower.astype(np.float64) + upper) / 2).astype(np.float32)
        thresholds[1:] = np.where(middle < upper, middle, lower)
    return thresholds


def mean_cost(left: np.ndarray, costs: np.ndarray) -> float:
    """Mean cost of examples that leave at exits `[n]`: exactly that of one exit if all do there."""
    shares = np.bincount(left, minlength=len(costs)) / len(left)
    return float(np.sum(shares * costs))


def _lower(
    scores: np.ndarray,
    correct: np.ndarray,
    costs: np.ndarray,
    patience: int,
    wish: Wish,
    count: Callable[[np.ndarray], State],
) -> Iterator[State]:
    """The states on the way down from thresholds that nothing exceeds."""
    exits = np.arange(len(scores))
    last = exits[-1]
    if patience > last:
        return
    grids = np.stack([*map(grid, scores[:last]), np.full(LEVELS + 1, np.inf, np.float32)])
    # Level from which on an example is above the threshold; one beyond all where it never is.
    needed = np.stack([np.searchsorted(-grids[k], -scores[k], side="right") for k in exits[:last]])
    levels = np.zeros_like(exits)
    bans = np.full((last + 1 - patience, 1), LEVELS + 1)  # of moves that do not hold
    state = count(grids[exits, levels])
    while True:
        left = first_leaving(scores, state.thresholds, patience)
        gains, savings = _moves(needed, levels, left, correct, costs, patience)
        least = wish.least_hits(state)
        allowed = (state.hits + gains >= least) & ((gains > 0) | (savings > 0))
        allowed &= np.arange(1, LEVELS + 1) < bans
        if not allowed.any():
            return
        reached = -np.inf if wish.cost is None else (state.cost - wish.cost) * len(left)
        row, column = np.unravel_index(_best(gains, savings, allowed, reached), allowed.shape)
        lowered = levels.copy()
        window = slice(row, row + patience)
        lowered[window] = np.maximum(levels[window], column + 1)
        after = count(grids[exits, lowered])
        if after.hits < least:
            bans[row] = column + 1
            continue
        levels, state = lowered, after
        yield state


def _moves(
    needed: np.ndarray,
    levels: np.ndarray,
    left: np.ndarray,
    correct: np.ndarray,
    costs: np.ndarray,
    patience: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Right answers that every move gains, and summed cost that it saves.

    Both are `[windows, LEVELS]`: of `patience` exits in succession, lowered to level 1 and more.
    """
    early = len(needed)
    waiting = np.where(needed > levels[:early, None], needed, 0)
    windows = early + 1 - patience
    until = np.max([waiting[k : k + windows] for k in range(patience)], axis=0)
    exits = np.arange(patience - 1, early)[:, None]
    later = left > exits
    gained = correct[exits[:, 0]].astype(np.int64) - correct[left, np.arange(len(left))]
    saved = costs[left] - costs[exits]
    bins = (until + np.arange(windows)[:, None] * (LEVELS + 2)).ravel()

    def summed(values: np.ndarray) -> np.ndarray:
        sums = np.bincount(bins, (values * later).ravel(), windows * (LEVELS + 2))
        return sums.reshape(windows, LEVELS + 2).cumsum(axis=1)[:, 1:-1]

    return summed(gained), summed(saved)


def _best(gains: np.ndarray, savings: np.ndarray, allowed: np.ndarray, reached: float) -> np.intp:
    """Flat index of the move to take, of those that are allowed.

    A move that saves `reached` ends the way to a wished cost.
    """
    if (allowed & (gains > 0)).any():
        allowed = allowed & (gains == gains[allowed].max())
        return np.argmax(np.where(allowed, savings, -1))
    ratios = np.where(allowed, savings / np.maximum(-gains, _NONE_LOST), -1)
    best = np.argmax(ratios)
    if savings.flat[best] >= reached > 0:
        return np.argmax(np.where(allowed & (savings >= reached), gains, -np.inf))
    return best
