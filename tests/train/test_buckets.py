"""Bucketing by length: which batches there are, and that their lengths change no number."""

import functools
import json
from collections import Counter
from itertools import groupby, islice

import chex
import jax
import numpy as np
import pytest
import runs
from flax import nnx
from text_sets import csv_set, tiny

import jdecouple as jd
from jdecouple import data
from jdecouple.checkpoint import Checkpointer
from jdecouple.train import loop
from jdecouple.train.config import ConfigError, validate
from jdecouple.train.loop import build, train_and_evaluate
from jdecouple.train.run import by_length

BUCKETS = tiny("").data.buckets
SIZE = 8


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return csv_set(tmp_path_factory.mktemp("texts"), train=100)


@pytest.fixture(scope="module")
def split(name):
    return data.load(name, max_length=12, validation=0).train


def stream(split, seed=0, **options):
    return data.train_batches(split, SIZE, seed=seed, threads=1, buckets=BUCKETS, **options)


def lengths(batch):
    return (batch["x"] > 0).sum(axis=1)


class TestBatches:
    def test_an_epoch(self, split):
        """As many batches as without buckets, of different examples, each in its bucket."""
        seen = []
        for batch in islice(stream(split), 12):
            longest = lengths(batch).max()
            assert batch["x"].shape == (SIZE, min(each for each in BUCKETS if each >= longest))
            assert (lengths(batch) >= 1).all()
            seen += [
                (label, *words) for label, words in zip(batch["label"], _padded(batch), strict=True)
            ]
        whole = split.gather(np.arange(len(split)))
        left = [
            (label, *words) for label, words in zip(whole["label"], _padded(whole), strict=True)
        ]
        for each in seen:
            left.remove(each)
        assert len(left) == 100 - 12 * SIZE

    def test_some_in_a_row(self, split):
        """The same batches, of which three of a bucket follow one another."""

        def epoch(**options):
            return [
                (len(x["x"][0]), x["label"].tolist()) for x in islice(stream(split, **options), 12)
            ]

        batches = epoch(in_a_row=3)
        assert sorted(batches) == sorted(epoch())
        assert epoch(in_a_row=1) == epoch()
        counts = [len([*group]) for _, group in groupby(length for length, _ in batches)]
        numbers = Counter(length for length, _ in batches).values()
        assert len(counts) <= sum(-(-number // 3) for number in numbers) < 12
        with pytest.raises(ValueError, match="in_a_row is 0"):
            stream(split, in_a_row=0)

    def test_most_batches_are_of_one_bucket(self, split):
        mixed = 0
        for batch in islice(stream(split), 12):
            buckets = np.searchsorted(BUCKETS, lengths(batch))
            mixed += len(set(buckets)) > 1
            # What was left over below is fewer than a batch.
            assert (buckets == buckets.max()).any()
        assert mixed <= len(BUCKETS) - 1

    def test_the_order_changes_with_epoch_and_seed_alone(self, split):
        read = [[b["x"].tolist() for b in islice(stream(split, seed), 24)] for seed in (1, 1, 2)]
        assert read[0] == read[1] != read[2]
        assert read[0][:12] != read[0][12:]
        # Batches of one length do not follow one another.
        widths = [len(batch[0]) for batch in read[0]]
        assert widths != sorted(widths)

    @pytest.mark.parametrize("taken", [1, 11, 12, 17])
    def test_resumes_from_its_state(self, split, taken):
        batches = stream(split)
        for _ in range(taken):
            next(batches)
        state = json.loads(json.dumps(batches.get_state()))
        expected = [batch["x"].tolist() for batch in islice(batches, 9)]
        resumed = stream(split)
        resumed.set_state(state)
        assert [batch["x"].tolist() for batch in islice(resumed, 9)] == expected

    def test_who_reads_a_share_gets_the_same_shapes(self, split):
        share = np.array([1, 6])
        for part, whole in islice(zip(stream(split, share=share), stream(split), strict=True), 6):
            assert part["x"].shape == whole["x"].shape
            np.testing.assert_array_equal(part["x"][share], whole["x"][share])

    def test_buckets_that_do_not_hold_the_texts(self, split):
        with pytest.raises(ValueError, match=r"buckets is \(4, 6\): the longest .* 12 words"):
            data.train_batches(split, SIZE, seed=0, buckets=(4, 6))

    def test_images(self):
        with pytest.raises(ValueError, match="train split has no lengths"):
            data.train_batches(data.load("digits").train, SIZE, seed=0, buckets=(4,))


def _padded(batch):
    return np.pad(batch["x"], ((0, 0), (0, 12 - batch["x"].shape[1]))).tolist()


def trainer(example, kind="lstm", method="bp", stages=1, depth=1, **options):
    """Options as `by_length` gives them."""
    model = jd.models.get(kind)(
        2,
        vocabulary_size=40,
        max_length=12,
        hidden=6,
        depth=depth,
        **({"heads": 2} if kind == "transformer" else {}),
        param_dtype=np.float64,
        rngs=nnx.Rngs(0),
    )
    arguments = {"projector": "identity"} if method == "deinforeg" else {}
    return jd.Trainer(
        model,
        jd.methods.get(method, **arguments),
        jd.optim.sgd(0.05, momentum=0.9),
        example=example,
        mesh=jd.make_mesh(stages, devices=jax.devices()[:stages]),
        **options,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("lstm", "bp", 1), marks=pytest.mark.slow),
        pytest.param(("lstm", "deinforeg", 2), marks=pytest.mark.slow),
        pytest.param(("transformer", "deinforeg", 2), marks=pytest.mark.slow),
    ],
)
def test_equal_to_training_on_padded_batches(x64, split, arguments):
    """Masks make it exact; what differs is the order of sums."""
    example = split.gather(np.arange(SIZE))
    make = functools.partial(trainer, kind=arguments[0], method=arguments[1], stages=arguments[2])
    whole = make(example)
    trainer_of = by_length(whole, example, make)
    assert trainer_of(example) is whole
    state, other = whole.init(), whole.init()
    used = set()
    for batch in islice(stream(split), 6):
        used.add(trainer_of(batch))
        assert trainer_of(batch) is trainer_of(batch)
        state, metrics = trainer_of(batch).step(state, batch)
        padded = np.array(_padded(batch), np.int32)
        other, wanted = whole.step(other, {**batch, "x": padded})
        for key, value in wanted.items():
            assert float(metrics[key]) == pytest.approx(float(value), rel=1e-6), key
    assert len(used) == len(BUCKETS)
    found, wanted = whole.to_arrays(state), whole.to_arrays(other)
    chex.assert_trees_all_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "method", ["fdg", *(pytest.param(x, marks=pytest.mark.slow) for x in ("ddg", "fr"))]
)
def test_a_delayed_method_applies_what_waits_where_the_length_changes(x64, split, method):
    """Equal to padded batches, with an end of the queues before each change."""
    example = split.gather(np.arange(SIZE))
    make = functools.partial(trainer, method=method, stages=2, depth=2)
    now = whole = make(example)
    trainer_of = by_length(whole, example, make)
    state, other = whole.init(), whole.init()
    changes = 0
    for batch in islice(stream(split, in_a_row=2), 5):
        new = trainer_of(batch)
        if new is not now:
            changes += 1
            other = whole.finish(other)
        state, now = new.take_over(now, state), new
        state, _ = now.step(state, batch)
        other, _ = whole.step(other, {**batch, "x": np.array(_padded(batch), np.int32)})
    assert 2 <= changes < 5
    assert now is not whole
    with pytest.raises(ValueError, match="this is the state of another trainer: queues/"):
        whole.step(state, example)
    found, wanted = (
        {k: x for k, x in each.to_arrays(one).items() if not k.startswith("stage_")}
        for each, one in ((now, state), (whole, other))
    )
    chex.assert_trees_all_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert whole.evaluate(state, example) == pytest.approx(whole.evaluate(other, example))


def test_weights_that_depend_on_the_length_are_refused(split):
    example = split.gather(np.arange(SIZE))

    def make(example, **_):
        size = example["x"].shape[1]
        model = jd.models.mlp(2, input_size=size, hidden=4, depth=1, rngs=nnx.Rngs(0))
        floats = {**example, "x": example["x"].astype(np.float32)}
        return jd.Trainer(model, jd.methods.get("bp"), jd.optim.sgd(0.1), example=floats)

    find = by_length(make(example), example, make)
    with pytest.raises(ValueError, match="those for 4 words have other shapes"):
        find({"x": example["x"][:, :4]})


class TestRuns:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "values",
        [
            {},
            {"method__name": "fdg", "mesh__stages": 2, "model__depth": 2},
            {"schedule": "1f1b", "microbatches": 2, "wire": "bfloat16"}
            | {"mesh__stages": 2, "model__depth": 2},
        ],
    )
    def test_a_resumed_run_is_equal_to_the_last_bit(self, name, tmp_path, monkeypatch, values):
        """Also where batches of a shorter length wait in the checkpoint."""
        monkeypatch.setattr(loop, "IN_A_ROW", 2)
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        result = train_and_evaluate(tiny(name, **values), whole)
        assert result["finished"]
        train_and_evaluate(tiny(name, steps=4, **values), parts)
        extras = Checkpointer(parts / "checkpoints", read_only=True).extras()
        waits = "method__name" in values or "wire" in values
        assert extras[4].get("length") == (4 if waits else None)
        train_and_evaluate(tiny(name, **values), parts)
        runs.assert_same_run(parts, whole)

    @pytest.mark.slow
    def test_buckets_are_part_of_what_a_run_is(self, name, tmp_path):
        train_and_evaluate(tiny(name, steps=1), tmp_path)
        with pytest.raises(
            ConfigError, match=r"holds a run with config.data = buckets \[4, 8, 12\]"
        ):
            train_and_evaluate(tiny(name, data__buckets=(6, 12)), tmp_path)

    def test_the_last_bucket_is_the_longest_text(self, name):
        run = build(tiny(name))
        assert run.dataset.max_length == 12
        assert run.trainer_of(run.dataset.train.gather(np.arange(SIZE))) is run.trainer


class TestRefused:
    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({"data__buckets": (8, 4)}, r"buckets is \(8, 4\): increasing whole numbers from 1"),
            ({"data__buckets": (0, 4)}, r"increasing whole numbers from 1 on"),
            ({"data__max_length": 20}, r"its last must be config.data.max_length, 20"),
            ({"chunk": 2}, "config.chunk is 2, which needs batches of one length: leave it at 1"),
            ({"profile": 3}, "config.profile is 3, which needs batches of one length"),
        ],
    )
    def test_values(self, name, values, said):
        with pytest.raises(ConfigError, match=said) as error:
            validate(tiny(name, **values))
        assert "\n" not in str(error.value)

    def test_images(self, name):
        with pytest.raises(ConfigError, match="'digits' holds images"):
            build(tiny("digits"))
