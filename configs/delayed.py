"""Images as the papers on delayed gradients train them: --config delayed:dataset,model,method,K.

Data sets: a prepared TFDS image set (cifar10, cifar100, ...; --config.data.data_dir=FOLDER),
digits or synthetic. Models: any; those of the papers are resnet20, resnet56, resnet110, resnet18,
resnet50, resnet101 and wrn28_10, and begin their stages where FDG's code does. Methods: fdg, fr,
ddg, adl, and bp, which they compare with. K stages, 2 if left out, share devices where there are
fewer.

Command:   jdecouple train --config delayed:cifar10,resnet56,fdg,3 --workdir runs/fdg
Hardware:  K GPUs for the papers' 300 epochs (not measured yet); a CPU for less.
Expected:  the papers' test errors stand in docs/methods.md; what half the width of resnet20 reaches
           on one CPU core in 4 epochs stands in bench/RESULTS.md.
"""

from jdecouple import methods, models
from jdecouple.train import config as configuration

_PUBLISHED = ("resnet20", "resnet56", "resnet110", "resnet18", "resnet50", "resnet101", "wrn28_10")


def get_config(arguments: str = "cifar10,resnet20,fdg,2"):
    parts = [part.strip() for part in arguments.split(",")]
    if len(parts) == 3:
        parts.append("2")
    if len(parts) != 4 or not parts[3].isdecimal() or int(parts[3]) < 1:
        raise ValueError(f"'dataset,model,method,K' is needed after the file: given {arguments!r}")
    dataset, model, method, stages = parts
    models.get(model)
    methods.arguments(method)
    if method not in _PAPERS:
        raise ValueError(f"method {method!r} is not one of {', '.join(_PAPERS)}")
    config = configuration.default()
    config.data.name = dataset
    config.data.augment = "basic"
    config.model.name = model
    config.model.init = "torch"
    config.method.name = method
    config.num_stages = int(stages)
    if model in _PUBLISHED and config.num_stages > 1:
        config.split = "fdg"
    config.batch_size = 128
    config.epochs = 300
    config.optimizer.name = "sgd"
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = "step_decay"
    _PAPERS[method](config)
    return config


def _fdg(config):
    """arXiv:1906.09108: 0.1, divided by 10 at 150, 225 and 275 epochs; its baselines likewise."""
    config.optimizer.learning_rate = 0.1
    config.optimizer.decay_epochs = (150, 225, 275)


def _adl(config):
    """arXiv:2012.03747: as FDG, after 5 epochs of warm-up from a hundredth of the rate."""
    _fdg(config)
    config.optimizer.warmup_epochs = 5.0


def _fr(config):
    """arXiv:1807.04511 and 1804.10574: Nesterov, 0.01, divided by 10 at 150 and 225 epochs.

    The released code of Features Replay also doubles the rate of the first stage:
    --config.method.first_stage_lr_scale=2.
    """
    config.optimizer.nesterov = True
    config.optimizer.learning_rate = 0.01
    config.optimizer.decay_epochs = (150, 225)


_PAPERS = {"bp": _fdg, "fdg": _fdg, "adl": _adl, "fr": _fr, "ddg": _fr}
