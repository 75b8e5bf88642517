"""Loss functions against the golden vectors, and where those do not reach."""

import functools

import chex
import golden_vectors as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jdecouple.methods import objectives

BITS = pytest.mark.parametrize("bits", [64, pytest.param(32, marks=pytest.mark.slow)])


def tolerance(bits, golden, key):
    """1e-10 in float64 and 1e-5 in float32, both against the authors' float64 run.

    Where the authors' own float32 run is further than that from their float64 run (gradients of the
    nearly collapsed batch only, 3e-5 to 2e-4: the difference of nearly equal unit rows), that
    distance is what float32 can give, and twice that is allowed.
    """
    if bits == 64:
        return 1e-10
    kind, name = key.split("64.", 1)
    return max(1e-5, 2 * gv.relative_error(golden[f"{kind}32.{name}"], golden[key]))


def assert_golden(actual, bits, golden, key, scale=1.0):
    assert actual.dtype == f"float{bits}"
    error = gv.relative_error(np.asarray(actual, np.float64) * scale, golden[key])
    assert error <= tolerance(bits, golden, key), (golden.name, key, error)


def test_only_the_collapsed_gradients_need_more_than_1e_5():
    wide = set()
    for name in [*gv.cases("deinforeg_loss"), *gv.cases("contrastive"), *gv.cases("predsim")]:
        golden = gv.load(name)
        keys = [key for key in golden.arrays if key.startswith(("out64.", "grad64."))]
        keys = [key for key in keys if golden[key].dtype == np.float64]
        wide |= {(name, key[:4]) for key in keys if tolerance(32, golden, key) > 1e-5}
    assert {key for _, key in wide} == {"grad"}
    assert all("nearcollapse" in name for name, _ in wide)


@BITS
@pytest.mark.parametrize("case", gv.cases("deinforeg_loss"))
def test_information_regularization_golden(case, bits):
    golden = gv.load(case)
    with jax.enable_x64(bits == 64):
        x, labels = jnp.asarray(golden["in.x"], f"float{bits}"), jnp.asarray(golden["in.labels"])
        terms = functools.partial(
            objectives.information_regularization,
            labels=labels,
            num_classes=int(golden["in.n_classes"]),
        )
        values, gradients = jax.jit(lambda x: (terms(x), jax.jacrev(terms)(x)))(x)
        values["total"], gradients["total"] = sum(values.values()), sum(gradients.values())
        names = {"variance": "var", "invariance": "invar", "covariance": "cov", "total": "total"}
        for ours, theirs in names.items():
            assert_golden(values[ours], bits, golden, f"out64.loss_{theirs}")
            assert_golden(gradients[ours], bits, golden, f"grad64.x_of_{theirs}")


@BITS
@pytest.mark.parametrize("case", gv.cases("contrastive__b"))
def test_supervised_contrastive_golden(case, bits):
    golden = gv.load(case)
    with jax.enable_x64(bits == 64):
        x, labels = jnp.asarray(golden["in.x"], f"float{bits}"), jnp.asarray(golden["in.labels"])
        temperature = float(golden["in.temperature"])
        loss = lambda x: objectives.supervised_contrastive(x, labels, temperature)  # noqa: E731
        value, gradient = jax.jit(jax.value_and_grad(loss))(x)
        for name in ("deinforeg_repo", "scpl_LocalLoss", "scpl_NLPContrastiveLoss"):
            assert_golden(value, bits, golden, f"out64.loss_{name}")
            assert_golden(gradient, bits, golden, f"grad64.x_{name}")


@BITS
@pytest.mark.parametrize("case", gv.cases("predsim_similarity__b"))
def test_similarity_matching_golden(case, bits):
    golden = gv.load(case)
    with jax.enable_x64(bits == 64):
        x, labels = jnp.asarray(golden["in.x"], f"float{bits}"), jnp.asarray(golden["in.labels"])
        classes = int(golden["in.num_classes_onehot"])
        loss = lambda x: objectives.similarity_matching(x, labels, classes)  # noqa: E731
        value, gradient = jax.jit(jax.value_and_grad(loss))(x)
        assert_golden(objectives.similarity_matrix(x), bits, golden, "out64.R_x")
        assert_golden(value, bits, golden, "out64.loss_sim_unscaled")
        assert_golden(value, bits, golden, "out64.loss_sim_x0.99", scale=0.99)
        assert_golden(gradient, bits, golden, "grad64.x_of_x0.99", scale=0.99)


@BITS
def test_similarity_of_feature_maps_golden(bits):
    golden = gv.load("predsim_similarity__scpl_4d")
    golden.arrays["grad64.nhwc"] = gv.images(golden["grad64.x_of_sumR2"])
    golden.arrays["grad32.nhwc"] = gv.images(golden["grad32.x_of_sumR2"])
    with jax.enable_x64(bits == 64):
        x = jnp.asarray(gv.images(golden["in.x"]), f"float{bits}")
        assert_golden(objectives.similarity_matrix(x), bits, golden, "out64.R")
        gradient = jax.grad(lambda x: jnp.sum(objectives.similarity_matrix(x) ** 2))(x)
        assert_golden(gradient, bits, golden, "grad64.nhwc")


def total(x, labels, golden):
    terms = objectives.information_regularization(x, labels, int(golden["in.n_classes"]))
    return sum(terms.values())


def contrastive(x, labels, golden):
    return objectives.supervised_contrastive(x, labels, float(golden["in.temperature"]))


def similarity(x, labels, golden):
    return objectives.similarity_matching(x, labels, int(golden["in.num_classes_onehot"]))


class TestVariants(chex.TestCase):
    """Compiled or operation by operation, of arrays on a device or of NumPy's: the same loss."""

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(
        ("total", total, "deinforeg_loss", "loss_total", "x_of_total", 1.0),
        ("contrastive", contrastive, "contrastive", "loss_deinforeg_repo", "x_deinforeg_repo", 1.0),
        ("similarity", similarity, "predsim_similarity", "loss_sim_x0.99", "x_of_x0.99", 0.99),
    )
    def test_golden(self, loss, case, value, gradient, scale):
        golden = gv.load(f"{case}__b8_d16_c5")
        with jax.enable_x64(True):
            run = self.variant(jax.value_and_grad(functools.partial(loss, golden=golden)))
            found = run(jnp.asarray(golden["in.x"]), jnp.asarray(golden["in.labels"]))
            assert_golden(found[0], 64, golden, f"out64.{value}", scale)
            assert_golden(found[1], 64, golden, f"grad64.{gradient}", scale)


@pytest.mark.parametrize(
    "batch", [pytest.param(4, marks=pytest.mark.slow), 6, pytest.param(20, marks=pytest.mark.slow)]
)
def test_covariance_by_its_definition(batch, x64):
    z = np.random.default_rng(batch).normal(size=(batch, 6))
    covariance = np.cov(z.T, bias=True)
    expected = (np.sum(covariance**2) - np.sum(np.diag(covariance) ** 2)) / 6
    terms = objectives.information_regularization(
        jnp.asarray(z), jnp.arange(batch) % 3, 3, normalize=False
    )
    assert float(terms["covariance"]) == pytest.approx(expected, rel=1e-12)
    deviation = np.sqrt(z.var(0, ddof=1) + 1e-7)
    expected = np.mean(np.maximum(0, 1 - deviation)) / batch
    assert float(terms["variance"]) == pytest.approx(expected, rel=1e-12)


def information(z, labels):
    return sum(objectives.information_regularization(z, labels, 3).values())


def matching(z, labels):
    return objectives.similarity_matching(z, labels, 3)


LOSSES = [information, matching, objectives.supervised_contrastive]


def value_and_gradient(loss, z, labels):
    value, gradient = jax.jit(jax.value_and_grad(loss))(z, labels)
    chex.assert_tree_all_finite((value, gradient))
    return value, gradient


@pytest.mark.parametrize("row", [0.0, 1.0, 1e-30])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_constant_row_has_a_finite_gradient(loss, row):
    z = jax.random.normal(jax.random.key(0), (6, 8)).at[2].set(row)
    _, gradient = value_and_gradient(loss, z, jnp.array([0, 1, 1, 2, 0, 1]))
    assert gradient[0].any()
    assert np.abs(gradient).max() < 10
    if row == 0:
        assert not gradient[2].any()


def test_a_constant_row_has_the_authors_value(x64):
    """Their similarity rows are centred / (norm + 1e-8): a constant row is zeros throughout."""
    z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5))).at[1].set(0.3)
    similarity = np.asarray(objectives.similarity_matrix(z))
    assert not similarity[1].any()
    assert not similarity[:, 1].any()
    np.testing.assert_allclose(np.diag(similarity)[[0, 2, 3]], 1, rtol=1e-7)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_maps_of_three_channels_and_fewer_are_compared_in_all_numbers(channels):
    z = jax.random.normal(jax.random.key(0), (4, 3, 3, channels))
    flat = objectives.similarity_matrix(z.reshape(4, -1))
    deviations = objectives.similarity_matrix(z.std((1, 2), ddof=1))
    expected = flat if channels < 4 else deviations
    np.testing.assert_allclose(objectives.similarity_matrix(z), expected, atol=1e-6)


def test_a_flat_feature_map_has_a_finite_gradient():
    z = jax.random.normal(jax.random.key(0), (4, 3, 3, 5)).at[1].set(0.0).at[2, ..., 0].set(1.0)
    value_and_gradient(matching, z, jnp.array([0, 1, 1, 2]))


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_bfloat16_are_float32(loss):
    z = jax.random.normal(jax.random.key(0), (6, 8), jnp.bfloat16)
    labels = jnp.array([0, 1, 1, 2, 0, 1])
    value = loss(z, labels)
    assert value.dtype == jnp.float32
    assert float(value) == float(loss(z.astype(jnp.float32), labels))


@pytest.mark.parametrize("temperature", [0.1, 0.002])
def test_contrastive_of_lone_examples_is_zero(temperature):
    z = jax.random.normal(jax.random.key(0), (5, 8))
    for batch in (1, 5):
        loss = functools.partial(objectives.supervised_contrastive, temperature=temperature)
        value, gradient = value_and_gradient(loss, z[:batch], jnp.arange(batch))
        assert float(value) == 0
        assert not gradient.any()


def test_contrastive_stays_finite_at_a_tiny_temperature():
    z = jnp.eye(4)[jnp.array([0, 1, 2, 2])] * jnp.array([1, -1, 1, 1])[:, None]
    loss = functools.partial(objectives.supervised_contrastive, temperature=1e-3)
    value_and_gradient(loss, z, jnp.array([0, 0, 1, 1]))


@pytest.mark.parametrize("count_self", [True, False])
def test_contrastive_counts_the_example_itself_in_the_divisor_or_not(count_self, x64):
    z = np.random.default_rng(1).normal(size=(5, 4))
    labels = np.array([0, 0, 0, 1, 2])
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    similarity = unit @ unit.T / 0.5
    total = 0.0
    for i in range(5):
        others = [j for j in range(5) if j != i]
        denominator = np.log(np.sum(np.exp(similarity[i, others])))
        same = [j for j in others if labels[j] == labels[i]]
        total -= sum(similarity[i, j] - denominator for j in same) / max(len(same) + count_self, 1)
    arguments = jnp.asarray(z), jnp.asarray(labels), 0.5
    value = objectives.supervised_contrastive(*arguments, count_self=count_self)
    assert float(value) == pytest.approx(total / 5, rel=1e-12)
    if count_self:
        assert float(value) == float(objectives.supervised_contrastive(*arguments))


def test_cross_entropy_is_the_mean_negative_log_likelihood(x64):
    logits = np.random.default_rng(0).normal(size=(4, 3))
    labels = np.array([2, 0, 1, 1])
    log_probability = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -log_probability[np.arange(4), labels].mean()
    value = objectives.cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    assert float(value) == pytest.approx(expected, rel=1e-12)
    half = objectives.cross_entropy(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(labels))
    assert half.dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda z, y: objectives.information_regularization(z[:1], y[:1], 3),
            "the batch has 1 examples: at least 2",
        ),
        (
            lambda z, y: objectives.information_regularization(z, y[:3], 3),
            r"labels \(3,\): .* \[batch\] are needed",
        ),
        (
            lambda z, y: objectives.supervised_contrastive(z[..., None], y),
            r"z is \(4, 5, 1\) .* \[batch, dim\]",
        ),
        (
            lambda z, y: objectives.supervised_contrastive(z, y, 0.0),
            "temperature is 0.0: a finite number above 0",
        ),
        (
            lambda z, y: objectives.similarity_matching(z, y[:3], 3),
            r"labels \(3,\): .* \[batch\] are needed",
        ),
        (lambda z, y: objectives.similarity_matrix(y), r"x is \(4,\): \[batch, ...\]"),
        (lambda z, y: objectives.similarity_matrix(z[:, None, None]), "one pixel"),
    ],
)
def test_bad_shapes_get_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(jnp.ones((4, 5)), jnp.array([0, 1, 2, 0]))
    assert "\n" not in str(caught.value)
