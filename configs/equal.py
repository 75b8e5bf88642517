"""The same settings for all methods: --config equal:dataset,model,method.

Data sets, models and methods: any. Adam 1e-3 -> 1e-5 (cosine), batch 128, 10 epochs, no
augmentation, PyTorch's initial weights. No paper trains like this; theirs are in vision,
delayed and text.

Command:   jdecouple train --config equal:digits,mlp,deinforeg --workdir runs/equal
           python bench/accuracy.py --data digits --methods bp scpl --models mlp --output runs/table
Hardware:  anything; a CPU for reduced widths.
Expected:  the tables of accuracies in bench/RESULTS.md.
"""

from jdecouple.train.config import named


def get_config(arguments: str = "digits,mlp,deinforeg"):
    config = named(arguments)
    config.batch_size = 128
    config.epochs = 10
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.end_learning_rate = 1e-5
    return config
