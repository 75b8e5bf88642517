"""The same settings for all methods: --config configs/equal.py:dataset,model,method.

Data sets, models and methods: any. Adam 1e-3 -> 1e-5 (cosine), batch 128, 10 epochs, no
augmentation, PyTorch's initial weights. No paper trains like this; theirs are in vision.py,
delayed.py and text.py.

Command:   python train.py --config configs/equal.py:digits,mlp,deinforeg --workdir runs/equal
           python bench/accuracy.py --data digits --methods bp scpl --models mlp --output runs/table
Hardware:  anything; a CPU for reduced widths.
Expected:  the tables of accuracies in bench/RESULTS.md.
"""

from jdecouple import config as configuration
from jdecouple import methods, models


def get_config(arguments: str = "digits,mlp,deinforeg"):
    parts = [part.strip() for part in arguments.rsplit(",", 2)]
    if len(parts) != 3:
        raise ValueError(f"'dataset,model,method' is needed after the file: given {arguments!r}")
    dataset, model, method = parts
    models.get(model)
    methods.arguments(method)
    config = configuration.default()
    config.data.name = dataset
    config.model.name = model
    config.model.init = "torch"
    config.method.name = method
    config.method.init = "torch"
    config.batch_size = 128
    config.epochs = 10
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.end_learning_rate = 1e-5
    return config
