"""Images with the delayed methods' settings: --config delayed:dataset,model,method[@paper][,K].

Data sets: a prepared TFDS image set (cifar10, cifar100, ...; --config.data.data_dir=FOLDER),
digits or synthetic. Models: any; those of the papers are resnet20, resnet56, resnet110, resnet18,
resnet50, resnet101 and wrn28_10, and begin their stages where the paper's code does. Methods: fdg,
fr, ddg, adl, petra, and bp, which they compare with: as FDG trains it, or as `bp@fr` as Features
Replay does. 2bw and dsp are trained as FDG is, too: the settings of 2bw's paper are of language
models, and those of dsp's were not at hand. K stages, 2 if left out, share devices where there are
fewer.

The papers train on all training images and report the last epoch: nothing is held out for
validation (--config.data.validation=0.1 does).

Command:   jdecouple train --config delayed:cifar10,resnet56,fdg,3 --workdir runs/fdg
Hardware:  K GPUs for the papers' 300 epochs (not measured yet); a CPU for less.
Expected:  the papers' test errors stand in docs/methods.md and were not reproduced yet; what half
           the width of resnet20 reaches on one CPU core in 4 epochs stands in bench/RESULTS.md.
Differs:   the released code of fdg, adl and ddg multiplies old activations by current weights, with
           --config.method.current_weights=True; that of fr doubles the rate of the first stage,
           with --config.method.first_stage_lr_scale=2. PETRA decays no biases and BatchNorm, and
           multiplies the rate by --config.method.accumulate. More is in docs/methods.md.
"""

from jdecouple.train import config as configuration

_FORM = "dataset,model,method[@paper][,K]"
_NETS = ("resnet20", "resnet56", "resnet110", "resnet18", "resnet50", "resnet101", "wrn28_10")
# Numbers of equal parts that Features Replay and DDG cut these nets into.
_EQUAL_PARTS = {
    "resnet20": (2, 3),
    **dict.fromkeys(("resnet56", "resnet110", "resnet50", "resnet101"), (2, 3, 4)),
}
_STD = (0.2023, 0.1994, 0.2010)  # of FDG, for CIFAR-10

_SHARED = {
    "data.validation": 0.0,
    "data.augment": "basic",
    "batch_size": 128,
    "epochs": 300,
    "optimizer.name": "sgd",
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 5e-4,
    "optimizer.learning_rate": 0.1,
    "optimizer.schedule": "step_decay",
    "optimizer.decay_epochs": (150, 225, 275),
}
_FR = {
    "model.init": "he",
    "optimizer.nesterov": True,
    "optimizer.learning_rate": 0.01,
    "optimizer.decay_epochs": (150, 225),
}
_PETRA = {
    "batch_size": 64,
    "optimizer.nesterov": True,
    "optimizer.learning_rate": 0.1 * 64 / 256,
    "optimizer.warmup_epochs": 5.0,
    "optimizer.decay_epochs": (150, 225),
}
PAPERS = {
    "fdg": _SHARED,  # arXiv:1906.09108
    "adl": {**_SHARED, "optimizer.warmup_epochs": 5.0},  # arXiv:2012.03747
    "fr": {**_SHARED, **_FR},  # arXiv:1807.04511
    "ddg": {**_SHARED, **_FR},  # arXiv:1804.10574
    "petra": {**_SHARED, **_PETRA},  # arXiv:2406.02052, section 4.1, with k = 1
}
_AS_FDG = ("bp", "2bw", "dsp")


def get_config(arguments: str = "cifar10,resnet20,fdg,2"):
    config, given, stages = configuration.in_paper(arguments, PAPERS, _FORM)
    model, method = config.model.name, config.method.name
    if method not in (known := (*_AS_FDG, *PAPERS)):
        raise ValueError(f"method {method!r} is not one of {', '.join(known)}")
    paper = given or ("fdg" if method in _AS_FDG else method)
    configuration.set_keys(config, PAPERS[paper])
    if paper == "fdg" and config.data.name == "cifar10":
        config.data.std = _STD
    config.num_stages = stages or 2
    if config.num_stages > 1 and model in _NETS:
        equal = paper in ("fr", "ddg") and config.num_stages in _EQUAL_PARTS.get(model, ())
        config.split = "fr" if equal else "fdg"
    return config
