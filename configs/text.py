"""Texts with the papers' settings: --config text:dataset,model,method.

Data sets: glue/sst2, ag_news_subset, imdb_reviews (prepared TFDS sets;
--config.data.data_dir=FOLDER), or csv:PATH and parquet:PATH (DBpedia-14 and other labelled texts,
see docs/data.md). Models: lstm, transformer. Methods: all but infopro, which needs images; the
papers' are bp, early_exit, al, scpl and deinforeg.

Command:   jdecouple train --config text:glue/sst2,lstm,deinforeg --workdir runs/sst2
Hardware:  a GPU for the papers' 50 epochs at full width (not measured yet); a CPU for less.
Expected:  measured on one CPU core, SST-2, two blocks of width 64 and 30 words, 2 epochs, accuracy
           on the set's own validation split (its test labels are hidden), mean of two seeds: lstm
           bp 82.1 %, deinforeg 82.7 %; transformer bp 82.4 %, deinforeg 80.9 % (all methods and the
           command in bench/RESULTS.md).
"""

from jdecouple.train.config import named

# Words that the papers keep of a text, by a part of the data set's name.
_LENGTHS = {"sst2": 15, "ag_news": 60, "imdb": 350, "dbpedia": 400}
# Arguments that the papers set for texts.
_METHODS = {
    "deinforeg": {"projector": "identity"},  # arXiv:2506.18193
    "scpl": {"projector": "identity"},  # arXiv:2602.00062
    "al": {"features": 300, "expansion": 0, "activation": "tanh"},  # arXiv:1906.05560
}


def get_config(arguments: str = "glue/sst2,lstm,deinforeg"):
    config = named(arguments)
    model, method = config.model.name, config.method.name
    if model not in ("lstm", "transformer"):
        raise ValueError(f"model {model!r} is not one of lstm, transformer")
    name = config.data.name.lower()
    config.data.max_length = next((n for part, n in _LENGTHS.items() if part in name), None)
    config.model.hidden = 300
    config.model.depth = 4
    if model == "transformer":
        config.model.layout = "paper"
    for key, value in _METHODS.get(method, {}).items():
        config.method[key] = value
    config.batch_size = 1024 if method == "scpl" else 128
    config.epochs = 50
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "constant"
    return config
