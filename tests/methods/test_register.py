"""Methods, models and data sets of one's own: in the library, in a configuration, by train.py."""

import dataclasses

import numpy as np
import pytest
import runs
from flax import nnx

import jdecouple as jd
from jdecouple.train import cli
from jdecouple.train.config import ConfigError
from jdecouple.train.loop import build, train_and_evaluate

FILE = """
import dataclasses
import numpy as np
from flax import nnx
import jdecouple as jd


@dataclasses.dataclass(frozen=True)
class Mine(jd.objectives.Exits):
    projector: int = 3


def one_layer(num_classes, *, image_size, channels, scale: float = 1.0, rngs):
    dense = nnx.Linear(image_size**2 * channels, num_classes, rngs=rngs)
    return jd.Model([nnx.Sequential(lambda x: scale * x.reshape(len(x), -1), dense)])


def noise(seed, channels, validation=None):
    pixels = np.random.default_rng(seed).uniform(size=(24, 4, 4, channels))
    split = jd.data.from_arrays(pixels, np.arange(24) % 2, num_classes=2)
    mean, std = jd.data.channel_statistics(split)
    return jd.data.ImageDataset("noise", split, split, split, 2, pixels.shape[1:], mean, std)


jd.methods.register(
    "mine", Mine, jd.routes.Delayed, fixed={"forward_pass": "locked"}, options={"beta": 0.5}
)
jd.models.register("one_layer", one_layer)
jd.data.register("noise", noise)


def get_config(name="mine"):
    return {
        "method": {"name": name},
        "model": {"name": "one_layer"},
        "data": {"name": "noise", "channels": 1},
        "batch_size": 8,
        "steps": 2,
    }
"""


@pytest.fixture
def parsed(tmp_path):
    """What train.py makes of a command line with the file above."""
    path = tmp_path / "my_config.py"
    path.write_text(FILE)

    def parse(*argv):
        return cli.parse(["train.py", "--config", str(path), "--workdir", str(tmp_path), *argv])[0]

    return parse


class TestTrainPy:
    def test_a_method(self, parsed):
        run = build(parsed("--config.method.projector=7", "--config.method.beta=1"))
        method = run.trainer.method
        assert (method.name, method.objective.projector, method.route.beta) == ("mine", 7, 1.0)
        assert method.route.forward_pass == "locked"
        assert run.total_steps == 2

    def test_a_model(self, parsed):
        run = build(parsed("--config.model.scale", "0.0"))
        (block,) = run.trainer.model.blocks
        assert block(np.ones((1, 4, 4, 1), np.float32)).tolist() == [[0.0, 0.0]]

    def test_a_model_that_takes_any_inputs(self, parsed):
        jd.models.register("any", lambda num_classes, *, rngs, **inputs: my_model(inputs, rngs))

        def my_model(inputs, rngs):
            return jd.models.mlp(2, hidden=inputs["image_size"], rngs=rngs, **inputs)

        run = build(parsed("--config.model.name=any"))
        assert run.trainer.model.classifier.kernel.shape == (4, 2)

    def test_a_data_set(self, parsed):
        run = build(parsed("--config.data.channels=3", "--config.data.label_noise=1.0"))
        assert run.dataset.image_shape == (4, 4, 3)
        assert (run.dataset.train.overrides >= 0).all()

    def test_a_name_of_the_command_line(self, parsed):
        """Its options are those that the command line may set, wherever the name stands."""
        argv = ["--config.method.projector=8-4", "--config.method.name=deinforeg"]
        config = parsed(*argv, "--config.model.name=mlp", "--config.model.hidden=4")
        assert config.method.to_dict() == {"name": "deinforeg", "projector": "8-4"}
        assert build(config).trainer.method.objective.projector == "8-4"

    def test_training(self, parsed, tmp_path):
        assert train_and_evaluate(parsed(), tmp_path / "run")["finished"]

    @pytest.mark.parametrize(
        ("argv", "said"),
        [
            (["method.projector=8-4"], "config.method.projector is '8-4': a value of type int"),
            (["method.mode=x"], "config.method.mode is set, but method 'mine' takes only: weights"),
            (["method.beta=2"], "beta is 2.0: a number above 0 and at most 1 is needed"),
            (["method.name=his"], "config.method.name is 'his': allowed are bp, early_exit"),
            (["model.depth=2"], "model.depth is set, but model 'one_layer' takes only: scale, cut"),
            (["model.name=lstm"], "data set 'noise' holds images, which mlp, one_layer, resnet"),
            (["data.image_size=8"], "data set 'noise' holds images and takes only: validation"),
            (["data.channels=x"], "config.data.channels is 'x': a value of type int is needed"),
        ],
    )
    def test_bad_values(self, parsed, argv, said):
        with pytest.raises(ConfigError) as error:
            build(parsed(*(f"--config.{argument}" for argument in argv)))
        assert said in str(error.value)
        assert "\n" not in str(error.value)

    def test_help(self, parsed, capsys):
        with pytest.raises(SystemExit) as stopped:
            parsed("--help")
        assert not stopped.value.code
        text = capsys.readouterr().out
        assert "  one_layer: scale=1.0, cut='units'\n" in text
        own = "weights=(1.0,), head_pool=1, branch='linear', projector=3"
        assert f"  mine: {own}, beta=0.5, init='flax'\n" in text
        assert "batch_size: 8" in text

    def test_an_option_of_the_file_is_taken_back(self, parsed):
        argv = ["--config.method.name=bp", "--config.model.name=mlp", "--config.model.hidden=8"]
        tiny = ["train.py", *runs.arguments("w"), *argv]
        config, _ = cli.parse([*tiny, "--config.method.projector=None"])
        assert config.method.to_dict() == {"name": "bp"}
        assert cli.parse(tiny)[0].method.to_dict() == {"name": "bp"}  # without its being asked for


class TestLibrary:
    def test_a_method_with_a_route_of_its_own(self):
        class Halved(jd.routes.Synchronous):
            """Trains the first stage alone."""

        jd.methods.register("halved", jd.objectives.CrossEntropy, Halved, source="here")
        method = jd.methods.get("halved", init="torch")
        assert isinstance(method, jd.methods.Method)
        assert isinstance(method.route, Halved)
        assert jd.methods.source("halved") == "here"
        assert "halved" in jd.methods.names()
        assert jd.methods.arguments("halved") == {"init": "flax"}

    def test_a_model(self):
        jd.models.register(
            "blocks", lambda num_classes, *, rngs: jd.models.mlp(num_classes, rngs=rngs)
        )
        assert len(jd.models.get("blocks")(3, rngs=nnx.Rngs(0)).blocks) == 4

    def test_a_data_set(self):
        digits = jd.data.load("digits")
        halves = {0.5: digits.validation, 0.25: digits.test}
        jd.data.register(
            "halves", lambda validation: dataclasses.replace(digits, train=halves[validation])
        )
        loaded = jd.data.load("halves", validation=0.25)
        assert (loaded.name, loaded.train.name, len(loaded.train)) == ("halves", "train", 359)
        assert jd.data.load("halves", validation=0.5, label_noise=0.5).train.overrides is not None
        with pytest.raises(ValueError, match=r"glove is 'x': .*'halves' holds images and takes"):
            jd.data.load("halves", validation=0.5, glove="x")

    @pytest.mark.parametrize(
        ("register", "name"),
        [
            (lambda name: jd.methods.register(name, jd.objectives.Exits, jd.routes.Local), "bp"),
            (lambda name: jd.models.register(name, jd.models.mlp), "vit"),
            (lambda name: jd.data.register(name, lambda: None), "digits"),
            (lambda name: jd.data.register(name, lambda: None), "csv:"),
        ],
    )
    def test_a_built_in_name_stays(self, register, name):
        with pytest.raises(ValueError, match=f"{name}' is built in: register yours under another"):
            register(name)
        if not name.endswith(":"):
            register("of_my_own")
            register("of_my_own")  # as a notebook's cell that runs twice

    @pytest.mark.parametrize(
        ("call", "error", "said"),
        [
            (
                lambda: jd.methods.register("x", 3, jd.routes.Local),
                TypeError,
                "must be a dataclass",
            ),
            (
                lambda: jd.methods.register("x", jd.objectives.Exits, "local"),
                TypeError,
                "the route of method 'x' must be a Route class, got 'local'",
            ),
            (
                lambda: jd.methods.register(
                    "x", jd.objectives.Exits, jd.routes.Local, options={"weights": 1}
                ),
                ValueError,
                "method 'x' has two arguments called 'weights'",
            ),
            (lambda: jd.models.register("x", 3), TypeError, "is 3: a function is needed"),
            (
                lambda: jd.models.register("x", lambda name: None),
                ValueError,
                "two arguments called 'name'",
            ),
            (lambda: jd.data.register("x:y", lambda: None), ValueError, "one without a colon"),
            (lambda: jd.data.register("x", 3), TypeError, "is 3: a function is needed"),
            (
                lambda: jd.data.register("x", lambda rows: None),
                ValueError,
                "the loader of data set 'x' needs 'rows': allowed are cache_bytes, channels",
            ),
        ],
    )
    def test_bad_registrations(self, call, error, said):
        with pytest.raises(error, match=said):
            call()
        assert "x" not in (*jd.methods.names(), *jd.models.names(), *jd.data.names())

    def test_a_loader_that_returns_something_else(self):
        jd.data.register("nothing", lambda: None)
        with pytest.raises(TypeError, match="loader of data set 'nothing' returns None: a Data"):
            jd.data.load("nothing")
