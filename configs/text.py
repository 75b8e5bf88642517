"""Texts with the papers' settings: --config configs/text.py:dataset,model,method.

Data sets: glue/sst2, ag_news_subset, imdb_reviews (prepared TFDS sets;
--config.data.data_dir=FOLDER), or csv:PATH and parquet:PATH (DBpedia-14 and other labelled texts).
Models: lstm, transformer. Methods: any; those of the papers are bp, deinforeg, scpl.

Command:   python train.py --config configs/text.py:glue/sst2,lstm,deinforeg --workdir runs/sst2
Hardware:  a GPU for the papers' 50 epochs at full width (not measured yet); a CPU for less.
Expected:  TODO
"""

from jdecouple import config as configuration
from jdecouple import methods, models

# Words that the papers keep of a text, by a part of the data set's name.
_LENGTHS = {"sst2": 15, "ag_news": 60, "imdb": 350, "dbpedia": 400}


def get_config(arguments: str = "glue/sst2,lstm,deinforeg"):
    parts = [part.strip() for part in arguments.rsplit(",", 2)]  # a path may have commas
    if len(parts) != 3:
        raise ValueError(f"'dataset,model,method' is needed after the file: given {arguments!r}")
    dataset, model, method = parts
    models.get(model)
    arguments = methods.arguments(method)
    config = configuration.default()
    config.data.name = dataset
    config.data.max_length = next((n for k, n in _LENGTHS.items() if k in dataset.lower()), None)
    config.model.name = model
    config.model.hidden = 300
    config.model.depth = 4
    config.model.init = "torch"  # as the papers' code; local losses see the scale
    if model == "transformer":
        config.model.layout = "paper"
    config.method.name = method
    config.method.init = "torch"
    if "projector" in arguments:
        config.method.projector = "identity"
    config.epochs = 50
    config.batch_size = 1024 if method == "scpl" else 128  # arXiv:2602.00062 and 2506.18193
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "constant"
    return config
