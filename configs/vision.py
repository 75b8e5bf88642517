"""Images with the papers' settings: --config configs/vision.py:dataset,model,method.

Data sets: digits, synthetic, or a prepared TFDS image set (cifar10, cifar100, fashion_mnist, ...;
--config.data.data_dir=FOLDER) or folder:PATH. Models: any of jdecouple.models for images. Methods:
any; those without settings of their own train as bp does.

Command:   python train.py --config configs/vision.py:cifar10,vgg8,deinforeg --workdir runs/c10
Hardware:  a GPU for the papers' 200 epochs at full width (not measured yet); a CPU for less.
Expected:  measured on two CPU cores, CIFAR-10, a quarter of the width, 2 epochs of Adam without
           augmentation, best exit on the test set: deinforeg 77.7 %, bp 79.2 %, scpl 68.6 %
           (the whole commands are in bench/RESULTS.md).
"""

from jdecouple import config as configuration
from jdecouple import methods, models


def get_config(arguments: str = "cifar10,vgg8,deinforeg"):
    parts = [part.strip() for part in arguments.rsplit(",", 2)]  # a path may have commas
    if len(parts) != 3:
        raise ValueError(f"'dataset,model,method' is needed after the file: given {arguments!r}")
    dataset, model, method = parts
    models.get(model)
    methods.arguments(method)
    config = configuration.default()
    config.data.name = dataset
    config.model.name = model
    config.model.init = "torch"  # as the papers' code; local losses and LARS see the scale
    config.method.name = method
    config.method.init = "torch"
    config.epochs = 200
    _PAPERS.get(method, _bp)(config)
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
    """The baseline of both papers, at DeInfoReg's batch with SCPL's optimiser."""
    config.data.augment = "strong"
    config.batch_size = 128
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.end_learning_rate = 1e-5


_PAPERS = {"bp": _bp, "deinforeg": _deinforeg, "scpl": _scpl}
