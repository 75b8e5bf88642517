"""Rules of leaving early, against formulas in NumPy that share no line with them."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdecouple.inference import rules
from jdecouple.inference.rules import Rule

EXITS, COUNT, CLASSES = 6, 64, 5
RNG = np.random.default_rng(0)
TRUTH = RNG.normal(size=(1, COUNT, CLASSES))
LOGITS = np.cumsum(TRUTH + RNG.normal(size=(EXITS, COUNT, CLASSES)), axis=0).astype(np.float32)
"""Exits that grow surer with depth, and often agree."""
THRESHOLDS = {"cosine": 0.8, "confidence": 0.9, "entropy": -0.3, "margin": 0.7}
EACH = pytest.mark.parametrize("name", rules.NAMES)


def by_hand(name: str, now: list[float], before: list[float] | None) -> float:
    """The score of one example in double precision, class by class."""
    total = sum(math.exp(z - max(now)) for z in now)
    p = [math.exp(z - max(now)) / total for z in now]
    if name == "confidence":
        return max(p)
    if name == "entropy":
        return sum(q * math.log(q) for q in p if q > 0) / math.log(len(p))
    if name == "margin":
        second, first = sorted(p)[-2:]
        return first - second
    if before is None or now.index(max(now)) != before.index(max(before)):
        return -math.inf
    dot = sum(a * b for a, b in zip(now, before, strict=True))
    return dot / math.hypot(*now) / math.hypot(*before)


def leaves_at(rule: Rule, logits: np.ndarray) -> list[int]:
    """The exit of every example, one after the other."""
    rule = rule.for_exits(len(logits))
    left = []
    for example in logits.astype(np.float64).transpose(1, 0, 2).tolist():
        rows = [[z / t for z in row] for row, t in zip(example, rule.temperatures, strict=True)]
        surer = 0
        for exit, row in enumerate(rows):
            score = by_hand(rule.name, row, rows[exit - 1] if exit else None)
            surer = surer + 1 if score > rule.thresholds[exit] else 0
            if surer >= rule.patience or exit == len(rows) - 1:
                left.append(exit)
                break
    return left


@EACH
def test_score_is_the_formula_on_the_host_and_traced(name):
    """Of NumPy arrays and inside a compiled function."""
    traced = jax.jit(lambda now, before: rules.score(name, now, before))
    for exit in range(1, EXITS):
        now, before = LOGITS[exit], LOGITS[exit - 1]
        wanted = [by_hand(name, *rows) for rows in zip(now.tolist(), before.tolist(), strict=True)]
        np.testing.assert_allclose(rules.score(name, now, before), wanted, rtol=2e-6, atol=2e-7)
        np.testing.assert_allclose(traced(now, before), wanted, rtol=2e-6, atol=2e-7)


@EACH
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_exits_are_the_rule(name, patience):
    rule = Rule(name, THRESHOLDS[name], patience)
    left = rules.exits(rule, LOGITS)
    assert left.tolist() == leaves_at(rule, LOGITS)
    assert len(set(left.tolist())) > 1  # else the comparison says little


@EACH
def test_thresholds_and_temperatures_belong_to_their_exit(name):
    low = THRESHOLDS[name]
    rule = Rule(name, (low, math.inf, low - 0.1, 0, 9, 9), temperatures=(0.5, 1, 2, 3, 1, 1))
    left = rules.exits(rule, LOGITS)
    assert left.tolist() == leaves_at(rule, LOGITS)
    assert 1 not in left


@EACH
@pytest.mark.parametrize("patience", [1, 2])
def test_a_higher_threshold_never_leaves_earlier(name, patience):
    before = np.zeros(COUNT)
    for threshold in np.linspace(-1.1, 1.1, 23):
        left = rules.exits(Rule(name, threshold, patience), LOGITS)
        assert (left >= before).all()
        before = left
    assert (before == EXITS - 1).all()


def test_more_patience_never_leaves_earlier():
    left = [rules.exits(Rule("margin", 0.3, patience), LOGITS) for patience in (1, 2, 3, 4, 99)]
    assert all((later >= earlier).all() for earlier, later in itertools.pairwise(left))
    assert (left[-1] == EXITS - 1).all()


def test_a_miss_sets_the_count_back():
    """Confident, not, confident, confident, confident: the second in a row is the exit at 3."""
    sure, unsure = [9.0, 0.0], [0.1, 0.0]
    logits = np.array([sure, unsure, sure, sure, sure])[:, None]
    assert rules.exits(Rule("confidence", 0.9, patience=2), logits).tolist() == [3]


def test_cosine_asks_the_exit_before():
    first, agrees, differs = [2.0, 1.0, 0.0], [4.0, 2.0, 0.0], [2.0, 2.1, 0.0]
    logits = np.array([[first, first], [agrees, differs], [agrees, differs]])
    assert rules.exits(Rule("cosine", 0.8), logits).tolist() == [1, 2]
    assert rules.exits(Rule("cosine", -2.0), logits[:1]).tolist() == [0, 0]  # the only exit
    high = rules.score("cosine", logits[1], logits[0])
    np.testing.assert_allclose(high, [1, -math.inf], rtol=1e-6)
    assert float(high[0]) <= 1


@pytest.mark.parametrize("scale", [1e-30, 1e30, 3e38])
def test_cosine_of_huge_and_tiny_logits(scale):
    now = np.float32(scale) * np.array([[1.0, 0.5], [1.0, -1.0]], np.float32)
    before = np.array([[1.0, 0.5], [1.0, -0.5]], np.float32)
    wanted = [1, by_hand("cosine", [1, -1], [1, -0.5])]
    np.testing.assert_allclose(rules.score("cosine", now, before), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "even", "huge"),
    [("confidence", 0.5, 1), ("entropy", -1, 0), ("margin", 0, 1), ("cosine", 0, 1)],
)
def test_two_classes_all_alike_and_huge(name, even, huge):
    """Zeros are the least sure answer, and logits at the end of float32 the surest."""
    alike, far = np.zeros((1, 2), np.float32), np.array([[3e38, -3e38]], np.float32)
    np.testing.assert_allclose(rules.score(name, alike, alike), [even], atol=1e-6)
    np.testing.assert_allclose(rules.score(name, far, far), [huge], atol=1e-6)
    assert rules.exits(Rule(name, even + 1e-4), np.stack([alike] * 3)).tolist() == [2]
    assert rules.exits(Rule(name, even - 1e-4), np.stack([alike] * 3)).tolist() == [
        int(name == "cosine")
    ]


def test_ties_are_not_above_and_the_first_class_answers():
    tied = np.array([[[1.0, 1.0, 0.0]], [[1.0, 0.9, 0.0]], [[0.9, 1.0, 0.0]]])
    assert rules.exits(Rule("margin", 0.0), tied).tolist() == [1]
    assert rules.exits(Rule("cosine", 0.9), tied).tolist() == [1]


def test_low_precision_is_scored_in_float32():
    now = jnp.asarray(LOGITS[0], jnp.bfloat16)
    assert rules.score("entropy", now).dtype == jnp.float32
    rule = Rule("entropy", -0.3)
    as_floats = np.asarray(jnp.asarray(LOGITS, jnp.bfloat16).astype(jnp.float32))
    left = rules.exits(rule, np.asarray(jnp.asarray(LOGITS, jnp.bfloat16)))
    assert left.tolist() == leaves_at(rule, as_floats)


def test_no_examples():
    assert rules.exits(Rule("margin", 0.5), np.zeros((3, 0, 2))).shape == (0,)


@pytest.mark.parametrize(
    "rule",
    [
        Rule("cosine", 0.8),
        Rule("entropy", (-0.1, -0.25, math.inf), patience=2, temperatures=(1.5, 2, 1)),
        Rule("margin", math.inf),
        Rule("confidence", np.array([0.5, 0.75]), temperatures=np.float32(0.5)),
    ],
)
def test_json_there_and_back(rule):
    text = json.dumps(rule.to_json(), allow_nan=False)
    assert Rule.from_json(json.loads(text)) == rule
    assert hash(Rule.from_json(json.loads(text))) == hash(rule)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rule("cosin", 0.8), "name is 'cosin': allowed are cosine, confidence, entropy"),
        (lambda: Rule("cosine", math.nan), "thresholds hold nan: finite numbers or inf are needed"),
        (lambda: Rule("cosine", (0.5, -math.inf)), "thresholds hold -inf: finite numbers or inf"),
        (lambda: Rule("cosine", "0.8"), "thresholds hold '0.8': a number, or one for each exit"),
        (lambda: Rule("cosine", True), "thresholds hold True: a number"),
        (lambda: Rule("cosine", []), "thresholds are empty: a number"),
        (lambda: Rule("cosine", 0.8, 0), "patience is 0: a whole number of at least 1 is needed"),
        (lambda: Rule("cosine", 0.8, 1, 0), "temperatures hold 0.0: finite numbers above 0"),
        (lambda: Rule("cosine", 0.8, 1, math.inf), "temperatures hold inf: finite numbers above 0"),
        (lambda: Rule("cosine", (0.8,) * 3).for_exits(2), "the rule has 3 thresholds: one is"),
        (lambda: Rule.from_json([]), "rule is a list: a collections Mapping is needed"),
        (lambda: Rule.from_json({"name": "margin"}), "the rule has the keys name: name and"),
        (
            lambda: Rule.from_json({"name": "margin", "thresholds": 1, "patient": 2}),
            "the rule has the keys name, thresholds, patient: name and thresholds are needed",
        ),
        (lambda: rules.exits("cosine", LOGITS), "rule is a str: a jdecouple Rule is needed"),
        (lambda: rules.exits(Rule("cosine", 1), LOGITS[0]), r"logits have shape \[64, 5\]"),
        (lambda: rules.exits(Rule("cosine", 1), LOGITS[..., :1]), r"logits have shape \[6, 64, 1"),
        (lambda: rules.exits(Rule("cosine", 1), LOGITS > 0), "logits are of dtype bool: numbers"),
        (lambda: rules.exits(Rule("cosine", 1), [[[1, 2], [1]]]), "logits are rows of unequal"),
        (lambda: rules.score("margin", LOGITS), r"logits have shape \[6, 64, 5\]: \[n, classes\]"),
        (lambda: rules.score("cosine", LOGITS[0], LOGITS[0, :9]), r"and \[9, 5\] at the exit befo"),
    ],
)
def test_bad_arguments_get_one_line(make, message):
    with pytest.raises((TypeError, ValueError), match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_logits_that_are_not_finite_are_refused(value):
    logits = LOGITS.astype(np.float64)
    logits[2, 7, 3] = value
    with pytest.raises(ValueError, match=r"logits are .* at exit 2, example 7, class 3: finite"):
        rules.exits(Rule("margin", 0.5), logits)
