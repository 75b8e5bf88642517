"""The settings of the papers in configs/, and the modules that local methods train in them."""

import functools
from unittest import mock

import nets
import pytest
from flax import nnx, traverse_util

from jdecouple import methods, models
from jdecouple.models import layers
from jdecouple.models.cuts import module_starts
from jdecouple.train import presets
from jdecouple.train.config import chosen
from jdecouple.train.errors import ConfigError

STD = "(0.2023,0.1994,0.201)"
IMAGE_PAPERS = ("deinforeg", "scpl", "al", "dgl", "predsim", "auglocal", "man", "infopro")


def load(preset, arguments):
    return presets.load(f"{preset}:{arguments}")


def settings(preset, arguments):
    """Values by key; what is open is None."""
    return traverse_util.flatten_dict(load(preset, arguments).to_dict(), sep=".")


def assert_has(found, wanted):
    """Every "key=value" of a text; None is what is left open."""
    pairs = dict(pair.split("=") for pair in wanted.split())
    found = {key: str(found.get(key)).replace(" ", "") for key in pairs}
    assert found == pairs


# --- Images -----------------------------------------------------------------------------------

VISION = {
    "cifar10,vgg8,deinforeg": """
        data.augment=strong data.std=(0.2023,0.1994,0.201) batch_size=128 epochs=200
        optimizer.name=lars optimizer.learning_rate=0.2 optimizer.end_learning_rate=0.002
        optimizer.weight_decay=0.0001 optimizer.schedule=cosine model.classifier=deinforeg
        model.init=torch method.init=torch model.layout=None
    """,
    "cifar10,vgg8,scpl": """
        data.augment=two_views data.std=(0.2023,0.1994,0.201) batch_size=1024 epochs=200
        optimizer.name=adam optimizer.learning_rate=0.001 optimizer.end_learning_rate=1e-05
        optimizer.schedule=cosine model.layout=scpl model.classifier=scpl model.cut=None
    """,
    "cifar10,resnet18,scpl": "model.variant=scpl model.cut=paper",
    "cifar10,resnet20,al": """
        batch_size=32 epochs=200 optimizer.name=adam optimizer.learning_rate=0.0001
        optimizer.schedule=step_decay optimizer.decay_factor=0.1 optimizer.decay_epochs=(80,120,160)
        model.init=he method.init=he data.std=None method.features=300
        method.autoencoder_lr_scale=2.0
    """,
    "cifar10,vgg8,al@scpl": """
        model.layout=scpl method.features=None method.init=torch method.autoencoder_lr_scale=None
        batch_size=1024
    """,
    "cifar10,resnet110,dgl": """
        data.augment=basic data.std=(0.2023,0.1994,0.201) batch_size=128 epochs=300
        optimizer.name=sgd optimizer.learning_rate=0.01 optimizer.momentum=0.9
        optimizer.weight_decay=0.0005 optimizer.schedule=step_decay optimizer.decay_factor=0.1
        optimizer.decay_epochs=(149,224) model.init=he_out method.init=torch model.shortcut=None
    """,
    "cifar10,vgg8b,predsim": """
        data.augment=basic data.mean=(0.424,0.415,0.384) data.std=(0.283,0.278,0.284) batch_size=128
        epochs=400 optimizer.name=adam optimizer.learning_rate=0.0005 optimizer.schedule=step_decay
        optimizer.decay_factor=0.25 optimizer.decay_epochs=(200,300,350,375) model.init=torch
        model.activation=None model.zero_output=None method.dim_in_decoder=2048
        method.classifier=0.01 method.init=torch
    """,
    "cifar100,vgg8b,bp@predsim": """
        data.mean=(0.438,0.418,0.377) data.std=(0.3,0.287,0.294) model.activation=relu
        model.zero_output=False
    """,
    "cifar10,resnet110,infopro": """
        data.augment=basic data.crop_mode=reflect data.std=None batch_size=1024 epochs=160
        optimizer.name=sgd optimizer.learning_rate=0.8 optimizer.momentum=0.9
        optimizer.nesterov=True optimizer.weight_decay=0.0001 optimizer.warmup_epochs=10.0
        optimizer.warmup_start=0.0125 model.shortcut=projection model.init=he_out method.init=he_out
        method.count_self=False method.max_channels=64
    """,
    **{
        f"cifar10,resnet32,{method}": """
            data.augment=basic data.crop_mode=reflect data.std=None batch_size=1024 epochs=400
            optimizer.name=sgd optimizer.learning_rate=0.8 optimizer.momentum=0.9
            optimizer.nesterov=True optimizer.weight_decay=0.0001 optimizer.schedule=cosine
            optimizer.warmup_epochs=10.0 optimizer.warmup_start=0.0125 model.shortcut=projection
            model.init=he_out method.init=he_out method.depth=None method.ema_decay=None
        """
        for method in ("auglocal", "man")
    },
}


@pytest.mark.parametrize("arguments", VISION)
def test_the_papers_settings_for_images(arguments):
    assert_has(settings("vision", arguments), f"data.validation=0.0 {VISION[arguments]}")


@pytest.mark.parametrize("paper", IMAGE_PAPERS)
def test_backpropagation_in_the_settings_of_each_paper(paper):
    net = {"predsim": "vgg8", "dgl": "resnet56", "infopro": "resnet56"}.get(paper, "resnet18")
    bp, own = (load("vision", f"cifar10,{net},{each}") for each in (f"bp@{paper}", paper))
    assert bp.method.name == "bp"
    assert bp.method.init == own.method.init
    same = {**own.model}
    same.pop("cut", None)  # its net is one module
    assert {**bp.model} == same
    for key in ("data", "optimizer", "batch_size", "epochs"):
        assert bp[key] == own[key], key


@pytest.mark.parametrize("method", sorted(set(methods.names()) - {"bp", *IMAGE_PAPERS}))
def test_methods_without_settings_for_images_train_as_bp_does(method):
    config, bp = (load("vision", f"cifar10,mlp,{name}") for name in (method, "bp"))
    assert config.optimizer == bp.optimizer
    assert config.data == bp.data
    wanted = f"data.augment=strong data.std={STD} batch_size=128 optimizer.name=adam"
    assert_has(settings("vision", f"cifar10,vgg8,{method}"), wanted)


# First units of the modules by net, method (and K); the stem is unit 0.
CUTS = {
    **{f"resnet18,{method}": (0, 3, 5, 7) for method in ("deinforeg", "scpl", "early_exit")},
    **{f"resnet18,{method}@scpl": (0, 3, 5, 7) for method in ("greedy_exit", "al", "predsim")},
    **{f"resnet18,{method}": tuple(range(9)) for method in ("dgl", "infopro", "predsim")},
    "resnet32,al": (0, 1, 6, 11),
    "resnet32,deinforeg": tuple(range(16)),
    "resnet32,dgl": (0, 8),
    "resnet32,dgl,3": (0, 5, 12),
    "resnet32,dgl,4": (0, 3, 8, 13),
    "resnet32,infopro": (0, 8),
    "resnet32,infopro,3": (0, 6, 11),
    "resnet32,infopro,4": (0, 4, 8, 12),
    "resnet32,infopro,8": (0, 2, 4, 6, 8, 10, 12, 14),
    "resnet32,infopro,16": tuple(range(16)),
    "resnet32,auglocal": tuple(range(13)),
    "resnet32,auglocal,4": (0, 4, 8, 12),
    "resnet32,man": (0, *range(2, 16)),
    "resnet32,man,13": tuple(range(13)),
    "resnet32,dgl@man,15": (0, *range(2, 16)),
    "resnet110,auglocal": tuple(range(52)),
    "resnet110,man": (0, *range(2, 55)),
    "resnet56,man": (0, 14),
    "resnet110,dgl": (0, 27),
    "resnet110,dgl,3": (0, 18, 38),
    "resnet110,dgl,4": (0, 13, 28, 43),
    "resnet110,greedy_exit@dgl,4": (0, 13, 28, 43),
    "resnet110,infopro": (0, 28),
    "resnet110,infopro,3": (0, 19, 37),
    "resnet110,infopro,4": (0, 13, 27, 41),
    "resnet110,infopro,8": (0, 6, 13, 20, 27, 34, 41, 48),
    "resnet110,infopro,16": (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 31, 35, 39, 43, 47, 51),
    "resnet110,deinforeg": tuple(range(55)),
    "resnet110,predsim,4": (0, 13, 27, 41),
    "wrn28_10,dgl": (0, 7),
    "wrn28_10,dgl,4": (0, 4, 7, 10),
    "wrn28_10,infopro": (0, 7),
    "wrn28_10,infopro,3": (0, 5, 9),
    "wrn28_10,infopro,4": (0, 4, 7, 10),
    "wrn28_10,infopro,8": (0, 1, 2, 3, 5, 7, 9, 11),
    "wrn28_10,scpl": tuple(range(13)),
}


@functools.cache
def net(name):
    """A net whose layers are empty: how its units are cut depends on their number alone."""
    empty = dict.fromkeys(("conv", "linear", "BatchNorm"), lambda *_, **__: nnx.Sequential())
    with mock.patch.multiple(layers, **empty):
        return models.get(name)(10, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("arguments", CUTS)
def test_modules_of_the_papers_nets(arguments):
    config = load("vision", f"cifar10,{arguments}")
    whole = net(config.model.name)
    cut = config.model.get("cut", "units")
    assert module_starts(cut, whole.splits, len(whole.blocks)) == CUTS[arguments]


@pytest.mark.parametrize(
    ("arguments", "reconstruction", "task"),
    [
        ("resnet32,infopro,4", (6.0, 1.0), (0.0, 2.0)),
        ("resnet32,infopro,16", (5.0, 0.2), (0.05, 0.5)),
        ("resnet110,infopro", (5.0, 0.0), (0.5, 0.0)),
        ("resnet110,infopro,3", (5.0, 5.0), (0.0, 0.1)),
        ("wrn28_10,infopro,8", (5.0, 0.0), (0.0, 1.0)),
        ("resnet18,infopro@scpl", (1.0, 0.0), (0.0, 1.0)),
        ("mlp,infopro", None, None),
    ],
)
def test_weights_of_infopro_go_with_its_modules(arguments, reconstruction, task):
    method = load("vision", f"cifar10,{arguments}").method
    assert (method.get("reconstruction"), method.get("task")) == (reconstruction, task)


# --- Delayed gradients ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "init", "rate", "nesterov", "decay", "warmup", "split", "std"),
    [
        ("bp", "torch", 0.1, None, (150, 225, 275), 0, "fdg", True),
        ("fdg", "torch", 0.1, None, (150, 225, 275), 0, "fdg", True),
        ("adl", "torch", 0.1, None, (150, 225, 275), 5, "fdg", False),
        ("fr", "he", 0.01, True, (150, 225), 0, "fr", False),
        ("ddg", "he", 0.01, True, (150, 225), 0, "fr", False),
        ("bp@ddg", "he", 0.01, True, (150, 225), 0, "fr", False),
    ],
)
def test_the_settings_of_the_papers_on_delayed_gradients(
    method, init, rate, nesterov, decay, warmup, split, std
):
    config = load("delayed", f"cifar10,resnet56,{method},4")
    assert (config.batch_size, config.epochs, config.num_stages) == (128, 300, 4)
    assert (config.data.validation, config.data.augment) == (0, "basic")
    assert config.data.std == ((0.2023, 0.1994, 0.2010) if std else None)
    assert (config.model.init, config.split) == (init, split)
    sgd = config.optimizer
    assert (sgd.name, sgd.momentum, sgd.weight_decay) == ("sgd", 0.9, 5e-4)
    assert (sgd.learning_rate, sgd.get("nesterov")) == (rate, nesterov)
    assert (sgd.schedule, sgd.decay_epochs, sgd.decay_factor) == ("step_decay", decay, 0.1)
    assert (sgd.warmup_epochs, sgd.warmup_start) == (warmup, 0.01)
    # What their released code does beyond is left to the caller.
    assert {*config.method} - {"init"} == {"name"}


def test_the_papers_on_delayed_gradients_are_all_there():
    for method in nets.DELAYED:
        assert load("delayed", f"cifar10,mlp,{method}").method.name == method


def test_stages_of_the_delayed_configuration():
    assert load("delayed", "cifar10,resnet20,fdg").num_stages == 2
    splits = {
        argument: load("delayed", f"cifar10,{argument}").split
        for argument in (
            *("resnet101,fdg,4", "wrn28_10,fr,3", "resnet20,fdg,1", "mlp,fdg,2"),
            *("resnet20,fr,3", "resnet20,fr,4", "resnet110,ddg,2"),
        )
    }
    assert list(splits.values()) == ["fdg", "fdg", None, None, "fr", "fdg", "fr"]


@pytest.mark.parametrize("name", ["resnet20", "resnet56", "resnet110", "resnet50"])
def test_equal_parts_are_cut_where_the_net_has_them(name):
    has = net(name).splits["fr"]
    for k in (2, 3, 4):
        found = load("delayed", f"cifar10,{name},fr,{k}").split
        assert found == ("fr" if k in has else "fdg")


# --- Texts ------------------------------------------------------------------------------------


def test_texts_are_cleaned_and_cut_as_in_the_papers():
    found = {}
    for name in ("glue/sst2", "ag_news_subset", "imdb_reviews", "csv:my/DBpedia,14", "csv:x"):
        data = load("text", f"{name},lstm,bp").data
        found[name] = data.max_length, data.clean
    assert list(found.values()) == [
        *((15, "paper"), (60, "paper"), (350, "punctuation"), (350, "paper"), (None, "none"))
    ]
    for method in ("scpl", "bp@scpl"):
        assert load("text", f"csv:dbpedia,lstm,{method}").data.max_length == 400
        assert load("text", f"imdb_reviews,lstm,{method}").data.max_length == 350


TEXT = {
    "lstm,deinforeg": """
        batch_size=128 epochs=50 data.validation=0.0 model.hidden=300 optimizer.name=adam
        optimizer.learning_rate=0.001 optimizer.schedule=constant model.depth=4 model.merge=concat
        model.mask_padding=False model.pass_state=None model.init=torch model.classifier=deinforeg
        method.init=torch method.projector=identity method.activation=tanh method.batch_norm=False
    """,
    "lstm,scpl": """
        batch_size=1024 model.depth=3 model.pass_state=True model.classifier=scpl
        method.projector=identity
    """,
    "lstm,bp@scpl": "batch_size=1024 model.depth=3 model.classifier=scpl",
    "transformer,bp": """
        model.layout=paper model.dropout=0.1 model.embedding_dropout=0.0 model.init=xavier
        model.mask_embedding=False model.mask_padding=None model.depth=4 batch_size=128
        model.classifier=deinforeg
    """,
    "lstm,al": "method.features=300 method.expansion=0 method.activation=tanh",
}


@pytest.mark.parametrize("arguments", TEXT)
def test_the_papers_settings_for_texts(arguments):
    assert_has(settings("text", f"glue/sst2,{arguments}"), TEXT[arguments])


# --- What is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "arguments", "said"),
    [
        (
            *("vision", "cifar10,vgg8,bp@scp"),
            "paper is 'scp': allowed are deinforeg, scpl, al, dgl, predsim, auglocal, man, infopro",
        ),
        ("vision", "cifar10,vgg8,bp@", "paper is '': allowed are deinforeg"),
        ("vision", "cifar10,resnet110,dgl,0", "K is 0: a whole number of at least 1"),
        ("vision", "cifar10,resnet110,infopro,5", "K is 5: 2, 3, 4, 8, 16 are known here"),
        ("vision", "cifar10,resnet110,4", "'dataset,model,method[@paper][,K]' is needed"),
        ("text", "glue/sst2,lstm,bp@dgl", "paper is 'dgl': allowed are deinforeg, scpl"),
        ("text", "glue/sst2,lstm,bp,2", "'dataset,model,method[@paper]' is needed"),
        ("text", "glue/sst2,mlp,bp", "model 'mlp' is not one of lstm, transformer"),
        ("delayed", "cifar10,resnet56,bp@dgl,2", "paper is 'dgl': allowed are fdg, adl, fr, ddg"),
        ("delayed", "cifar10,resnet56,dgl,2", "method 'dgl' is not one of bp, 2bw, dsp, fdg, adl"),
    ],
)
def test_bad_arguments(preset, arguments, said):
    with pytest.raises(ConfigError) as error:
        load(preset, arguments)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_path_may_hold_what_divides_the_names():
    config = load("vision", "folder:my@data,2,vgg8,bp@scpl")
    assert (config.data.name, config.batch_size) == ("folder:my@data,2", 1024)


def test_a_key_of_the_command_line_wins():
    config = presets.load("vision:cifar10,resnet110,infopro,4", {"data.validation": 0.1})
    assert chosen(config, "model")["cut"] == "infopro:4"
    assert config.data.validation == 0.1
