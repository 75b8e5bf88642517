"""Going on with a text, token by token, against whole rows without what blocks know."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
import token_nets

import jdecouple as jd
from jdecouple.inference.generate import Generator, Sampling
from jdecouple.inference.rules import Rule, score
from jdecouple.inference.rules import exits as leaving

SIZE = token_nets.CONTEXT
PROMPT = np.array([0, 3, 4], np.int32)
EXITS = {  # method, and its arguments
    "gpt": ("greedy_exit", {}),
    "learned": ("greedy_exit", {}),
    "reversible": ("greedy_exit", {}),
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


def generator(kind: str, exit: int = 2, rule: Rule | None = None) -> Generator:
    *_, modules = trained(kind)
    heads = [head if rule or k == exit else None for k, head in enumerate(modules[3:])]
    return Generator(modules[: exit + 1], heads[: exit + 1], SIZE, rule)


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
        found, exits = generator(kind, exit)(PROMPT, 20, sampling)
        assert found.tolist() == without_cache(kind, 20, sampling, exit)
        assert exits.tolist() == [0] * len(found)  # there is one


# --- Tokens that leave early ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", nets.marked(token_nets.NETS, ("gpt",)))
def test_a_threshold_that_none_exceeds_changes_nothing(kind):
    """Infinity, and a probability of 1; one that all exceed is the first exit."""
    sampling = Sampling(temperature=1.5, top_k=9, seed=3)
    plain, _ = generator(kind)(PROMPT, 20, sampling)
    for threshold in (math.inf, 1.0):
        found, exits = generator(kind, rule=Rule("confidence", threshold))(PROMPT, 20, sampling)
        assert found.tolist() == plain.tolist()
        assert exits.tolist() == [2] * len(plain)
    first, _ = generator(kind, exit=0)(PROMPT, 20, sampling)
    found, exits = generator(kind, rule=Rule("confidence", 0.0))(PROMPT, 20, sampling)
    assert found.tolist() == first.tolist() != plain.tolist()
    assert exits.tolist() == [0] * len(first)


@functools.cache
def layer_by_layer(kind: str) -> Any:
    """Logits [exits, SIZE, tokens] of a row; above its exit a position keeps its states."""
    *_, modules = trained(kind)

    @jax.jit
    def logits(row: jax.Array, left: jax.Array) -> jax.Array:
        x, found = row[None], []
        for number, (block, head) in enumerate(zip(modules[:3], modules[3:], strict=True)):
            out = block(x)
            if number:
                reads = (left >= number)[None, :, None]
                out = {**out, "h": jnp.where(reads, out["h"], x["h"])}
            x = out
            found.append(head.logits(x)[0])
        return jnp.stack(found)

    return logits


def left_early(
    kind: str, rule: Rule, prompt: np.ndarray, count: int
) -> tuple[list[int], list[int]]:
    """The likeliest tokens and their exits, every token of a whole row anew."""
    row, left = list(prompt), [2] * len(prompt)
    found, exits = [], []
    while len(found) < count:
        if len(row) > SIZE:
            row, left = row[-SIZE // 2 :], [2] * (SIZE // 2)
        padding = [0] * (SIZE - len(row))
        given = np.array(row + padding, np.int32), np.array(left + padding, np.int32)
        logits = np.asarray(layer_by_layer(kind)(*given)[:, len(row) - 1])
        left[-1] = int(leaving(rule, logits[:, None])[0])
        token = int(np.argmax(logits[left[-1]]))
        if not token:
            break
        exits.append(left[-1])
        found.append(token)
        row.append(token)
        left.append(2)
    return found, exits


@pytest.mark.parametrize("kind", nets.marked(token_nets.NETS, ("gpt",)))
def test_what_left_below_is_known_above_by_its_states(kind):
    """Half of all leave at the first exit, and half of the others at the second."""
    rows = token_nets.batches(1)[0]["x"]
    logits = np.concatenate([layer_by_layer(kind)(x, np.full(SIZE, 2)) for x in rows], axis=1)
    left: set[int] = set()
    for name, patience in (("confidence", 1), ("entropy", 2)):
        scores = np.stack([score(name, jnp.asarray(each)) for each in logits[:2]])
        median = tuple(np.median(scores, axis=1).tolist())
        rule = Rule(name, (*median, 0.0), patience, (1.0, 0.9, 1.0))
        make = generator(kind, rule=rule)
        for prompt in (PROMPT, *rows[:2, :4]):
            found, exits = make(prompt, 15, Sampling(temperature=0))
            assert (found.tolist(), exits.tolist()) == left_early(kind, rule, prompt, 15)
            left |= {*exits.tolist()}
    assert left == {0, 1, 2}


def test_seeds_and_lengths():
    make = generator("gpt")

    def made(prompt: np.ndarray, count: int, sampling: Sampling) -> list[int]:
        return make(prompt, count, sampling)[0].tolist()

    whole = made(PROMPT, 20, Sampling(temperature=3.0, seed=1))
    assert made(PROMPT, 6, Sampling(temperature=3.0, seed=1)) == whole[:6]
    others = {tuple(made(PROMPT, 20, Sampling(3.0, seed=seed))) for seed in range(4)}
    assert len(others) > 2
    assert all(0 not in each for each in others)
    long = np.concatenate([PROMPT, np.arange(3 * SIZE) % 10 + 1]).astype(np.int32)
    greedy = Sampling(temperature=0)
    assert made(long, 4, greedy) == made(long[-SIZE:], 4, greedy)


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
        Generator(model.blocks, [None, model.classifier], SIZE)
