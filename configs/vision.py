"""Images with the papers' settings: --config vision:dataset,model,method.

Data sets: digits, synthetic, or a prepared TFDS image set (cifar10, cifar100, fashion_mnist, ...;
--config.data.data_dir=FOLDER) or folder:PATH. Models: any of jdecouple.models for images. Methods:
any; those without settings of their own train as bp does.

Command:   jdecouple train --config vision:cifar10,vgg8,deinforeg --workdir runs/c10
Hardware:  a GPU for the papers' 200 epochs at full width (not measured yet); a CPU for less.
Expected:  measured on two CPU cores, CIFAR-10, a quarter of the width, 2 epochs of Adam without
           augmentation, best exit on the test set: deinforeg 77.7 %, bp 79.2 %, scpl 68.6 %
           (the whole commands are in bench/RESULTS.md).
"""

from jdecouple.train.config import named


def get_config(arguments: str = "cifar10,vgg8,deinforeg"):
    config = named(arguments)
    config.epochs = 200
    _PAPERS.get(config.method.name, _bp)(config)
    return config


def _deinforeg(config):
    """arXiv:2506.18193: LARS 0.2 -> 0.002 by cosine, weight decay 1e-4, batch 128."""
    config.data.augment = "strong"
    config.batch_size = 128
    config.optimizer.name = "lars"
    config.optimizer.learning_rate = 0.2
    config.optimizer.end_learning_rate = 0.002
    config.optimizer.weight_decay = 1e-4


def _scpl(config):
    """arXiv:2602.00062: Adam 1e-3 -> 1e-5 by cosine, batch 1024, a weak and a strong view."""
    if config.model.name == "vgg8":
        config.model.layout = "scpl"
    config.data.augment = "two_views"
    config.batch_size = 1024
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.end_learning_rate = 1e-5


def _bp(config):
    """The baseline of both papers, at DeInfoReg's batch with SCPL's optimiser.

    What they are compared with (early exits, Associated Learning with its 500 sigmoids) shares it.
    """
    config.data.augment = "strong"
    config.batch_size = 128
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.end_learning_rate = 1e-5


def _dgl(config):
    """arXiv:1901.08164, its comparison with DDG: SGD 0.01, divided by 10 at 150 and 225."""
    config.data.augment = "basic"
    config.batch_size = 128
    config.epochs = 300
    config.optimizer.name = "sgd"
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    config.optimizer.learning_rate = 0.01
    config.optimizer.schedule = "step_decay"
    config.optimizer.decay_epochs = (150, 225)


def _predsim(config):
    """arXiv:1901.06656: Adam 5e-4, divided by 4 at 200, 300, 350 and 375, batch 128."""
    config.data.augment = "basic"
    config.batch_size = 128
    config.epochs = 400
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.schedule = "step_decay"
    config.optimizer.decay_epochs = (200, 300, 350, 375)
    config.optimizer.decay_factor = 0.25


def _infopro(config):
    """arXiv:2101.10832: SGD 0.8 -> 0 by cosine after 10 epochs of warm-up, batch 1024."""
    config.data.augment = "basic"
    config.batch_size = 1024
    config.epochs = 160
    config.optimizer.name = "sgd"
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.optimizer.learning_rate = 0.8
    config.optimizer.warmup_epochs = 10.0
    config.optimizer.warmup_start = 0.0125


_PAPERS = {
    "deinforeg": _deinforeg,
    "scpl": _scpl,
    "dgl": _dgl,
    "predsim": _predsim,
    "infopro": _infopro,
}
