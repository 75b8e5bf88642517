"""Language models without a long backward: --config lm:data,model,method[,K].

Data sets: topics (0.4 MB, for seconds), stdlib (the sources of Python's standard library),
text:PATH, or prepared TFDS sets of texts without labels (tiny_shakespeare, lm1b). Models: gpt (of
about 0.9 million parameters), lstm_lm. Methods: all but al and infopro. K cuts the layers into that
many equal parts: local modules for methods with a loss at every block, stages for all. Without K
every layer is a module.

Bytes, rows of 128 tokens, batches of 32, Adam 1e-3 -> 1e-4 (cosine), one epoch. No paper trains
like this: it is for comparing methods at equal batches and steps. Metrics have bits per byte.

Command:   jdecouple train --config lm:topics,gpt,dgl,4 --workdir runs/lm
           jdecouple generate runs/lm --prompt "def "
Hardware:  a CPU.
Expected:  docs/language-models.md.
"""

import re

from jdecouple._errors import require_int
from jdecouple.methods import table as methods
from jdecouple.train import config as configuration

_MODELS = ("gpt", "lstm_lm")
_IMAGES = ("al", "infopro")  # and labels of whole inputs
_METHODS = {
    "early_exit": {"branch": "norm"},
    "greedy_exit": {"branch": "norm"},
    "dgl": {"aux": "norm"},
    "man": {"aux": "norm"},
    "deinforeg": {"projector": "identity", "activation": "gelu", "batch_norm": False},
    "scpl": {"projector": "identity"},
}


def get_config(arguments: str = "topics,gpt,dgl,4"):
    names, count = re.fullmatch(r"(.*?)(?:,\s*(\d+))?\s*", arguments, re.DOTALL).groups()
    config = configuration.named(names)
    model, method = config.model.name, config.method.name
    if model not in _MODELS:
        raise ValueError(f"model {model!r} is not one of {', '.join(_MODELS)}")
    if method in _IMAGES:
        raise ValueError(f"method {method!r} has no loss of tokens: other methods have")
    config.data.max_length = 128
    config.model.init = config.method.init = "flax"
    config.method.update(_METHODS.get(method, {}))
    config.batch_size = 32
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.end_learning_rate = 1e-4
    config.log_every = 10
    if count is not None:
        require_int(1, K=int(count))
        config.num_stages = int(count)
    if count is not None and (methods.spec(method).route.local or method == "early_exit"):
        config.model.cut = count
    elif config.num_stages not in (None, 1):
        config.split = "even"
    return config
