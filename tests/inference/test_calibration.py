"""Temperatures, calibration errors, and thresholds that meet a wish."""

import itertools
import math

import numpy as np
import pytest

from jdecouple.inference import calibration, rules, search
from jdecouple.inference.rules import Rule

EXITS, COUNT, CLASSES = 4, 400, 5
COSTS = [1.0, 2.0, 4.0, 5.0]
RULES = pytest.mark.parametrize("name", rules.NAMES)
PATIENCE = pytest.mark.parametrize("patience", [1, 2])


def saved(seed: int = 0, count: int = COUNT, depth: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose exits agree with one another, and with the labels more from exit to exit."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    true = np.eye(CLASSES)[labels] * rng.uniform(0, 3, (count, 1))
    noise = rng.normal(size=(EXITS, count, CLASSES))
    steps = np.arange(1, EXITS + 1)[:, None, None] ** depth
    return (true * steps + np.cumsum(noise, axis=0) / steps).astype(np.float32), labels


LOGITS, LABELS = saved()
CORRECT = LOGITS.argmax(-1) == LABELS


def drawn(logits: np.ndarray, seed: int = 0) -> np.ndarray:
    """Labels drawn with the probabilities of the logits, so that these are calibrated."""
    weights = np.exp(logits.astype(np.float64))
    cumulative = np.cumsum(weights / weights.sum(-1, keepdims=True), axis=-1)
    place = np.random.default_rng(seed).random((len(logits), 1))
    return np.minimum((place > cumulative).sum(axis=-1), logits.shape[-1] - 1)


def mean_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    exact = logits.astype(np.float64)
    shift = exact.max(-1, keepdims=True)
    log_sums = np.log(np.exp(exact - shift).sum(-1)) + shift[..., 0]
    return float(np.mean(log_sums - exact[np.arange(len(labels)), labels]))


# --- temperatures ---------------------------------------------------------------------------------


def test_temperature_is_that_by_which_calibrated_logits_were_multiplied():
    logits = np.random.default_rng(1).normal(size=(20_000, 4)).astype(np.float32) * 2
    labels = drawn(logits)
    found = calibration.temperatures(np.stack([logits, 3 * logits, logits / 4]), labels)
    np.testing.assert_allclose(found, [1, 3, 0.25], rtol=0.03)
    np.testing.assert_allclose(found / found[0], [1, 3, 0.25], rtol=1e-6)


def test_temperature_makes_labels_likelier_than_any_other_does():
    found = calibration.temperatures(LOGITS, LABELS)
    for exit, temperature in zip(LOGITS.astype(np.float64), found, strict=True):
        least = mean_loss(exit / temperature, LABELS)
        others = [1, *(temperature * factor for factor in (0.5, 0.99, 1.01, 2))]
        assert all(least <= mean_loss(exit / other, LABELS) for other in others)


@pytest.mark.parametrize(
    ("logits", "labels", "wanted"),
    [
        ([[2, 0], [0, 1]], [0, 1], 1 / calibration.HOTTEST),  # always right
        ([[2, 0], [0, 1]], [1, 0], calibration.HOTTEST),  # always wrong
        ([[3, 3], [0, 0]], [0, 1], 1),  # all alike
        ([[3e38, -3e38]], [0], 1 / calibration.HOTTEST),  # one example, huge
        ([[math.log(3), 0]] * 4, [0, 0, 0, 1], 1),  # three of four are what 3 to 1 says
        ([[math.log(9), 0]] * 4, [0, 0, 0, 1], 2),
    ],
)
def test_temperature_by_hand(logits, labels, wanted):
    np.testing.assert_allclose(calibration.temperatures([logits], labels), [wanted], rtol=1e-6)


# --- expected calibration error -------------------------------------------------------------------


def test_error_by_hand():
    """Four answers of probability 0.75, of which 2 are right, and one of 0.9, which is."""
    surer = [[math.log(3), 0]] * 4 + [[math.log(9), 0]]
    error = calibration.expected_calibration_error([surer], [0, 0, 1, 1, 0])
    np.testing.assert_allclose(error, [(4 * 0.25 + 1 * 0.1) / 5], rtol=1e-6)
    together = calibration.expected_calibration_error([surer], [0, 0, 1, 1, 0], bins=1)
    np.testing.assert_allclose(together, [abs(3 - 3.9) / 5], rtol=1e-6)


def test_error_of_calibrated_logits_is_small_and_grows_with_confidence():
    logits = np.random.default_rng(1).normal(size=(20_000, 4)).astype(np.float32) * 2
    labels = drawn(logits)
    scales = np.stack([logits, 3 * logits])
    calm, sure = calibration.expected_calibration_error(scales, labels)
    assert calm < 0.01 < 0.1 < sure
    cooled = calibration.expected_calibration_error(scales, labels, temperatures=(1, 3))
    np.testing.assert_allclose(cooled, [calm, calm], rtol=1e-3)


def test_error_of_certain_answers_is_their_error():
    logits = [[[3e38, -3e38], [3e38, -3e38], [-3e38, 3e38], [3e38, -3e38]]]
    assert calibration.expected_calibration_error(logits, [0, 0, 1, 1]).tolist() == [0.25]


# --- outcomes and curves --------------------------------------------------------------------------


def test_outcome_by_hand():
    """The first of three examples leaves early, and the third is wrong."""
    logits = [[[9, 0], [1, 0], [1, 0]], [[9, 0], [0, 9], [9, 0]]]
    found = calibration.outcome(Rule("confidence", 0.9), logits, [0, 1, 1], [1, 4])
    assert (found.accuracy, found.cost) == (2 / 3, 3)
    np.testing.assert_allclose(found.shares, [1 / 3, 2 / 3])


@RULES
def test_a_curve_is_what_its_thresholds_lead_to(name):
    curves = calibration.curves(LOGITS, LABELS, COSTS, levels=10)
    scores = rules.scores(Rule(name, 0), LOGITS)
    assert (np.diff(curves[name][:, 0]) <= 0).all()
    for point, threshold in zip(curves[name], search.sweep(scores, 10), strict=True):
        found = calibration.outcome(Rule(name, float(threshold)), LOGITS, LABELS, COSTS)
        np.testing.assert_allclose(point, [found.cost, found.accuracy], rtol=1e-12)
    assert curves[name][0].tolist() == [COSTS[-1], CORRECT[-1].mean()]
    first = 0 if name != "cosine" else 1
    assert curves[name][-1, 0] >= COSTS[first]


def test_curves_of_exits_and_of_their_mean():
    curves = calibration.curves(LOGITS, LABELS, COSTS, levels=1)
    assert curves["exits"].tolist() == [*map(list, zip(COSTS, CORRECT.mean(1), strict=True))]
    for k in range(EXITS):
        answers = LOGITS[: k + 1].astype(np.float64).mean(axis=0).argmax(-1)
        assert curves["ensemble"][k].tolist() == [COSTS[k], (answers == LABELS).mean()]


# --- thresholds for a wish ------------------------------------------------------------------------


@RULES
@PATIENCE
def test_an_accuracy_is_met_at_no_more_than_the_cost_of_one_shared_threshold(name, patience):
    curve = calibration.curves(LOGITS, LABELS, COSTS, patience=patience, levels=search.LEVELS)[name]
    costs = []
    for lost in (0, 0.01, 0.05, 0.2):
        wish = CORRECT[-1].mean() - lost
        rule = calibration.choose(name, LOGITS, LABELS, COSTS, accuracy=wish, patience=patience)
        found = calibration.outcome(rule, LOGITS, LABELS, COSTS)
        assert rule.patience == patience
        assert found.accuracy >= wish
        assert found.cost <= curve[curve[:, 1] >= wish, 0].min()
        costs.append(found.cost)
    assert costs[0] >= costs[-1]
    assert costs[-1] < COSTS[-1]


@RULES
@PATIENCE
def test_a_cost_is_met_with_no_fewer_right_answers_than_one_shared_threshold(name, patience):
    curve = calibration.curves(LOGITS, LABELS, COSTS, patience=patience, levels=search.LEVELS)[name]
    for wish in (COSTS[-1], 4.5, curve[-1, 0] + 0.1, curve[-1, 0]):
        rule = calibration.choose(name, LOGITS, LABELS, COSTS, cost=wish, patience=patience)
        found = calibration.outcome(rule, LOGITS, LABELS, COSTS)
        assert found.cost <= wish
        assert found.accuracy >= curve[curve[:, 0] <= wish, 1].max()


@pytest.mark.parametrize("seed", range(12))
def test_the_search_comes_near_the_best_of_all_thresholds(seed):
    """Of every threshold at every exit, tried out on 12 examples of three exits."""
    logits, labels = (part[:3] if part.ndim == 3 else part for part in saved(seed, 12))
    costs, correct = np.array([1.0, 2.0, 4.0]), logits.argmax(-1) == labels
    scores = rules.scores(Rule("margin", 0), logits)
    grids = [search.grid(row, 12) for row in scores[:2]]
    every = np.arange(12)
    points = []
    for pair in itertools.product(*grids):
        left = rules.first_leaving(scores, np.array([*pair, np.inf]), 1)
        points.append((correct[left, every].mean(), costs[left].mean()))
    best = max(accuracy for accuracy, _ in points)
    for wish in (best, correct[-1].mean(), correct[-1].mean() - 0.1):
        rule = calibration.choose("margin", logits, labels, costs, accuracy=wish)
        found = calibration.outcome(rule, logits, labels, costs)
        cheapest = min(cost for accuracy, cost in points if accuracy >= wish)
        assert found.accuracy >= wish
        assert cheapest - 1e-9 <= found.cost <= 1.25 * cheapest


@pytest.mark.parametrize("patience", [1, 2, 3, 4, 9])
def test_any_patience(patience):
    wish = CORRECT[-1].mean() - 0.1
    rule = calibration.choose("margin", LOGITS, LABELS, COSTS, accuracy=wish, patience=patience)
    found = calibration.outcome(rule, LOGITS, LABELS, COSTS)
    assert found.accuracy >= wish
    assert (found.cost == COSTS[-1]) == (patience >= EXITS)
    assert found.shares[: min(patience, EXITS) - 1].sum() == 0


def test_the_search_uses_an_exit_that_is_better_than_the_last():
    """The second exit alone is always right."""
    logits = np.stack([LOGITS[0], 4 * np.eye(CLASSES)[LABELS], LOGITS[2], LOGITS[3]])
    rule = calibration.choose("confidence", logits, LABELS, COSTS, accuracy=1)
    found = calibration.outcome(rule, logits, LABELS, COSTS)
    assert found.accuracy == 1
    assert found.cost <= COSTS[1]


def test_temperatures_are_those_of_the_rule():
    heat = calibration.temperatures(LOGITS, LABELS)
    rule = calibration.choose(
        "confidence", LOGITS, LABELS, COSTS, cost=3, patience=1, temperatures=heat
    )
    assert rule.temperatures == tuple(heat)
    assert calibration.outcome(rule, LOGITS, LABELS, COSTS).cost <= 3


@pytest.mark.parametrize("name", ["cosine", "margin"])
def test_one_example(name):
    example, right = (LOGITS[:, :1], LABELS[:1]), float(CORRECT[-1, 0])
    one = calibration.choose(name, *example, COSTS, accuracy=right)
    assert calibration.outcome(one, *example, COSTS).accuracy >= right


@RULES
def test_one_exit_and_examples_all_alike(name):
    only = calibration.choose(name, LOGITS[-1:], LABELS, [7], cost=7)
    assert calibration.outcome(only, LOGITS[-1:], LABELS, [7]).cost == 7
    alike = np.repeat(LOGITS[:, :1], COUNT, axis=1)
    labels = alike[-1].argmax(-1)
    rule = calibration.choose(name, alike, labels, COSTS, accuracy=1)
    assert calibration.outcome(rule, alike, labels, COSTS).shares.max() == 1


@pytest.mark.parametrize("scores", [[0.5] * 9, [1, 1, 2, 2, 2, 3], [-math.inf, 0.25, -math.inf]])
def test_thresholds_of_a_grid_split_ties_nowhere(scores):
    row = np.array(scores, np.float32)
    grid = search.grid(row, 4)
    above = (row > grid[:, None]).sum(axis=1)
    finite = np.isfinite(row).sum()
    assert above[0] == 0
    assert above[-1] == finite
    assert (above >= np.arange(5) * finite / 4).all()
    assert (np.diff(grid) <= 0).all()
    assert not np.isin(grid, row).any()


def test_thresholds_part_neighbours_of_float32():
    low = np.float32(0.7)
    row = np.array([low, np.nextafter(low, np.float32(1))])
    assert search.grid(row, 2)[1] == low


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({}, "accuracy is None and cost is None: one of them is needed, and not both"),
        ({"accuracy": 0.5, "cost": 2}, "accuracy is 0.5 and cost is 2: one of them"),
        ({"accuracy": 98}, "accuracy is 98: a fraction from 0 to 1 is needed"),
        ({"accuracy": math.nan}, "accuracy is nan: a fraction"),
        ({"accuracy": "high"}, "accuracy is a str: a numbers Real is needed"),
        ({"cost": -1}, "cost is -1: a finite number of at least 0 is needed"),
        ({"cost": 0.5}, "cost 0.5 cannot be met by margin with patience 1: the lowest .* is 1.0$"),
        ({"accuracy": 1}, "accuracy 1 cannot be met by margin with patience 1: 0.9.* is the best"),
        ({"cost": 2, "patience": 0}, "patience is 0: a whole number of at least 1"),
        ({"cost": 2, "temperatures": (1, 2)}, "the rule has 2 temperatures: one is needed for"),
        ({"cost": 2, "temperatures": -1}, "temperatures hold -1.0: finite numbers above 0"),
    ],
)
def test_wishes_that_cannot_be_met_get_one_line(wish, message):
    with pytest.raises((TypeError, ValueError), match=message) as error:
        calibration.choose("margin", LOGITS, LABELS, COSTS, **wish)
    assert "\n" not in str(error.value)


def test_what_cannot_be_met_names_what_can():
    with pytest.raises(ValueError, match="the best found") as error:
        calibration.choose("margin", LOGITS, LABELS, COSTS, accuracy=1)
    best = float(str(error.value).split(": ")[1].split()[0])
    rule = calibration.choose("margin", LOGITS, LABELS, COSTS, accuracy=best)
    assert calibration.outcome(rule, LOGITS, LABELS, COSTS).accuracy == best


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": LABELS[:-1]}, r"labels have shape \[399\]: \[400\] is needed"),
        ({"labels": LABELS + 1}, "label .* is 5: a class from 0 to 4 is needed"),
        ({"labels": LABELS.astype(float)}, "labels are of dtype float64: integers are needed"),
        ({"logits": LOGITS[:, :0], "labels": LABELS[:0]}, "logits hold 0 examples: at least 1"),
        ({"logits": np.where(LOGITS > 5, np.nan, LOGITS)}, "logits are nan at exit"),
        ({"costs": COSTS[:3]}, "there are 3 costs: one is needed for each of 4 exits"),
        ({"costs": 1.0}, "there are no costs: one is needed for each of 4 exits"),
        ({"costs": [1, 3, 2, 4]}, "costs are .*: numbers of at least 0 that never fall"),
        ({"costs": [1, 2, 3, math.nan]}, "costs hold nan: finite numbers are needed"),
    ],
)
def test_bad_examples_get_one_line(change, message):
    given = {"logits": LOGITS, "labels": LABELS, "costs": COSTS, **change}
    rule = Rule("margin", 0.5)
    for call in (
        lambda: calibration.outcome(rule, **given),
        lambda: calibration.choose("margin", **given, cost=3),
        lambda: calibration.curves(**given),
    ):
        with pytest.raises((TypeError, ValueError), match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_quotient_beyond_float32_gets_one_line():
    with pytest.raises(ValueError, match=r"beyond float32 when divided by the temperature 0\.05"):
        calibration.expected_calibration_error([[[3e38, 0]]], [0], temperatures=0.05)
