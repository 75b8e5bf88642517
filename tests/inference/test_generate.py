"""Going on with a text, token by token, against whole rows without what blocks know."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
import token_nets

import jdecouple as jd
from jdecouple.inference.generate import Generator, Sampling

SIZE = token_nets.CONTEXT
PROMPT = np.array([0, 3, 4], np.int32)
EXITS = {  # method, and its arguments
    "gpt": ("greedy_exit", {}),
    "learned": ("greedy_exit", {}),
    "lstm_lm": ("dgl", {"aux": "transformer"}),  # which has to see the positions before as well
}


@functools.cache
def trained(kind: str) -> tuple[jd.Trainer, list, list]:
    """Blocks and heads of three exits, with weights far from the initial ones."""
    net = token_nets.model(kind, depth=2, init="torch", dropout=0.5)
    name, arguments = EXITS[kind]
    options = {"model": net, "arguments": arguments, "num_stages": 1}
    trainer = token_nets.trainer(name, optimizer=jd.optim.sgd(0.5), **options)
    state = trainer.init()
    for batch in token_nets.batches(3):
        state, _ = trainer.step(state, batch)
    modules = [*trainer.modules(state)[:3], *trainer.heads(state)]
    for module in modules:
        module.eval()
    return trainer, state, modules


def generator(kind: str, exit: int = 2) -> Generator:
    *_, modules = trained(kind)
    return Generator(modules[: exit + 1], modules[3 + exit], SIZE)


def without_cache(kind: str, count: int, sampling: Sampling, exit: int = 2) -> list[int]:
    """Every token of a whole row anew; a row begins anew with the last half of a full one."""
    trainer, state, _ = trained(kind)
    row, found = list(PROMPT), []
    key = jax.random.key(sampling.seed)
    while len(found) < count:
        if len(row) > SIZE:
            row = row[-SIZE // 2 :]
        x = np.array([row + [0] * (SIZE - len(row))] * 4, np.int32)
        logits = trainer.predict(state, {"x": x})[exit, 0, len(row) - 1]
        token = int(sampling.choose(jnp.asarray(logits), jax.random.fold_in(key, len(found))))
        if not token:
            break
        row.append(token)
        found.append(token)
    return found


@pytest.mark.parametrize("kind", nets.marked(token_nets.NETS, ("gpt",)))
def test_it_is_the_same_as_without_what_blocks_know(kind):
    """The likeliest tokens and drawn ones, over several rows, by two exits."""
    sampled = Sampling(temperature=1.5, top_k=9, seed=3)
    for sampling, exit in ((Sampling(temperature=0), 1), (sampled, 2)):
        found = generator(kind, exit)(PROMPT, 20, sampling).tolist()
        assert found == without_cache(kind, 20, sampling, exit)


def test_seeds_and_lengths():
    make = generator("gpt")
    whole = make(PROMPT, 20, Sampling(temperature=3.0, seed=1)).tolist()
    assert make(PROMPT, 6, Sampling(temperature=3.0, seed=1)).tolist() == whole[:6]
    others = {tuple(make(PROMPT, 20, Sampling(3.0, seed=seed)).tolist()) for seed in range(4)}
    assert len(others) > 2
    assert all(0 not in each for each in others)
    long = np.concatenate([PROMPT, np.arange(3 * SIZE) % 10 + 1]).astype(np.int32)
    greedy = Sampling(temperature=0)
    assert make(long, 4, greedy).tolist() == make(long[-SIZE:], 4, greedy).tolist()


def test_tokens_are_drawn_as_the_logits_say():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), 4000)

    def shares(sampling: Sampling) -> np.ndarray:
        tokens = jax.vmap(functools.partial(sampling.choose, logits))(keys)
        return np.bincount(tokens, minlength=4) / len(keys)

    np.testing.assert_allclose(shares(Sampling()), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(shares(Sampling(top_k=2)), [0.625, 0.375, 0, 0], atol=0.03)
    squares = np.square([0.5, 0.3, 0.15, 0.05])
    wanted = squares / squares.sum()
    np.testing.assert_allclose(shares(Sampling(temperature=0.5)), wanted, atol=0.03)
    assert shares(Sampling(temperature=0)).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("values", [{"temperature": -1.0}, {"top_k": -1}, {"seed": -1}])
def test_bad_values(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        dataclasses.replace(Sampling(), **values)


def test_blocks_that_take_no_single_tokens():
    model = jd.models.mlp(5, input_size=4, depth=1, rngs=token_nets.nnx.Rngs(0))
    with pytest.raises(ValueError, match="takes no single tokens"):
        Generator(list(model.blocks), None, SIZE)
