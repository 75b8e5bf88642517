"""Texts with the papers' settings: --config text:dataset,model,method[@paper].

Data sets: glue/sst2, ag_news_subset, imdb_reviews (prepared TFDS sets;
--config.data.data_dir=FOLDER), or csv:PATH and parquet:PATH (DBpedia-14 and other labelled texts,
see docs/data.md). Models: lstm, transformer. Methods: all but infopro, which needs images; the
papers' are bp, early_exit, al, scpl and deinforeg. Papers are deinforeg, whose settings all methods
but scpl have by themselves, and scpl: `bp@scpl` is the backpropagation that SCPL compares with.

The papers train on all training texts and report the last epoch: nothing is held out for validation
(--config.data.validation=0.1 does).

Command:   jdecouple train --config text:glue/sst2,lstm,deinforeg --workdir runs/sst2
Hardware:  a GPU for the papers' 50 epochs at full width (not measured yet); a CPU for less.
Expected:  the papers' figures were not reproduced yet; what nets of width 64 reach in two epochs on
           a CPU core stands in bench/RESULTS.md.
Differs:   word vectors begin at random unless --config.data.glove=FILE gives the papers'. Of
           DBpedia they read the content without the title, which a file with a header gives by
           --config.data.text_columns="('content',)". What else differs is in the tables of
           docs/methods.md, docs/models.md and docs/data.md.
"""

from jdecouple.train import config as configuration

_FORM = "dataset,model,method[@paper]"
_SETTINGS = {
    "data.validation": 0.0,
    "model.hidden": 300,
    "epochs": 50,
    "optimizer.name": "adam",
    "optimizer.learning_rate": 1e-3,
    "optimizer.schedule": "constant",
}
PAPERS = {
    "deinforeg": {  # arXiv:2506.18193
        "model.depth": 4,
        "model.classifier": "deinforeg",
        "batch_size": 128,
    },
    "scpl": {  # arXiv:2602.00062, whose four layers are the embedding and three more
        "model.depth": 3,
        "model.pass_state": True,
        "model.classifier": "scpl",
        "batch_size": 1024,
    },
}
_NETS = {
    "lstm": {"merge": "concat", "mask_padding": False},
    "transformer": {
        "layout": "paper",
        "dropout": 0.1,
        "embedding_dropout": 0.0,
        "mask_embedding": False,
        "init": "xavier",
    },
}
_METHODS = {
    "deinforeg": {"projector": "identity", "activation": "tanh", "batch_norm": False},
    "scpl": {"projector": "identity"},
    "al": {"features": 300, "expansion": 0, "activation": "tanh"},
}
# Words that are kept of a text, by a part of the data set's name, and where common ones are left
# out first.
_SETS = {
    "sst2": {"max_length": 15, "clean": "paper"},
    "ag_news": {"max_length": 60, "clean": "paper"},
    "imdb": {"max_length": 350, "clean": "punctuation"},
    "dbpedia": {"max_length": 350, "clean": "paper"},
}


def get_config(arguments: str = "glue/sst2,lstm,deinforeg"):
    config, given, count = configuration.in_paper(arguments, PAPERS, _FORM)
    model, method, name = config.model.name, config.method.name, config.data.name.lower()
    if count is not None:
        raise ValueError(f"{_FORM!r} is needed after the file: given {arguments!r}")
    if model not in _NETS:
        raise ValueError(f"model {model!r} is not one of {', '.join(_NETS)}")
    paper = given or (method if method in PAPERS else "deinforeg")
    configuration.set_keys(config, {**_SETTINGS, **PAPERS[paper]})
    config.model.update(_NETS[model])
    config.method.update(_METHODS.get(method, {}))
    config.data.update(next((_SETS[part] for part in _SETS if part in name), {}))
    if paper == "scpl" and "dbpedia" in name:
        config.data.max_length = 400
    return config
