"""Every method trains models whose activations are sequences, on any stages and engines."""

import functools

import jax
import jax.numpy as jnp
import nets
import pytest
import sequence_nets
from sequence_nets import model

import jdecouple as jd

pytestmark = pytest.mark.usefixtures("module_x64")

KINDS = ("lstm", "transformer", "vit")
SLOW = pytest.mark.slow
NEEDS_IMAGES = ("infopro",)  # it reconstructs a picture from a feature map
METHODS = [name for name in jd.methods.names() if name not in NEEDS_IMAGES]
CASES = [(name, kind) for name in METHODS for kind in KINDS]  # all of them take long to compile


def build(name, kind, stages=1, **options):
    arguments = {"projector": "identity"} if name in ("deinforeg", "scpl") else {}
    options = {"mesh": jd.make_mesh(stages, devices=jax.devices()[:stages]), **options}
    net = model(kind, init="torch", param_dtype=jnp.float64, **options.pop("model", {}))
    return jd.Trainer(
        net,
        nets.method(name, **arguments),
        jd.optim.sgd(0.05, momentum=0.9),
        example=sequence_nets.batches(kind)[0],
        **options,
    )


def run(trainer, kind, steps=4, *, evaluate=False):
    data = sequence_nets.batches(kind)
    state, metrics = nets.trained(trainer, data, steps)
    values = trainer.evaluate(state, data) if evaluate else {}
    return nets.to_arrays(trainer, state), metrics, values


def assert_same(found, wanted):
    assert nets.largest_error(found[0], wanted[0]) < 1e-12
    for here, there in zip(found[1], wanted[1], strict=True):
        assert here == pytest.approx(there, rel=2e-6, abs=1e-7, nan_ok=True)
    assert found[2] == pytest.approx(wanted[2], rel=1e-6)


@functools.cache
def reference(name, kind, depth=2):
    return run(build(name, kind, model={"depth": depth}), kind)


@SLOW
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_two_devices_train_as_one(name, kind):
    """An embedding block on one device, a layer on the other.

    Against two stages on one device where the method depends on their number.
    """
    options = {"model": {"depth": 1}}
    alone = build(name, kind, **options, num_stages=2 if name in nets.DELAYED else 1)
    wanted = run(alone, kind, evaluate=True)
    assert_same(run(build(name, kind, 2, **options), kind, evaluate=True), wanted)
    start = nets.weights(alone, alone.init())
    moved = {key.split("/")[0] for key in start if (wanted[0][key] != start[key]).any()}
    assert moved == {"block_0", "block_1"}


@SLOW
@pytest.mark.parametrize("name", ["bp", "scpl", "fdg", "al"])
def test_passed_states_travel_between_devices(name):
    """Two LSTMs, the second on another device."""
    papers = {"model": {"merge": "concat", "pass_state": True}, "boundaries": (0, 2)}
    alone = build(name, "lstm", **papers, fuse=False)
    wanted = run(alone, "lstm", evaluate=True)
    assert_same(run(build(name, "lstm", 2, **papers), "lstm", evaluate=True), wanted)
    without = run(build(name, "lstm", model={"merge": "concat"}, boundaries=(0, 2)), "lstm")
    params = [key for key in wanted[0] if "/params/" in key]
    changed = {key.split("/")[0] for key in params if (without[0][key] != wanted[0][key]).any()}
    local = name in ("scpl", "al")  # only what reads the state is another then
    assert changed == ({"block_2"} if local else {"block_0", "block_1", "block_2"})


@SLOW
@pytest.mark.parametrize("name", ["fr", "fdg"])
def test_a_delayed_method_with_one_stage_is_backpropagation(name):
    found = run(build(name, "lstm", model={"depth": 1}), "lstm")
    wanted = reference("bp", "lstm", depth=1)
    assert nets.largest_error(found[0], wanted[0]) < 1e-12


@SLOW
def test_remat_and_microbatches_carry_sequences():
    wanted = reference("bp", "transformer")
    for options in ({"remat": "stages"}, {"microbatches": 2, "schedule": "gpipe"}):
        found = run(build("bp", "transformer", 2, **options), "transformer")
        assert nets.largest_error(found[0], wanted[0]) < 1e-12


@SLOW
def test_replicas_cut_sequences_by_examples():
    mesh = jd.make_mesh(2, 2, devices=jax.devices()[:4])
    for name in ("bp", "deinforeg"):
        found = run(build(name, "lstm", mesh=mesh), "lstm")
        assert nets.largest_error(found[0], reference(name, "lstm")[0]) < 1e-12


@SLOW
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bp", "lstm"),
        ("deinforeg", "transformer"),
        pytest.param("deinforeg", "lstm", marks=SLOW),
        pytest.param("bp", "transformer", marks=SLOW),
        pytest.param("scpl", "vit", marks=SLOW),
    ],
)
def test_the_spmd_engine_takes_equal_blocks_between_the_ends(name, kind):
    """An embedding block in front, equal ones, the classifier in the last block's head."""
    trainer = build(name, kind, 2, model={"depth": 3}, engine="spmd")
    assert trainer.engine == "spmd"
    assert_same(run(trainer, kind), reference(name, kind, depth=3))


@SLOW
def test_the_spmd_engine_names_the_block_that_differs():
    words = ("engine 'spmd'", "block 2 differs from block 1", "block/kernel")
    options = {"model": {"depth": 3, "merge": "concat"}, "engine": "spmd"}
    nets.assert_clear(ValueError, words, lambda: build("bp", "lstm", 2, **options))


@SLOW
@pytest.mark.parametrize(("kind", "mode"), [("lstm", "merge"), ("vit", "unmerge")])
def test_an_embedding_has_a_local_loss_and_is_no_exit(kind, mode):
    trainer = jd.Trainer(
        model(kind, param_dtype=jnp.float64),
        nets.method("deinforeg", mode=mode),
        jd.optim.sgd(0.05),
        example=sequence_nets.batches(kind)[0],
    )
    arrays, metrics, values = run(trainer, kind, 1, evaluate=True)
    names = {name.removeprefix("block_0/") for name in metrics[0] if name.startswith("block_0/")}
    assert names == {"loss", "variance", "invariance", "covariance"}
    assert {"exit_1/accuracy", "exit_2/accuracy"} < set(values)
    assert "exit_0/accuracy" not in values
    assert not any(name.startswith("block_0/params/head/classifier") for name in arrays)


@SLOW
@pytest.mark.parametrize(("name", "kind"), [("deinforeg", "lstm"), ("scpl", "transformer")])
def test_no_gradient_crosses_a_block(name, kind):
    """What the upper blocks are does not change how the first one trains."""
    found = []
    for scale in (1.0, 3.0):
        trainer = build(name, kind)
        arrays = nets.to_arrays(trainer, trainer.init())
        arrays = {
            key: value if key.startswith("block_0/") or "/params/" not in key else scale * value
            for key, value in arrays.items()
        }
        state = trainer.from_arrays(0, arrays)
        state, _ = nets.trained(trainer, sequence_nets.batches(kind), 2, state)
        after = nets.weights(trainer, state)
        found.append({key: after[key] for key in after if key.startswith("block_0/")})
    assert nets.largest_error(*found) < 1e-14


@SLOW
def test_a_model_that_does_not_fit_its_input_gets_one_clear_line():
    def on_images():
        example = sequence_nets.batches("vit")[0]
        return jd.Trainer(model("lstm"), nets.method("bp"), jd.optim.sgd(0.1), example=example)

    words = ("block 0 (Embedding)", "float64[6, 8, 8, 1]", "token ids")
    nets.assert_clear(ValueError, words, on_images)
