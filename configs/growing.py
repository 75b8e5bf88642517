"""Texts in two steps, as in DeInfoReg: --config growing:dataset,model,method.

At first the embedding block and two others train on the first words of a text. Then they are
frozen, and two more blocks train on what these give and on further words, which the first never
see. In the paper (arXiv 2506.18193) these are 100 words and 250 more; SST-2's texts are short, here
they are 8 and 16.

Data sets: glue/sst2, imdb_reviews (prepared TFDS sets; --config.data.data_dir=FOLDER), or csv:PATH
and parquet:PATH. Models: lstm, transformer. Methods: all local ones but infopro.

Command:   jdecouple train --config growing:glue/sst2,lstm,deinforeg --workdir runs/grown
           or step by step, with the same workdir: the first with --config.epochs=10, which ends
           before the net grows, the second without.
Hardware:  a GPU at full width (not measured yet); a CPU for less.
Expected:  measured on a CPU, hidden 64, flax's initial weights, 2 + 2 epochs, seed 0, accuracy on
           SST-2's own validation split: 75.9 % after the first step (exit 2), 77.6 % after the
           second (exit 4; exit 2 as before).
Differs:   nets, heads and validation split are the library's own; those of the paper are in text.
"""

from jdecouple.train.config import named

# Words of the two parts, by a part of the data set's name.
_PARTS = {"sst2": (8, 16)}
_METHODS = {
    "deinforeg": {"projector": "identity"},
    "scpl": {"projector": "identity"},
    "al": {"features": 300, "expansion": 0, "activation": "tanh"},
}


def get_config(arguments: str = "glue/sst2,lstm,deinforeg"):
    config = named(arguments)
    if config.model.name not in ("lstm", "transformer"):
        raise ValueError(f"model {config.model.name!r} is not one of lstm, transformer")
    name = config.data.name.lower()
    config.data.parts = next((parts for key, parts in _PARTS.items() if key in name), (100, 250))
    config.model.hidden = 300
    config.model.depth = 4
    config.model.further = (3,)  # the first of the blocks that are added
    for key, value in _METHODS.get(config.method.name, {}).items():
        config.method[key] = value
    config.growth.blocks = (3, 5)
    config.growth.epochs = (0, 10)
    config.batch_size = 128
    config.epochs = 20
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "constant"
    return config
