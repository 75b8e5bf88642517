"""Runs of language models: bits a byte, going on, and what is made of a workdir."""

import json
import math

import nets
import pytest
import runs
from ml_collections import ConfigDict

import jdecouple as jd
from jdecouple.train import bits, commands, presets
from jdecouple.train import config as configuration
from jdecouple.train.elastic import train_stage
from jdecouple.train.errors import ConfigError
from jdecouple.train.hosts import ProcessSpec
from jdecouple.train.loop import train_and_evaluate
from jdecouple.train.plan import Devices, plan
from jdecouple.train.quantities import show
from jdecouple.train.run import build

TEXTS = {f"{n:02}.py": f"def f{n}(x):\n    return x + {n}\n" * 4 for n in range(12)}
METHODS = [name for name in jd.methods.names() if name not in ("al", "infopro")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder


def tiny(corpus, method="dgl,2", **values) -> ConfigDict:
    """Rows of 16 tokens of the corpus, in batches of 8, by a GPT of width 8 with dropout."""
    config = presets.load(f"lm:text:{corpus},gpt,{method}")
    config = configuration.filled(config, all_options=True)
    config.update_from_flattened_dict(
        {
            "data.max_length": 16,
            "model.hidden": 8,
            "model.depth": 2,
            "model.heads": 2,
            "model.dropout": 0.1,
            "mesh.stages": 1,
            "batch_size": 8,
            "steps": 6,
            "eval_every": 3,
            "log_every": 1,
            "optimizer.schedule": "constant",
            "optimizer.end_learning_rate": 0.0,
            **{key.replace("__", "."): value for key, value in values.items()},
        }
    )
    return configuration.filled(config)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """Six steps, of fourteen in an epoch."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    train_and_evaluate(tiny(corpus), workdir)
    return workdir


def test_metrics_are_in_bits_a_byte(finished, corpus):
    dataset = build(tiny(corpus)).dataset
    lines = runs.lines(finished)
    tests = [line for line in lines if line["split"] == "test"]
    trains = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in tests] == [3, 6]
    for line in tests:
        for name in ("exit_0/", "exit_1/", ""):
            loss = line[f"{name}loss"]
            assert line[f"{name}perplexity"] == pytest.approx(math.exp(loss))
            wanted = loss / math.log(2) / dataset.bytes_per_token["test"]
            assert line[f"{name}bits_per_byte"] == pytest.approx(wanted)
        assert line["bits_per_byte"] == line["exit_1/bits_per_byte"]
    first, last = trains[0], trains[-1]
    assert first["block_0/perplexity"] == pytest.approx(math.exp(first["block_0/cross_entropy"]))
    assert last["bits_per_byte"] == last["block_1/bits_per_byte"] < first["bits_per_byte"]
    assert bits.units({"loss": 1.0}, jd.data.load("digits"), "test") == {}


@pytest.mark.slow
def test_a_resumed_run_is_the_same_to_the_bit_and_other_documents_are_refused(
    finished, corpus, tmp_path
):
    """In the middle of an epoch, from a checkpoint."""
    train_and_evaluate(tiny(corpus, steps=4), tmp_path / "a")
    train_and_evaluate(tiny(corpus), tmp_path / "a")
    (step, found), (other, wanted) = map(runs.final_arrays, (tmp_path / "a", finished))
    assert step == other == 6
    assert found.keys() == wanted.keys()
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)
    changed = tmp_path / "changed"
    changed.mkdir()
    for name, text in TEXTS.items():
        (changed / name).write_text(text.replace("return", "yield "))
    (tmp_path / "place").symlink_to(corpus)
    train_and_evaluate(tiny(tmp_path / "place", steps=1), tmp_path / "c")
    (tmp_path / "place").unlink()
    (tmp_path / "place").symlink_to(changed)
    with pytest.raises(ConfigError, match="a run with digest of the tokens = "):
        train_and_evaluate(tiny(tmp_path / "place", steps=2), tmp_path / "c")


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_another_of_the_same_tokenizer(
    finished, corpus, tmp_path, capsys
):
    train_and_evaluate(tiny(corpus, init_from=str(finished), steps=1), tmp_path / "fine")
    assert "fresh: optimizer" in capsys.readouterr().out
    pieces = {"data__tokenizer": "bpe", "data__vocabulary_size": 257}
    with pytest.raises(ConfigError, match="its tokens have other numbers: the same tokenizer"):
        train_and_evaluate(tiny(corpus, init_from=str(finished), **pieces), tmp_path / "other")


def test_commands(finished, capsys):
    commands.main(["jdecouple", "evaluate", str(finished), "--step=last"])
    content = json.loads((finished / "evaluation_test" / "evaluation.json").read_text())
    last = runs.lines(finished)[-1]
    assert last["split"] == "test"
    for row in content["exits"]:
        for name in ("loss", "accuracy", "bits_per_byte", "perplexity"):
            assert row[name] == pytest.approx(last[f"exit_{row['exit']}/{name}"], rel=1e-6)
    assert f"exit 1: {last['bits_per_byte']:.4f}" in capsys.readouterr().out
    commands.main(["jdecouple", "report", str(finished)])
    page = (finished / "report.html").read_text()
    assert "Test bits per byte, last step" in page
    assert "the network goes on with texts" in page
    capsys.readouterr()
    arguments = ["--prompt", "def f", "--max_tokens", "5", "--top_k", "3", "--seed", "1"]
    commands.main(["jdecouple", "generate", str(finished), *arguments])
    said = capsys.readouterr().out
    assert said.startswith("def f")
    run = jd.load(finished)
    assert said == "def f" + run.generate("def f", 5, top_k=3, seed=1) + "\n"
    commands.main(["jdecouple", "generate", str(finished), *arguments, "--threshold=0"])
    said = capsys.readouterr()
    early = run.generate("def f", 5, top_k=3, seed=1, exit=0)
    assert said.out == f"def f{early}\n"
    assert said.err == f"exits of {len(early.exits)} tokens: 0 100%, 1 0%\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--max_tokens=0"], "max_tokens is 0"),
        (["generate", "--temperature=-1"], "temperature is -1.0"),
        (["generate", "--exit=7"], "exit is 7: allowed are 0, 1"),
        (["generate", "--rule=entropy"], "--rule and --patience need a --threshold"),
        (["predict"], "the network goes on with texts: evaluate and generate are for it"),
        (["calibrate", "--accuracy_loss=0.1"], "the network goes on with texts"),
        (["evaluate", "--exit=0"], "--exit is for networks that classify"),
    ],
)
def test_what_is_no_use_ends_in_one_line(finished, arguments, words, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", iter(["a text\n"]))
    command, *rest = arguments
    with pytest.raises(SystemExit) as end:
        commands.main(["jdecouple", command, str(finished), *rest])
    assert end.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("method", nets.marked(METHODS, ("bp", "dgl", "scpl")))
@pytest.mark.parametrize("model", nets.marked(("gpt", "lstm_lm"), ("gpt",)))
def test_the_configuration_builds_for_every_method(corpus, model, method):
    """With modules or stages as it is asked for."""
    config = tiny(corpus, f"{method},2").to_dict()
    if model == "lstm_lm":
        config["model"] = {"name": model, "hidden": 8, "depth": 2}
        config["model"] |= {"cut": "2"} if "cut" in tiny(corpus, f"{method},2").model else {}
    run = build({**config, "steps": 4})
    modules = jd.methods.get(method).route.local or method == "early_exit"
    assert len(run.trainer.model.blocks) == (2 if modules else 3)
    assert len(run.trainer.stages) == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_configuration_trains_by_every_method(corpus, method, tmp_path):
    result = train_and_evaluate(tiny(corpus, f"{method},2"), tmp_path)
    assert result["test"]["bits_per_byte"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("topics,vgg8,dgl", "model 'vgg8' is not one of gpt, lstm_lm"),
        ("topics,gpt,al", "method 'al' has no loss of tokens"),
        ("topics,gpt", "'dataset,model,method' is needed"),
        ("topics,gpt,dgl,0", "K is 0"),
    ],
)
def test_arguments_that_do_not_fit(arguments, words):
    with pytest.raises(ConfigError, match=words):
        presets.load(f"lm:{arguments}")


def test_a_model_that_reads_no_tokens_is_refused(corpus):
    config = configuration.default()
    config.data.name, config.model.name = f"text:{corpus}", "transformer"
    config.data.max_length = 16
    config.batch_size = 8
    with pytest.raises(ConfigError, match="holds tokens, which gpt, lstm_lm read"):
        build(config)


def tied(corpus, **values) -> ConfigDict:
    """Two modules on two stages, and one table for the embedding and all heads."""
    values = {"model__tied": True, "method__aux": "tied", "mesh__stages": 2, **values}
    return tiny(corpus, num_stages=2, **values)


def test_a_plan_counts_what_stages_share(corpus):
    """They wait for one another, so that no stage works while another does."""
    devices = Devices(2, flops=1e9, memory=1e9, bandwidth=1e6, latency=1e-3)
    found = plan(tied(corpus), devices)
    (time,) = found.times
    assert (time["schedule"], time["bubble"] >= 0.5) == ("local", True)
    size = 257 * 8 * 4
    assert time["seconds"] >= sum(row["seconds"] for row in found.stages) + 2 * (1e-3 + size / 1e6)
    (line,) = (line for line in found.assumed if "share" in line)
    assert line.startswith(f"stages 0, 1 share {show(size, 'B')}: gradients go to stage 0")


def test_elastic_stages_share_nothing(corpus, tmp_path):
    config = tied(corpus, mesh__elastic="wait")
    with pytest.raises(ConfigError) as caught:
        train_stage(config, tmp_path, ProcessSpec("127.0.0.1:1", 2, 1))
    assert str(caught.value) == (
        "config.mesh.elastic is 'wait', but stages share block_0/params/block/layers/0/table: each "
        "step would wait for all of them"
    )
