import chex
import golden_vectors as gv
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdecouple import optim

TOLERANCE = {64: 1e-10, 32: 1e-5}


def run(tx, params, gradients):
    """Parameters after each step, in a plain nested dict, through one jitted update."""

    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    history = []
    for gradient in gradients:
        params, state = step(params, state, gradient)
        history.append(params)
    return history


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("schedule", [False, True])
def test_lars_golden(bits, schedule):
    golden = gv.load("lars")
    settings = golden.settings
    tx = optim.lars(
        optim.constant(settings["lr"]) if schedule else settings["lr"],
        weight_decay=settings["wd"],
        momentum=settings["momentum"],
        trust_coefficient=settings["eta"],
    )
    with jax.enable_x64(bits == 64):
        dtype = f"float{bits}"
        initial, grads = golden.group("w.init"), golden.group("in.grads")
        params = {"outer": {name: jnp.asarray(w, dtype) for name, w in initial.items()}}
        gradients = [
            {"outer": {name: jnp.asarray(g[i], dtype) for name, g in grads.items()}}
            for i in range(settings["steps"])
        ]
        history = run(tx, params, gradients)
        for name, expected in golden.group("out64.params_after_each_step").items():
            actual = np.stack([params["outer"][name] for params in history])
            assert actual.dtype == dtype
            assert gv.relative_error(actual, expected) < TOLERANCE[bits], name


GRADIENTS = [np.array([[0.5, -2.0], [1.0, 0.1]]) * scale for scale in (1.0, -0.3, 2.0, 0.7)]
WEIGHT = np.array([[1.0, -0.5], [0.25, 2.0]])


@pytest.mark.parametrize(
    ("momentum", "nesterov", "weight_decay"),
    [(0.0, False, 0.0), (0.9, False, 0.01), (0.9, True, 0.01), (0.0, False, 0.1)],
)
def test_sgd_is_torchs(momentum, nesterov, weight_decay, x64):
    tx = optim.sgd(0.1, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    history = run(tx, {"w": jnp.asarray(WEIGHT)}, [{"w": jnp.asarray(g)} for g in GRADIENTS])
    weight, buffer = WEIGHT.copy(), np.zeros_like(WEIGHT)
    for gradient, params in zip(GRADIENTS, history, strict=True):
        gradient = gradient + weight_decay * weight
        buffer = momentum * buffer + gradient
        weight = weight - 0.1 * (gradient + momentum * buffer if nesterov else buffer)
        np.testing.assert_allclose(params["w"], weight, rtol=1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_decays_decoupled(weight_decay, x64):
    tx = optim.adam(0.01, b1=0.8, b2=0.95, eps=1e-6, weight_decay=weight_decay)
    history = run(tx, {"w": jnp.asarray(WEIGHT)}, [{"w": jnp.asarray(g)} for g in GRADIENTS])
    weight, first, second = WEIGHT.copy(), 0.0, 0.0
    for t, (gradient, params) in enumerate(zip(GRADIENTS, history, strict=True), start=1):
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        scaled = first / (1 - 0.8**t) / (np.sqrt(second / (1 - 0.95**t)) + 1e-6)
        weight = weight - 0.01 * (scaled + weight_decay * weight)
        np.testing.assert_allclose(params["w"], weight, rtol=1e-10)


def test_adamw_is_adam_with_decay(x64):
    """By default PyTorch's, and of the same layout whatever the decay is."""
    params, gradients = {"w": jnp.asarray(WEIGHT)}, [{"w": jnp.asarray(g)} for g in GRADIENTS]
    for decay in (0.0, 0.1):
        found = run(optim.adamw(0.01, b1=0.8, weight_decay=decay), params, gradients)
        wanted = run(optim.adam(0.01, b1=0.8, weight_decay=decay), params, gradients)
        np.testing.assert_allclose(found[-1]["w"], wanted[-1]["w"], rtol=1e-14)
    default = run(optim.adamw(0.01), params, gradients)[-1]["w"]
    np.testing.assert_array_equal(
        default, run(optim.adamw(0.01, weight_decay=0.01), params, gradients)[-1]["w"]
    )
    states = [jax.tree.structure(optim.adamw(0.1, weight_decay=x).init(params)) for x in (0.0, 0.1)]
    assert states[0] == states[1]


def test_nadamw_is_nadam_with_decay(x64):
    params, gradients = {"w": jnp.asarray(WEIGHT)}, [{"w": jnp.asarray(g)} for g in GRADIENTS]
    for options in ({}, {"b1": 0.99, "weight_decay": 0.1}):
        found = run(optim.nadamw(0.01, **options), params, gradients)
        wanted = run(optim.nadam(0.01, **{"weight_decay": 0.01} | options), params, gradients)
        np.testing.assert_array_equal(found[-1]["w"], wanted[-1]["w"])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_nadam_looks_ahead(weight_decay, x64):
    tx = optim.nadam(0.01, b1=0.8, b2=0.95, eps=1e-6, weight_decay=weight_decay)
    history = run(tx, {"w": jnp.asarray(WEIGHT)}, [{"w": jnp.asarray(g)} for g in GRADIENTS])
    weight, first, second = WEIGHT.copy(), 0.0, 0.0
    for t, (gradient, params) in enumerate(zip(GRADIENTS, history, strict=True), start=1):
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        ahead = 0.8 * first / (1 - 0.8 ** (t + 1)) + 0.2 * gradient / (1 - 0.8**t)
        scaled = ahead / (np.sqrt(second / (1 - 0.95**t)) + 1e-6)
        weight = weight - 0.01 * (scaled + weight_decay * weight)
        np.testing.assert_allclose(params["w"], weight, rtol=1e-10)


def orthogonalised(matrix):
    """Five Newton-Schulz iterations with Jordan's coefficients, of the wide form."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / np.linalg.norm(x)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if tall else x


@pytest.mark.parametrize(
    ("name", "shape"), [("block/dense/kernel", (6, 4)), ("block/conv/kernel", (3, 3, 2, 5))]
)
def test_muon_orthogonalises_kernels(name, shape, x64):
    """A convolution's as the matrix [height width in, out]."""
    rng = np.random.default_rng(0)
    weight, *gradients = (rng.normal(size=shape) for _ in range(4))
    tx = optim.muon(0.01, beta=0.9, weight_decay=0.1)
    history = run(tx, {name: jnp.asarray(weight)}, [{name: jnp.asarray(g)} for g in gradients])
    flat, matrix, momentum = (-1, shape[-1]), weight.reshape(-1, shape[-1]), 0.0
    for t, (gradient, params) in enumerate(zip(gradients, history, strict=True), start=1):
        momentum = 0.9 * momentum + 0.1 * gradient.reshape(flat)
        ahead = 0.9 * momentum / (1 - 0.9 ** (t + 1)) + 0.1 * gradient.reshape(flat) / (1 - 0.9**t)
        update = 0.2 * np.sqrt(max(matrix.shape)) * orthogonalised(ahead)
        matrix = matrix - 0.01 * (update + 0.1 * matrix)
        np.testing.assert_allclose(params[name].reshape(flat), matrix, rtol=1e-6)


def test_muon_leaves_all_else_to_nadam(x64):
    shapes = {
        "block/dense/bias": (4,),
        "block/table": (6, 4),
        "block/lstm/kernel": (2, 6, 4),
        "head/classifier/kernel": (6, 4),
    }
    rng = np.random.default_rng(0)
    params, *gradients = (
        {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
        for _ in range(4)
    )
    found = run(optim.muon(0.01, weight_decay=0.1), params, gradients)[-1]
    wanted = run(optim.nadam(0.01, weight_decay=0.1), params, gradients)[-1]
    for name in shapes:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-12)


def own(schedule, *, slope: float = 2.0):
    """An optimiser of one's own, whose learning rate has another name."""
    return optax.scale_by_learning_rate(lambda count: slope * schedule(count))


def none_at_all(learning_rate):
    return learning_rate


def without_arguments():
    return optax.identity()


class TestImported:
    def test_by_name(self, x64):
        params, gradients = {"w": jnp.asarray(WEIGHT)}, [{"w": jnp.asarray(g)} for g in GRADIENTS]
        found = run(optim.get("optax:lion")(0.01, b1=0.8), params, gradients)[-1]["w"]
        np.testing.assert_array_equal(
            found, run(optax.lion(0.01, b1=0.8), params, gradients)[-1]["w"]
        )

    def test_first_argument(self):
        tx = optim.get(f"{__name__}:own")(optim.constant(0.25), slope=4.0)
        [after] = run(tx, {"w": jnp.ones(1)}, [{"w": jnp.ones(1)}])
        assert after["w"] == 0.0

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("no_such_module:f", "No module named 'no_such_module'"),
            ("optax:lyon", "module 'optax' has no attribute 'lyon'"),
            (":lion", "Empty module name"),
            ("optax:__version__", f"{optax.__version__!r} is not a callable object"),
            (f"{__name__}:without_arguments", "without_arguments takes no learning rate"),
        ],
    )
    def test_what_there_is_not(self, name, reason):
        with pytest.raises(ValueError, match="which does not work: ") as caught:
            optim.get(name)
        assert str(caught.value) == f"name is {name!r}, which does not work: {reason}"

    def test_what_makes_none(self):
        message = "what none_at_all returns is a float: a optax GradientTransformation is needed"
        with pytest.raises(ValueError, match=message):
            optim.get(f"{__name__}:none_at_all")(0.1)
        with pytest.raises(ValueError, match="unexpected keyword argument 'slop'"):
            optim.get(f"{__name__}:own")(optim.constant(0.1), slop=1)


@pytest.mark.parametrize("name", optim.names())
@pytest.mark.parametrize("bits", [64, 32])
def test_optimizers_keep_dtypes(name, bits):
    with jax.enable_x64(bits == 64):
        params = {"w": jnp.asarray(WEIGHT, f"float{bits}"), "b": jnp.ones(2, f"float{bits}")}
        tx = optim.get(name)(optim.warmup(optim.cosine(0.1, 0.01, 4), 2))
        after = run(tx, params, [params, params])[-1]
        chex.assert_trees_all_equal_shapes_and_dtypes(after, params)
        assert all(np.all(before != after[key]) for key, before in params.items())


@pytest.mark.parametrize("bits", [64, 32])
def test_cosine_golden(bits):
    golden = gv.load("cosine_lr")
    base, end = golden.settings["base_lr"], golden.settings["end_lr"]
    with jax.enable_x64(bits == 64):
        for steps, suffix, total in [
            ("in.steps", "", 1000),
            ("in.steps_epochs200x391", "_epochs200x391", 200 * 391),
        ]:
            rates = jax.vmap(optim.cosine(base, end, total))(jnp.asarray(golden[steps]))
            expected = golden[f"out64.lr{suffix}"]
            assert gv.relative_error(rates, expected) < TOLERANCE[bits]


def test_schedules_by_value():
    cosine = optim.cosine(0.2, 0.002, 10)
    assert [float(cosine(i)) for i in (0, 5, 10, 99)] == pytest.approx([0.2, 0.101, 0.002, 0.002])
    decay = optim.step_decay(1.0, (3, 5), 0.1)
    rates = [float(decay(i)) for i in range(7)]
    assert rates == pytest.approx([1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert float(optim.constant(0.3)(17)) == pytest.approx(0.3)
    assert float(optim.step_decay(0.5, (), 0.1)(9)) == pytest.approx(0.5)


def test_per_epoch_moves_at_epoch_starts():
    cosine = optim.cosine(1.0, 0.0, 12)
    held = jax.vmap(optim.per_epoch(cosine, 4))(jnp.arange(12))
    expected = np.repeat([float(cosine(i)) for i in (0, 4, 8)], 4)
    np.testing.assert_allclose(held, expected, rtol=1e-6)


def test_warmup_by_value():
    """From a hundredth of the rate over 5 epochs, as in ADL, here of 4 steps each."""
    warmed = optim.warmup(optim.constant(0.1), 20)
    rates = [float(warmed(n)) for n in (0, 1, 9, 18, 19, 20, 1000)]
    assert rates == pytest.approx([0.00595, 0.0109, 0.0505, 0.09505, 0.1, 0.1, 0.1])
    of_a_half = jax.jit(jax.vmap(optim.warmup(optim.constant(2.0), 4, 0.5)))
    np.testing.assert_allclose(of_a_half(jnp.arange(6)), [1.25, 1.5, 1.75, 2, 2, 2])
    from_zero = optim.warmup(optim.step_decay(1.0, (1, 3), 0.1), 2, 0.0)
    assert [float(from_zero(n)) for n in range(4)] == pytest.approx([0.5, 0.1, 0.1, 0.01])


def test_every_reads_the_schedule_of_passes():
    decay = optim.step_decay(1.0, (3, 8), 0.1)
    assert optim.every(decay, 1) is decay
    fourth = optim.every(decay, 4)  # passes 0, 4, 8
    assert [float(fourth(n)) for n in range(3)] == pytest.approx([1, 0.1, 0.01])
    warmed = optim.every(optim.warmup(decay, 4, 0.2), 2)  # passes 0, 2, 4, 6, 8
    rates = [float(warmed(n)) for n in range(5)]
    assert rates == pytest.approx([0.4, 0.8, 0.1, 0.1, 0.01])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optim.sgd(0.0), "learning_rate is 0.0: a finite number above 0 is needed"),
        (lambda: optim.sgd("fast"), "learning_rate is 'fast': a finite number above 0"),
        (lambda: optim.sgd(float("nan")), "learning_rate is nan: a finite number above 0"),
        (lambda: optim.sgd(0.1, momentum=1.0), r"momentum is 1.0: a number in \[0, 1\)"),
        (lambda: optim.sgd(0.1, nesterov=True), "nesterov is True: a momentum above 0"),
        (lambda: optim.sgd(0.1, weight_decay=-1.0), "weight_decay is -1.0: a finite number of at"),
        (lambda: optim.adam(0.1, b2=None), r"b2 is None: a number in \[0, 1\) is needed"),
        (lambda: optim.lars(0.1, trust_coefficient=0), "trust_coefficient is 0: a finite number"),
        (lambda: optim.cosine(0.1, 0.0, 0), "steps is 0: a whole number of at least 1"),
        (lambda: optim.cosine(0.1, -0.1, 5), "end is -0.1: a finite number of at least 0"),
        (lambda: optim.step_decay(0.1, (5, 5), 0.1), r"boundaries are \[5, 5\]: increasing"),
        (lambda: optim.step_decay(0.1, (5.5,), 0.1), "boundary is 5.5: a whole number"),
        (lambda: optim.step_decay(0.1, (5,), 0), "factor is 0: a finite number above 0"),
        (lambda: optim.per_epoch(optim.constant(1.0), 0), "steps_per_epoch is 0: a whole"),
        (lambda: optim.warmup(optim.constant(1.0), 0), "steps is 0: a whole number of at least"),
        (lambda: optim.warmup(optim.constant(1.0), 2.5), "steps is 2.5: a whole number"),
        (lambda: optim.warmup(optim.constant(1.0), 2, 1.0), r"start is 1.0: a number in \[0, 1\)"),
        (
            lambda: optim.warmup(optim.constant(1.0), 2, -0.1),
            r"start is -0.1: a number in \[0, 1\)",
        ),
        (lambda: optim.every(optim.constant(1.0), 0), "passes is 0: a whole number of at least"),
        (lambda: optim.every(optim.constant(1.0), 1.5), "passes is 1.5: a whole number"),
        (
            lambda: optim.get("adamax"),
            "unknown optimizer 'adamax': allowed are adam, adamw, lars, muon, nadam, nadamw, sgd",
        ),
        (
            lambda: optim.get_schedule("linear"),
            "unknown learning-rate schedule 'linear': allowed are",
        ),
    ],
)
def test_bad_arguments_get_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_tables():
    assert {"adam", "lars", "sgd"} <= set(optim.names())
    assert optim.get("lars") is optim.lars
    assert optim.get_schedule("cosine") is optim.cosine
