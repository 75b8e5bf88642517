"""Images with the papers' settings: --config vision:dataset,model,method[@paper][,K].

Data sets: digits, synthetic, or a prepared TFDS image set (cifar10, cifar100, fashion_mnist, ...;
--config.data.data_dir=FOLDER) or folder:PATH. Models: any of jdecouple.models for images. Methods:
any, in the settings of its own paper or, with `@paper`, of another: `bp@scpl` is the
backpropagation that SCPL compares with, `greedy_exit@scpl` its early exit. Papers are deinforeg,
scpl, al, dgl, predsim, auglocal, man and infopro. Methods that are none of these have by themselves
DeInfoReg's batch and augmentation with SCPL's optimiser.

A local method trains modules, each with one head. The nets of a paper are cut as it cut them:
resnet18 to resnet101 in 4 modules (deinforeg, scpl, and what has no settings of its own), resnet20
and resnet32 in 4 (al), the CIFAR ResNets in K (dgl: 2, 3, and 4 but for resnet20; infopro: 2, 3, 4,
8, 16; 2 if left out), and so in equal parts wrn28_10. For auglocal and man they are those of
infopro, and two of single units: of resnet32 13 and 15, of resnet110 52 and 54, where auglocal has
the smaller number by itself and man the larger one. Any other net has a head on every block or,
with a K, the cut into K modules that it is known to have. --config.model.cut says it otherwise.

The papers train on all training images and report the last epoch: nothing is held out for
validation (--config.data.validation=0.1 does).

Command:   jdecouple train --config vision:cifar10,vgg8,deinforeg --workdir runs/c10
           jdecouple train --config vision:cifar10,resnet110,infopro,4 --workdir runs/infopro
Hardware:  a GPU for the papers' epochs at full width (not measured yet); a CPU for less.
Expected:  the papers' figures were not reproduced yet: no run here was as long. What small nets
           reach in few epochs on CPU cores stands in bench/RESULTS.md.
Differs:   man has dgl's auxiliary nets, where the paper's tables have them behind three methods;
           rates move at every step (--config.optimizer.per_epoch=True: once an epoch); infopro's
           weights of the losses are those for CIFAR-10, and at another model.width its
           method.max_channels=64 needs the same factor; al has no decay of weights, its nets ReLU
           and its VGG BatchNorm. What else differs is in the table of docs/methods.md.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jdecouple.train import config as configuration

_FORM = "dataset,model,method[@paper][,K]"


class Paper(NamedTuple):
    """Settings of a paper.

    Attributes:
        settings: of a run, by key; nets and heads take those that they have options for.
        methods: arguments of methods.
        sets: how data sets are normalised, where not by their own statistics.
        cuts: cuts of nets into K modules by K, the first where K is left out.
    """

    settings: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]] = {}
    sets: Mapping[str, Mapping[str, Any]] = {}
    cuts: Mapping[str, Mapping[int, Any]] = {}


_STD = {"cifar10": {"std": (0.2023, 0.1994, 0.2010)}}
_CIFAR_NETS = ("resnet", "resnet20", "resnet32", "resnet56", "resnet110")


def _alike(cuts, *nets):
    return dict.fromkeys(nets, cuts)


def _parts(name, *counts):
    return {count: f"{name}:{count}" for count in counts}


_IN_GROUPS = _alike({4: "paper"}, "resnet18", "resnet34", "resnet50", "resnet101")
_INFOPRO = {
    "model.shortcut": "projection",
    "model.init": "he_out",
    "method.init": "he_out",
    "data.augment": "basic",
    "data.crop_mode": "reflect",
    "batch_size": 1024,
    "epochs": 160,
    "optimizer.name": "sgd",
    "optimizer.momentum": 0.9,
    "optimizer.nesterov": True,
    "optimizer.weight_decay": 1e-4,
    "optimizer.learning_rate": 0.8,
    "optimizer.warmup_epochs": 10.0,
    "optimizer.warmup_start": 0.0125,
}
_INFOPRO_CUTS = {
    **_alike(_parts("infopro", 2, 3, 4, 8, 16), *_CIFAR_NETS),
    "wrn28_10": _parts("infopro", 2, 3, 4, 8),
}


def _unit_cuts(first):
    """InfoPro's cuts, and two into single units; `first` is the one of these that comes first.

    AugLocal's last module holds three units more, as many as its nets have, and MAN's first one the
    stem and a unit.
    """
    cuts = dict(_INFOPRO_CUTS)
    for net, units in (("resnet32", 16), ("resnet110", 55)):
        own = {units - 3: tuple(range(units - 3)), units - 1: (0, *range(2, units))}
        cuts[net] = {first(own): own[first(own)], **own, **cuts[net]}
    return cuts


_ADAM = {
    "optimizer.name": "adam",
    "optimizer.learning_rate": 1e-3,
    "optimizer.end_learning_rate": 1e-5,
}
_NO_PAPER = Paper(
    {"data.augment": "strong", "batch_size": 128, "epochs": 200, **_ADAM},
    sets=_STD,
    cuts=_IN_GROUPS,
)
PAPERS = {
    "deinforeg": Paper(  # arXiv:2506.18193
        {
            "model.classifier": "deinforeg",
            "data.augment": "strong",
            "batch_size": 128,
            "epochs": 200,
            "optimizer.name": "lars",
            "optimizer.learning_rate": 0.2,
            "optimizer.end_learning_rate": 0.002,
            "optimizer.weight_decay": 1e-4,
        },
        sets=_STD,
        cuts=_IN_GROUPS,
    ),
    "scpl": Paper(  # arXiv:2602.00062
        {
            "model.layout": "scpl",
            "model.classifier": "scpl",
            "model.variant": "scpl",
            "data.augment": "two_views",
            "batch_size": 1024,
            "epochs": 200,
            **_ADAM,
        },
        sets=_STD,
        cuts=_IN_GROUPS,
    ),
    "al": Paper(  # arXiv:1906.05560, the code in TensorFlow
        {
            "model.layout": "scpl",
            "model.init": "he",
            "method.init": "he",
            "data.augment": "strong",
            "batch_size": 32,
            "epochs": 200,
            "optimizer.name": "adam",
            "optimizer.learning_rate": 1e-4,
            "optimizer.schedule": "step_decay",
            "optimizer.decay_epochs": (80, 120, 160),
        },
        methods={"al": {"features": 300, "autoencoder_lr_scale": 2.0}},
        cuts={"resnet20": {4: (0, 1, 4, 7)}, "resnet32": {4: (0, 1, 6, 11)}},
    ),
    "dgl": Paper(  # arXiv:1901.08164, its comparison with DDG
        {
            "model.init": "he_out",
            "data.augment": "basic",
            "batch_size": 128,
            "epochs": 300,
            "optimizer.name": "sgd",
            "optimizer.momentum": 0.9,
            "optimizer.weight_decay": 5e-4,
            "optimizer.learning_rate": 0.01,
            "optimizer.schedule": "step_decay",
            "optimizer.decay_epochs": (149, 224),
        },
        sets=_STD,
        cuts={
            **_alike(_parts("dgl", 2, 3, 4), *_CIFAR_NETS),
            "wrn28_10": _parts("infopro", 2, 3, 4),
        },
    ),
    "predsim": Paper(  # arXiv:1901.06656, its VGG8b on CIFAR
        {
            "data.augment": "basic",
            "batch_size": 128,
            "epochs": 400,
            "optimizer.name": "adam",
            "optimizer.learning_rate": 5e-4,
            "optimizer.schedule": "step_decay",
            "optimizer.decay_epochs": (200, 300, 350, 375),
            "optimizer.decay_factor": 0.25,
        },
        methods={"predsim": {"dim_in_decoder": 2048, "classifier": 0.01}},
        sets={
            "cifar10": {"mean": (0.424, 0.415, 0.384), "std": (0.283, 0.278, 0.284)},
            "cifar100": {"mean": (0.438, 0.418, 0.377), "std": (0.300, 0.287, 0.294)},
        },
    ),
    "auglocal": Paper({**_INFOPRO, "epochs": 400}, cuts=_unit_cuts(min)),  # arXiv:2402.17318
    "man": Paper({**_INFOPRO, "epochs": 400}, cuts=_unit_cuts(max)),  # arXiv:2407.05623
    "infopro": Paper(  # arXiv:2101.10832, with the contrastive loss
        _INFOPRO,
        methods={"infopro": {"count_self": False, "max_channels": 64}},
        cuts=_INFOPRO_CUTS,
    ),
}
# Weights of InfoPro's reconstruction and task, in the first and the last but one of K modules.
# Nets that are not here have those of ResNet-110; K = 3 those of the paper's cut by memory.
_WEIGHTS = {
    "resnet32": {
        2: {"reconstruction": (5.0, 0.0), "task": (1.0, 0.0)},
        4: {"reconstruction": (6.0, 1.0), "task": (0.0, 2.0)},
        8: {"reconstruction": (5.0, 0.0), "task": (0.0, 2.0)},
        16: {"reconstruction": (5.0, 0.2), "task": (0.05, 0.5)},
    },
    "resnet110": {
        2: {"reconstruction": (5.0, 0.0), "task": (0.5, 0.0)},
        3: {"reconstruction": (5.0, 5.0), "task": (0.0, 0.1)},
        4: {"reconstruction": (1.0, 0.0), "task": (0.0, 1.0)},
        8: {"reconstruction": (5.0, 0.0), "task": (0.0, 1.0)},
        16: {"reconstruction": (5.0, 0.5), "task": (0.0, 1.0)},
    },
}
_WITHOUT_HEADS = ("bp", "ddg", "fr", "fdg", "adl")  # their nets are one module, cut or not


def get_config(arguments: str = "cifar10,vgg8,deinforeg"):
    config, given, count = configuration.in_paper(arguments, PAPERS, _FORM)
    model, method = config.model.name, config.method.name
    paper = PAPERS.get(given or method, _NO_PAPER)
    configuration.set_keys(config, {"data.validation": 0.0, **paper.settings})
    config.data.update(paper.sets.get(config.data.name, {}))
    config.method.update(paper.methods.get(method, {}))
    cuts = paper.cuts.get(model, {})
    if count is None and method not in _WITHOUT_HEADS:
        count = next(iter(cuts), None)
    if cuts and count not in (None, *cuts):
        known = ", ".join(map(str, cuts))
        raise ValueError(f"K is {count}: {known} are known here; --config.model.cut takes others")
    if count is not None:
        configuration.set_keys(config, {"model.cut": cuts.get(count, count)})
    if method == "infopro":
        weights = _WEIGHTS.get(model, _WEIGHTS["resnet110"])
        config.method.update(weights.get(count, {}))
    if (model, method) == ("vgg8b", "bp"):
        config.model.update({"activation": "relu", "zero_output": False})
    return config
