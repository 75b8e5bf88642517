"""Runs on texts: what they learn, the vectors they begin with, and what does not fit."""

import numpy as np
import pytest
import runs
from text_sets import csv_set, tiny

from jdecouple.inference.description import Description
from jdecouple.train.config import ConfigError
from jdecouple.train.loop import build, train_and_evaluate
from jdecouple.train.resume import describe


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return csv_set(tmp_path_factory.mktemp("texts"), train=160, test=40)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bp", "deinforeg"])
def test_a_run_finds_the_words_that_tell(name, tmp_path, method):
    """A tenth of the labels is noise, which it does not follow."""
    values = {"method__name": method, "model__hidden": 16, "optimizer__learning_rate": 0.03}
    if method == "deinforeg":
        values["method__projector"] = "identity"
    config = tiny(name, steps=72, eval_every=72, data__label_noise=0.1, **values)
    result = train_and_evaluate(config, tmp_path)
    assert result["test"]["accuracy"] >= 0.9
    train = [line for line in runs.lines(tmp_path) if line["split"] == "train"]
    assert len(train) == 72
    assert train[-1]["loss"] < train[0]["loss"]


def test_vectors_of_words_are_where_the_embedding_begins(name, tmp_path):
    (tmp_path / "vectors.txt").write_text("film 1 2 3\ngood 4 5 6\n")
    run = build(tiny(name, data__glove=str(tmp_path / "vectors.txt")))
    arrays = run.trainer.to_arrays(run.trainer.init())
    (table,) = [leaf for key, leaf in arrays.items() if key.endswith("params/block/table")]
    words = run.dataset.words
    assert table.shape == (len(words), 3)
    np.testing.assert_array_equal(table[words.index("film")], [1, 2, 3])
    np.testing.assert_array_equal(table[0], [0, 0, 0])


def test_what_is_taken_out_of_texts_stays_with_the_network(name):
    run = build(tiny(name, data__clean="paper"))
    assert not {"the", "of", "it"} & {*run.dataset.words}
    inputs = Description.from_json(describe(run)).inputs
    assert inputs == run.dataset.inputs
    numbers = inputs.encode("The film: it isn't GOOD-good!")[0]
    words = ["film", "[unknown]", "[unknown]"]  # isnt, goodgood
    assert [inputs.words[number] for number in numbers[:3]] == words
    assert not numbers[3:].any()


def test_vectors_of_another_width(name, tmp_path):
    (tmp_path / "vectors.txt").write_text("film 1 2 3\n")
    transformer = {"model__name": "transformer", "model__heads": 2}
    config = tiny(name, data__glove=str(tmp_path / "vectors.txt"), **transformer)
    with pytest.raises(ConfigError, match=r"embeddings are .* 3\]: .* 6\]") as error:
        build(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"data__buckets": None, "model__name": "mlp", "model__hidden": 4},
            "holds texts, which lstm",
        ),
        ({"data__name": "digits", "data__buckets": None}, "'digits' holds images, which mlp, "),
        ({"data__augment": "basic"}, "augmentation 'basic': allowed for the texts .* is none"),
    ],
)
def test_models_and_data_that_do_not_fit(name, values, said):
    with pytest.raises(ConfigError, match=said) as error:
        build(tiny(name, **values))
    assert "\n" not in str(error.value)
