"""Gradients of several batches to one optimiser step."""

import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest

import jdecouple as jd

COUNT = 3
EXACT = {
    "bp": {},
    "early_exit": {"num_stages": 2, "fuse": False, "microbatches": 2},
    "greedy_exit": {"num_stages": 2, "mesh": jd.make_mesh(2), "engine": "spmd"},
    "fr": {},  # of one stage, where nothing is late
}


@pytest.mark.parametrize("name", nets.marked(EXACT, ("bp",)))
def test_batches_are_one_large_batch(name, x64):
    """Where the loss is a mean over examples: in float64 to 1e-12."""
    data = nets.batches(2 * COUNT, 8, dtype=np.float64)
    large = [
        {key: np.concatenate([batch[key] for batch in data[i : i + COUNT]]) for key in data[0]}
        for i in (0, COUNT)
    ]
    options = {"optimizer": jd.optim.adam(optax.linear_schedule(0.1, 0.01, 2)), **EXACT[name]}
    states = []
    for parts, more in ((data, {"accumulate": COUNT}), (large, {})):
        model = nets.mlp(param_dtype=jnp.float64)
        trainer = nets.build(name, model=model, example=parts[0], **options, **more)
        states.append(nets.weights(trainer, nets.trained(trainer, parts, len(parts))[0]))
    assert nets.largest_error(*states) < 1e-12


@pytest.mark.slow
def test_several_steps_in_a_call_accumulate_alike():
    data = nets.batches()
    trainer = nets.build("greedy_exit", accumulate=2, num_stages=2)
    one, _ = nets.trained(trainer, data, 3)
    other, _ = trainer.steps(trainer.init(), data[:3])
    found, wanted = nets.to_arrays(trainer, other), nets.to_arrays(trainer, one)
    assert nets.largest_error(found, wanted) < 1e-6
    assert wanted["block_0/opt/mini_step"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 2])
def test_a_delayed_method_accumulates_as_adl_does(stages):
    """fdg that accumulates is adl that takes means, to the bit."""
    data = nets.batches()
    fdg = nets.build("fdg", num_stages=stages, accumulate=2)
    adl = jd.Trainer(
        nets.mlp(depth=2, batch_norm=True),
        nets.method("adl", accumulate_mean=True),
        jd.optim.sgd(0.1, momentum=0.9),
        num_stages=stages,
        example=data[0],
    )
    states = [nets.to_arrays(each, nets.trained(each, data, 7)[0]) for each in (fdg, adl)]
    assert nets.same_bits(*states)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("bp", {"accumulate": 0}, ("accumulate is 0", "of at least 1")),
        ("bp", {"accumulate": 1.5}, ("accumulate is 1.5", "a whole number")),
        ("bp", {"accumulate": 2, "clip_norm": 1.0}, ("accumulate is 2", "clip_norm", "None")),
        ("adl", {"accumulate": 3}, ("accumulate is 3", "method adl accumulates 2", "at 1")),
    ],
)
def test_what_does_not_fit(name, options, words):
    nets.assert_clear(ValueError, words, lambda: nets.build(name, **options))
