"""The command jdecouple: what it lists, what it tells of keys, and how it ends."""

import itertools
import re
import subprocess
import sys
import tomllib

import pytest
import runs

import jdecouple as jd
from jdecouple.data.loaders import options as data_options
from jdecouple.train import cli, commands, listing, programs
from jdecouple.train.config import ConfigError, default, filled, validate
from jdecouple.train.keys import KEYS
from jdecouple.train.options import OWNERS, meanings, options


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    """Logging stays pytest's, and no folder of the user is used."""
    monkeypatch.setattr(cli, "log_in_short", lambda: None)
    monkeypatch.setattr(programs, "keep", lambda: None)


# Of a Ctrl-C a library that is being imported may make something else.
IMPORT = """
import signal
try:
  signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
  raise ImportError
"""


def python(*arguments, cwd):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=runs.environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def run(capsys, *arguments):
    commands.main(["jdecouple", *arguments])
    return capsys.readouterr().out


def refused(capsys, *arguments, code=2):
    with pytest.raises(SystemExit) as stopped:
        commands.main(["jdecouple", *arguments])
    captured = capsys.readouterr()
    assert (stopped.value.code, captured.out) == (code, "")
    [line] = captured.err.splitlines()
    return line


class TestCommands:
    def test_the_script_of_the_package(self):
        project = tomllib.loads((runs.REPOSITORY / "pyproject.toml").read_text())["project"]
        assert project["scripts"] == {"jdecouple": "jdecouple.__main__:main"}

    def test_help(self, capsys):
        text = run(capsys)
        assert text == run(capsys, "--help")
        for name in ("train", "evaluate", "predict", "calibrate", "export", "list"):
            assert f"\n  {name} " in text

    def test_version(self, capsys):
        assert run(capsys, "--version").strip() == jd.__version__

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["trian"], "error: unknown command 'trian': allowed are train, launch, plan"),
            (["trian"], "; did you mean 'train'?"),
            (["list", "model"], "error: there is no list of 'model': allowed are methods, models"),
            (["list", "model"], "; did you mean 'models'?"),
            (["list", "models", "now"], "there is no list of 'models now'"),
            (["predict", "w", "--fromat=csv"], "unrecognized arguments: --fromat=csv; usage: jdec"),
            (["predict", "w", "--fromat=csv"], "; did you mean '--format'?"),
            (["train", "--wrokdir=w"], "unknown flag --wrokdir=w; usage: jdecouple train --config"),
            (["train", "--wrokdir=w"], "; did you mean '--workdir'?"),
            (["train", "--batch_size=8"], "; did you mean '--config.batch_size'?"),
            (["train"], "--config is needed; usage: jdecouple train --config FILE"),
            (["train", "--help", "momentun"], "; did you mean 'optimizer.momentum'?"),
            (["train", "--config=quikstart", "--workdir=w"], "; did you mean 'quickstart'?"),
        ],
    )
    def test_refused(self, capsys, arguments, said):
        assert said in refused(capsys, *arguments)

    @pytest.mark.parametrize(
        ("config", "workdir"),
        [("quickstart", "quickstart"), ("vision:cifar10,vgg8,scpl", "vision-cifar10-vgg8-scpl")],
    )
    def test_a_workdir_of_its_own(self, config, workdir):
        assert cli.parse(["jdecouple train", "--config", config])[1] == f"runs/{workdir}"

    def test_what_needs_no_jax_imports_none(self, tmp_path):
        script = "import sys, jdecouple; from jdecouple.train.commands import main\n"
        script += (
            "for argv in (['--version'], ['list', 'presets'], ['--help']): main(['', *argv])\n"
        )
        script += "assert not {'jax', 'flax', 'orbax', 'numpy'} & {*sys.modules}, [*sys.modules]"
        done = python("-c", script, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "\nquickstart  DeInfoReg" in done.stdout

    @pytest.mark.parametrize("module", [IMPORT, "def main():\n  raise KeyboardInterrupt"])
    def test_ctrl_c(self, tmp_path, module):
        (tmp_path / "slow.py").write_text(module)
        # Background jobs of a shell ignore the signal, as their children do.
        script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        script += "from jdecouple.__main__ import main; main('slow:main')"
        done = python("-c", script, cwd=tmp_path)
        assert done.returncode == 130
        assert done.stderr == "error: interrupted before anything new could be saved\n"


class TestMeant:
    """What was probably meant by a key or a name of a configuration."""

    @pytest.mark.parametrize(
        ("given", "meant"),
        [
            ({"batchsize": 3}, "batch_size"),
            ({"learning_rate": 1.0}, "optimizer.learning_rate"),
            ({"projector": "8"}, "method.projector"),
            ({"mesh": {"stage": 2}}, "stages"),
            ({"method": {"projectr": "8"}}, "projector"),
            ({"method": {"name": "DeInfo"}}, "deinforeg"),
            ({"model": {"name": "resnet57"}}, "resnet56"),
            ({"optimizer": {"name": "Adam"}}, "adam"),
        ],
    )
    def test_by_a_configuration(self, given, meant):
        with pytest.raises(ConfigError) as error:
            validate(given)
        assert str(error.value).endswith(f"; did you mean {meant!r}?")

    @pytest.mark.parametrize(
        ("call", "meant"),
        [
            (lambda: jd.methods.get("deinforge"), "deinforeg"),
            (lambda: jd.methods.get("bp", iit="torch"), "init"),
            (lambda: jd.models.get("transfomer"), "transformer"),
            (lambda: jd.optim.get("sdg"), "sgd"),
            (lambda: jd.optim.get_schedule("cosin"), "cosine"),
            (lambda: jd.schedules.build("gpip", 2, 2), "gpipe"),
            (lambda: jd.data.load("digit"), "digits"),
            (lambda: jd.data.load("cifar1O"), "cifar10"),
            (lambda: jd.data.augment.get("strng", mean=(0.5,), std=(1.0,)), "strong"),
        ],
    )
    def test_in_the_library(self, call, meant):
        with pytest.raises((ValueError, TypeError)) as error:
            call()
        assert str(error.value).endswith(f"; did you mean {meant!r}?")

    def test_by_nothing_like_it(self):
        with pytest.raises(ConfigError) as error:
            filled({"bogus": 1})
        assert "did you mean" not in str(error.value)


class TestKeys:
    def test_every_key_has_a_meaning(self):
        for key in listing.entries():
            assert re.fullmatch(r"[^a-z\n].{10,}\.", key.meaning), key
            assert "docstring" not in key.meaning
            assert (key.kind is object) == (key.key == "tracking")  # which is a text or a tuple

    def test_the_options_of_data_say_what_they_are_in_one_place(self):
        told = {key.name for key in KEYS if key.meaning}
        assert not told & {f"data.{key}" for key in itertools.chain(*data_options().values())}

    @pytest.mark.parametrize("section", OWNERS)
    def test_every_option_is_listed(self, section):
        listed = {each.key for each in listing.entries()}
        for name in OWNERS[section].names():
            assert {f"{section}.{key}" for key in options(section, name)} <= listed
            assert all(meanings(section, name).values())

    def test_defaults(self):
        for key in KEYS:
            value = default()
            for part in key.name.split("."):
                value = value[part]
            assert value == key.value

    def test_a_key(self, capsys):
        with pytest.raises(SystemExit) as stopped:
            commands.main(["jdecouple", "train", "--help", "optimizer.end_learning_rate"])
        assert not stopped.value.code
        assert capsys.readouterr().out == (
            "config.optimizer.end_learning_rate\n  Where the cosine ends.\n"
            "  float, by default 0.0\n  taken by: schedule cosine\n"
        )

    def test_options_that_mean_something_else_elsewhere(self):
        text = listing.described("--config.optimizer.momentum")
        assert text in listing.described("momentum")  # where that of correctors is, too
        for kind, default_value, name in (("update", 0.9, "lars"), ("gradient", 0.0, "sgd")):
            said = (
                f"Decay of the accumulated {kind}, in [0, 1).\n  float, by default {default_value}"
            )
            assert f"{said}\n  taken by: optimizer {name}" in text

    def test_an_optimizer_of_optax(self, capsys):
        argv = ["--config.optimizer.name=optax:lion", "--help", "optimizer.b2"]
        with pytest.raises(SystemExit):
            cli.main(["jdecouple train", *argv])
        text = capsys.readouterr().out
        assert "taken by: optimizer adam, adamw, nadam" in text
        assert re.search(
            r"\n  [A-Z].*\.\n  float, by default 0.99\n  taken by: .* optax:lion\n", text
        )
        assert "docstring" not in text

    def test_what_many_take(self):
        text = listing.described("data.image_size")
        assert "taken by: data set digits, synthetic, folder:, images of TFDS" in text
        assert "resnet110" in listing.described("model.shortcut")
        assert "taken by: every run" in listing.described("seed")
        assert len(listing.described("mesh").split("\n\n")) == 7

    def test_an_option_of_ones_own(self):
        def builder(num_classes, *, slope: float, rngs):
            """Lines.

            Args:
                slope (float): how steep,
                    as a number
            """

        jd.models.register("lines", builder)
        assert "How steep, as a number.\n  float, no default\n  taken by: model lines" in (
            listing.described("model.slope")
        )


@pytest.mark.parametrize("topic", commands.TOPICS)
def test_lists(capsys, topic):
    lines = run(capsys, "list", topic).splitlines()
    names = [line.split("  ")[0].rstrip() for line in lines]
    wanted = {
        "methods": jd.methods.names(),
        "models": jd.models.names(),
        "optimizers": jd.optim.names(),
        "correctors": jd.optim.correctors.names(),
        "data": ("digits", "synthetic", "folder:PATH", "csv:PATH", "images of TFDS"),
        "presets": ("delayed", "equal", "growing", "quickstart", "text", "vision"),
        "keys": [f"config.{key.name}" for key in KEYS] + ["config.method.projector"],
    }
    assert {*wanted[topic]} <= {*names}
    assert all(len(line.split("  ", 1)[1].strip()) > 3 for line in lines)
