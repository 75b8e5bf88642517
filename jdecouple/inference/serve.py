"""Answers of the exported network in this folder, with jax alone: python serve.py INPUTS.npy."""

import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax import export

FOLDER = Path(__file__).parent
# On CPUs jaxlib before 0.11.1 may get wrong what it fuses to a product (jax issue 39103).
SINGLE = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


@functools.cache
def network():
    """The network of `model.jax`, compiled anew for every number of inputs."""
    read = export.deserialize(bytearray((FOLDER / "model.jax").read_bytes()))
    options = SINGLE if jax.__version_info__ < (0, 11, 1) else None
    return jax.jit(read.call, compiler_options=options)


def predict(x):
    """Logits of inputs such as `model.json` describes: [n, classes], of all exits one more axis."""
    return np.asarray(network()(x))


if __name__ == "__main__":
    names = json.loads((FOLDER / "model.json").read_text())["class_names"]
    for label in np.atleast_3d(predict(np.load(sys.argv[1])).T).T[-1].argmax(-1):
        print(names[label])
