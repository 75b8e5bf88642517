"""Configurations by name and by path, and what of them goes with another method or schedule."""

import subprocess
import sys
import zipfile

import pytest
import runs
from PIL import Image

from jdecouple.train import cli, presets
from jdecouple.train.config import ConfigError, validate

CONFIGS = runs.REPOSITORY / "configs"
SGD = "delayed:digits,mlp,fdg"  # with momentum, by step_decay


def test_names_are_the_files_of_configs():
    assert presets.names() == tuple(sorted(path.stem for path in CONFIGS.glob("*.py")))
    assert dict(presets.summaries())["quickstart"].startswith("DeInfoReg on scikit-learn's")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("quickstart", "quickstart.py"),
        ("vision:cifar10,vgg8,scpl", "vision.py:cifar10,vgg8,scpl"),
        ("text:csv:dbpedia,lstm,al", "text.py:csv:dbpedia,lstm,al"),
    ],
)
def test_a_name_is_the_file_of_configs(name, path):
    config = presets.load(name)
    assert config == presets.load(f"{CONFIGS}/{path}")
    assert validate(config) == config
    config.batch_size = 8  # a ConfigDict as any other


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_name_is_the_preset_also_where_a_file_is_called_so(here):
    for name in ("quickstart", "quickstart.py"):
        (here / name).write_text("def get_config():\n  return {'seed': 7}")
    assert presets.load("quickstart").seed == 0
    assert presets.load("./quickstart").seed == 7
    assert presets.load("quickstart.py").seed == 7


def test_a_file_imports_what_lies_beside_it(here, monkeypatch):
    (here / "mine").mkdir()
    (here / "mine" / "beside_it.py").write_text("SEED = 3")
    (here / "mine" / "later_beside_it.py").write_text("STEPS = 5")
    (here / "mine" / "given.py").write_text(
        "from beside_it import SEED\n"
        "def get_config(epochs):\n"
        "  from later_beside_it import STEPS\n"
        "  return {'seed': SEED, 'steps': STEPS, 'epochs': int(epochs)}"
    )
    before = [*sys.path]
    monkeypatch.setattr(sys, "path", [*before])
    config = presets.load("mine/given.py:4")
    assert (config.seed, config.steps, config.epochs) == (3, 5, 4)
    assert sys.path == [*before, str(here / "mine")]  # the last, for what a key may name


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "quikstart",
            "no preset: allowed are delayed, equal, growing, lm, quickstart, text, vision",
        ),
        ("quikstart", "; did you mean 'quickstart'?"),
        ("mine", "no preset (the file is './mine'): allowed are delayed"),
        ("./quickstart", "there is no file './quickstart'"),
        ("quickstart:now", "TypeError: "),
        ("vision:cifar10,vgg8", "'dataset,model,method[@paper][,K]' is needed after the file"),
        ("vision:cifar10,vgg8,deinforge", "; did you mean 'deinforeg'?"),
    ],
)
def test_refused(here, given, said):
    (here / "mine").write_text("")
    with pytest.raises(ConfigError) as error:
        presets.load(given)
    assert f"--config {given}: " in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


class TestOverrides:
    def test_keys_of_another_method_are_left_out(self, capsys):
        for name in ("bp", "scpl"):  # scpl calls something else so
            config = presets.load("quickstart", {"method.name": name, "batch_size": 8})
            assert (config.method.to_dict(), config.batch_size) == ({"name": name}, 8)
            told = f"config.method.name is {name!r}, not 'deinforeg': left out"
            assert capsys.readouterr().err == f"note: {told} config.method.projector\n"
        overrides = {"method.projector": "linear", "method.name": "scpl"}
        config = presets.load(CONFIGS / "quickstart.py", overrides)
        assert config.method.to_dict() == {"name": "scpl", "projector": "linear"}
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize(
        ("overrides", "said"),
        [
            ({"methd.name": "bp"}, "unknown key config.methd: "),
            ({"method.name": "bpp"}, "config.method.name is 'bpp': allowed are bp, "),
            ({"method.name": "bp", "method.projector": "8"}, "method 'bp' takes only: init"),
            ({"epochs": "3"}, "config.epochs is '3': a value of type int is needed"),
            ({"epochs.x": 3}, "config.epochs is {'x': 3}: a value of type int is needed"),
        ],
    )
    def test_refused(self, overrides, said):
        with pytest.raises(ConfigError) as error:
            presets.load("quickstart", overrides)
        assert said in str(error.value)


def parse(config, *argv):
    """The configuration of a command line that overrides keys, as one argument or as two."""
    argv = [word for argument in argv for word in f"--config.{argument}".split(" ")]
    return cli.parse(["train.py", "--config", config, "--workdir", "w", *argv])[0]


class TestOtherNames:
    """On the command line."""

    @pytest.mark.parametrize(
        ("config", "argv", "lost"),
        [
            ("quickstart", ["method.name=bp"], "config.method.projector"),
            ("quickstart", ["method.name bp", "model.name=mlp"], "config.model.blocks"),
            ("quickstart", ["method.name=bp", "method.projector=None"], ""),
            ("quickstart", ["method.name=deinforeg"], ""),
            ("quickstart", ["method.name=scpl"], "config.method.projector"),
            ("quickstart", ["method.name=scpl", "method.projector=linear"], ""),
            ("quickstart", ["optimizer.name=sgd", "optimizer.momentum=0.5"], ""),
            (SGD, ["optimizer.name=adam"], "config.optimizer.momentum"),
            (SGD, ["optimizer.schedule=constant"], "config.optimizer.decay_epochs"),
            ("equal", ["optimizer.schedule constant"], "config.optimizer.end_learning_rate"),
            ("text", ["optimizer.schedule=None"], ""),
            ("vision", ["data.name=digits"], "left out config.data.std"),
            ("vision", ["data.name=digits", "data.std=(0.5,)"], ""),
            ("vision", ["data.name=cifar10"], ""),
        ],
    )
    def test_what_they_do_not_take_is_left_out(self, capsys, config, argv, lost):
        validate(parse(config, *argv))
        told = capsys.readouterr().err
        assert told.count("\n") == bool(lost)
        assert lost in told

    def test_what_both_take_stays(self, capsys):
        """Under the same default, else it is another key of the same name."""
        config = parse("delayed:digits,mlp,fdg", "optimizer.name=adam", "method.name=adl")
        assert config.optimizer.weight_decay == 5e-4
        config = parse("vision:digits,vgg8,scpl", "model.name=resnet18", "method.name=infopro")
        assert config.model.to_dict() == {"name": "resnet18", "init": "torch"}
        assert config.method.to_dict() == {"name": "infopro", "init": "torch"}
        assert "left out config.model.classifier, config.model.layout\n" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("argv", "said"),
        [
            (["method.name=bp", "method.projector=8-4"], "method 'bp' takes only: init"),
            (["method.name=bp", "method.projectr=8-4"], "method 'bp' takes only: init"),
            (["method.name=nothing"], "config.method.name is 'nothing': allowed are bp"),
            (
                ["optimizer.schedule=constant", "optimizer.end_learning_rate=1e-4"],
                "end_learning_rate is set, but schedule 'constant' takes only: learning_rate",
            ),
        ],
    )
    def test_what_the_command_line_sets_is_refused(self, argv, said, capsys):
        with pytest.raises(ConfigError) as error:
            validate(parse("quickstart", *argv))
        assert said in str(error.value)

    def test_what_belongs_to_nobody_is_refused(self, tmp_path):
        file = tmp_path / "given.py"
        file.write_text(
            "def get_config():\n  return {'method': {'name': 'deinforeg', 'projctor': '8'}}"
        )
        with pytest.raises(ConfigError, match="projctor is set, but method 'bp' takes only"):
            parse(str(file), "method.name=bp")


@pytest.mark.slow
def test_a_wheel_trains_without_the_repository(tmp_path):
    """It holds the presets, which the command finds there, in an empty folder."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path)]
    subprocess.run([*build, str(runs.REPOSITORY)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    packaged = {name for name in names if name.startswith("jdecouple/presets/")}
    assert packaged == {f"jdecouple/presets/{name}.py" for name in presets.names()}
    assert all(name.startswith(("jdecouple/", "jdecouple-")) for name in names)
    empty.mkdir()
    Image.new("L", (8, 8)).save(empty / "a.png")

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=empty,
            env={**runs.environment(), "PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(installed) in run("-c", "import jdecouple; print(jdecouple.__file__)")
    command = "-m", "jdecouple"
    options = ["--config.steps=3", "--config.model.blocks=2,M|2", "--config.method.projector=8"]
    text = run(*command, "train", "--config", "quickstart", "--workdir", "runs/q", *options)
    assert "last step" in text
    assert run(*command, "predict", "runs/q", "a.png").startswith("input,label,class_name,")
    assert {path.name for path in empty.iterdir()} == {"a.png", "runs"}
