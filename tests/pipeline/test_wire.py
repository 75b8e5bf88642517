"""Rounded messages: what arrives, what rounding leaves behind, and that placement plays no role."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest

import jdecouple as jd
from jdecouple.pipeline.diagnostics import message_sizes
from jdecouple.pipeline.mpmd.stage_fns import message_shape, unpack_codes
from jdecouple.pipeline.transfer import pack
from jdecouple.pipeline.wire import WIRES, coded, decode, encode, encode_error, feedback_shapes

BATCH, STEPS = 8, 6
DTYPES = ("float32", "float64", "bfloat16")


def arrays(dtype: str) -> dict[str, Any]:
    """A carry with odd widths; example 0 is zero, 1 is tiny, 2 holds a nan and 3 an infinity."""
    rng = np.random.default_rng(0)

    def fill(*shape: int) -> jax.Array:
        x = rng.normal(size=(BATCH, *shape))
        x[0] = 0
        x[1] *= 1e-20
        x.reshape(BATCH, -1)[2:4, -1] = np.nan, np.inf
        return jnp.asarray(x, dtype)

    return {
        "x": {"h": fill(3, 5), "mask": jnp.ones((BATCH, 7), dtype), "c": fill(1)},
        "label": jnp.arange(BATCH),
        "y": fill(7),
        "image": jnp.ones((BATCH, 5), jnp.uint8),
        "loss": jnp.float32(0.1),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wire", WIRES)
def test_what_arrives(wire, dtype, x64):
    sent = arrays(dtype)
    arrived = decode(encode(sent, wire), sent)
    assert [x.dtype for x in jax.tree.leaves(arrived)] == [x.dtype for x in jax.tree.leaves(sent)]
    for name, kept in (("label", sent), ("image", sent), ("loss", sent), ("mask", sent["x"])):
        assert (arrived["x"] if name == "mask" else arrived)[name] is kept[name]
    for one, other in ((sent["y"], arrived["y"]), (sent["x"]["h"], arrived["x"]["h"])):
        x, found = (np.asarray(a, np.float64).reshape(BATCH, -1) for a in (one, other))
        assert not x[0].any()
        assert not found[0].any()
        rows = np.isfinite(x).all(axis=1)
        if wire == "int8":
            assert np.isnan(found[~rows]).all()
            step = np.abs(x[rows]).max(axis=1, keepdims=True) / 127
            epsilon = float(jnp.finfo(jnp.promote_types(dtype, "float32")).eps)
            epsilon = float(jnp.finfo(dtype).eps) if dtype == "bfloat16" else epsilon
            error = np.abs(found[rows] - x[rows])
            assert (error <= step / 2 + epsilon * np.abs(x[rows]) + 1e-6 * step).all()
            assert dtype == "bfloat16" or error.max() > 0.1 * step.max()
        else:
            narrow = jnp.dtype(wire) if jnp.dtype(wire).itemsize < one.dtype.itemsize else one.dtype
            wanted = np.asarray(one).astype(narrow).astype(np.float64).reshape(BATCH, -1)
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("wire", [None, *WIRES])
def test_one_array_carries_the_codes(wire):
    sent = {name: leaf for name, leaf in arrays("float32").items() if name != "loss"}
    shapes = jax.eval_shape(lambda: sent)
    message = pack(encode(sent, wire))
    shape = message_shape(shapes, wire)
    assert (message.shape, message.dtype) == (shape.shape, shape.dtype)
    codes = jax.tree.leaves(coded(shapes, wire))
    assert message.nbytes == sum(code.size * code.dtype.itemsize for code in codes)
    found, wanted = unpack_codes(message, shapes, wire), decode(encode(sent, wire), sent)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_array_that_would_be_no_smaller_stays(x64):
    kinds = {"int8": (("float32", 1), ("bfloat16", 4)), "bfloat16": (("bfloat16", 9),)}
    kinds["float32"] = (("float32", 9),)
    for wire, given in kinds.items():
        for dtype, width in given:
            x = jnp.ones((BATCH, width), dtype)
            assert encode(x, wire) is x
    wider = coded([jnp.ones((BATCH, 2)), jnp.ones((BATCH, 5), jnp.bfloat16)], "int8")
    assert [sorted(each) for each in wider] == [["scale", "values"]] * 2


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_errors_arrive_in_sum(wire):
    """What rounding takes comes with the next error of the microbatch, and of no other."""
    rng = np.random.default_rng(1)
    errors = [{"h": jnp.asarray(rng.normal(size=(BATCH, 3)), jnp.float32)} for _ in range(9)]
    zeros = [jnp.zeros(x.shape, x.dtype) for x in feedback_shapes(errors[0], 2, wire)]
    feedback: Any = tuple(zeros)
    arrived = jnp.zeros((BATCH, 3))
    for number, error in enumerate(errors):
        codes, feedback = encode_error(error, feedback, 1, wire)
        arrived += decode(codes, error)["h"]
        assert not np.any(feedback[0][:, 0])
        assert np.any(feedback[0][:, 1])
        plain = decode(encode(error, wire), error)["h"]
        assert number == 0 or np.any(decode(codes, error)["h"] != plain)
    whole = sum(error["h"] for error in errors)
    np.testing.assert_allclose(arrived + feedback[0][:, 1], whole, rtol=1e-5, atol=1e-5)
    broken = {"h": errors[0]["h"].at[2, 1].set(jnp.nan)}
    codes, feedback = encode_error(broken, feedback, 1, wire)
    assert np.isnan(decode(codes, broken)["h"][2, 1])
    assert np.isfinite(feedback[0]).all()


@functools.cache
def trainer(name: str, wire: str | None, devices: int, stages: int = 2, **options: Any) -> Any:
    with jax.enable_x64(True):
        mesh = jd.make_mesh(stages, options.pop("data", 1), devices=jax.devices()[:devices])
        model = nets.mlp(depth=2, param_dtype=jnp.float64)
        example = nets.batches(1, dtype=np.float64)[0]
        return nets.build(name, model=model, example=example, mesh=mesh, wire=wire, **options)


@functools.cache
def trained(*arguments: Any, **options: Any) -> dict[str, np.ndarray]:
    """Arrays after six steps."""
    with jax.enable_x64(True):
        own = trainer(*arguments, **options)
        return nets.to_arrays(own, nets.trained(own, nets.batches(dtype=np.float64), STEPS)[0])


def feedback_of(found: dict[str, np.ndarray]) -> list[str]:
    return [name for name in found if "/feedback/" in name]


CASES = [("deinforeg", "int8", {}), ("fdg", "int8", {}), ("bp", "int8", {"microbatches": 2})]
CASES += [("fr", "bfloat16", {}), ("al", "bfloat16", {}), ("bp", "float32", {})]
PLACED = pytest.mark.parametrize(
    ("name", "wire", "options"),
    [
        pytest.param(*case, marks=() if case[:2] == ("bp", "int8") else pytest.mark.slow)
        for case in CASES
    ],
)


@PLACED
def test_placement_and_schedule_play_no_role(name, wire, options):
    """All stages in one program, and apart on two devices."""
    fused = trained(name, wire, 1, **options)
    other = {"schedule": "gpipe"} if name == "bp" else {}
    assert nets.largest_error(trained(name, wire, 2, **options, **other), fused) < 1e-12
    assert bool(feedback_of(fused)) == (name in ("fdg", "fr", "bp"))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_an_order_of_microbatches_plays_no_role(schedule):
    """Feedback goes from batch to batch, not from microbatch to microbatch."""
    found = trained("bp", "int8", 2, microbatches=4, schedule=schedule)
    assert nets.largest_error(found, trained("bp", "int8", 1, microbatches=4)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [("deinforeg", {}), ("fdg", {}), ("bp", {"microbatches": 2})]
)
def test_replicas_round_what_one_device_rounds(name, options):
    found = trained(name, "int8", 4, data=2, **options)
    assert nets.largest_error(found, trained(name, "int8", 1, **options)) < 1e-12


@pytest.mark.slow
def test_a_local_method_rounds_what_goes_up(x64):
    """The first stage is what it is without, and its state has the same arrays."""
    plain, rounded = (trained("deinforeg", wire, 1) for wire in (None, "int8"))
    assert plain.keys() == rounded.keys()
    below = {name for name in plain if name.startswith("block_0/")}
    assert {name for name in plain if np.array_equal(plain[name], rounded[name])} >= below
    kernel = "block_1/params/block/layers/0/kernel"
    assert 1e-5 < np.abs(plain[kernel] - rounded[kernel]).max() < 0.1


@pytest.mark.parametrize(
    "name", ["bp", *(pytest.param(x, marks=pytest.mark.slow) for x in ("deinforeg", "fdg"))]
)
def test_a_run_continues_to_the_bit(name, tmp_path, x64):
    options = {"microbatches": 2} if name == "bp" else {}
    own, data = trainer(name, "int8", 1, **options), nets.batches(dtype=np.float64)
    state, _ = nets.trained(own, data, 3)
    own.save(state, tmp_path)
    arrays = nets.to_arrays(own, state)
    restored = own.restore(tmp_path)
    assert nets.same_bits(nets.to_arrays(own, restored), arrays)
    for batch in (data[3], data[0], data[1]):
        restored, _ = own.step(restored, batch)
    assert nets.same_bits(nets.to_arrays(own, restored), trained(name, "int8", 1, **options))
    plain = trainer(name, None, 1, **options)
    kept = nets.to_arrays(plain, plain.restore(tmp_path))
    assert kept.keys() == {name for name in arrays if name not in feedback_of(arrays)}
    assert all(np.array_equal(kept[name], arrays[name]) for name in kept)


def test_feedback_begins_with_zeros_where_there_is_none(x64):
    """Of another wire, or other microbatches; and no checkpoint without a wire holds any."""
    plain, own = (trainer("bp", wire, 1, microbatches=2) for wire in (None, "int8"))
    arrays = nets.to_arrays(plain, plain.init())
    assert not feedback_of(arrays)
    (name,) = feedback_of(nets.to_arrays(own, own.from_arrays(2, arrays)))
    assert name == "stage_1/feedback/0"
    other = {**arrays, name: np.ones((16, 1, 24))}
    begun = nets.to_arrays(own, own.from_arrays(2, other))[name]
    assert begun.shape == (8, 2, 24)
    assert not begun.any()


def test_batches_that_do_not_exist_leave_the_feedback_alone(x64):
    """The first error goes down from the second iteration on."""
    own, data = trainer("fdg", "int8", 1), nets.batches(dtype=np.float64)
    state, changed = own.init(), []
    for step in range(3):
        state, _ = own.step(state, data[step])
        changed.append(nets.to_arrays(own, state)["stage_1/feedback/0"])
    assert [bool(x.any()) for x in changed] == [False, True, True]


def test_sizes_of_messages(x64):
    assert _sizes(None) == [16 * (24 * 8 + 4), 16 * 24 * 8]
    assert _sizes("int8") == [16 * (24 + 4 + 4), 16 * (24 + 4)]


def _sizes(wire: str | None) -> list[int]:
    sizes = message_sizes(trainer("fdg", wire, 1).stages)
    return [*sizes["message_bytes"], *sizes["error_bytes"]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"wire": "int4"}, ("'int4'", "float32, bfloat16, int8")),
        ({"wire": "int8", "dtype": jnp.float16}, ("wire", "'int8'", "float16")),
        ({"wire": "int8", "engine": "spmd", "mesh": jd.make_mesh(2)}, ("spmd", "'int8'")),
    ],
)
def test_what_is_refused(options, words):
    nets.assert_clear(ValueError, words, lambda: nets.build("bp", **options))


def test_float16_of_a_local_method_may_be_rounded():
    """It sends no errors, which might overflow."""
    assert nets.build("deinforeg", wire="int8", dtype=jnp.float16).stages[0].wire == "int8"
