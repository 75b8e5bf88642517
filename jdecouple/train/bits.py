"""What losses of language models are told in: bits a byte, and perplexity."""

import math
from collections.abc import Mapping
from typing import Any

from jdecouple.data import Dataset, TokenDataset

_MOST_NATS = 700.0  # beyond which the exponential is infinite


def units(values: Mapping[str, Any], dataset: Dataset, split: str) -> dict[str, float]:
    """The losses of exits in bits a byte and as perplexity (of a token); {} of other data sets.

    Of an evaluation these are "bits_per_byte", "perplexity" and those of "exit_{i}/..."; of
    training, where the bytes of a token are those of the whole split on average, of "block_{i}/..."
    with a cross-entropy, and the last of them.

    Args:
        values: metrics: "loss", "exit_{i}/loss", or "block_{i}/cross_entropy".
        dataset: what they are of.
        split: its name.
    """
    if not isinstance(dataset, TokenDataset) or not dataset.bytes_per_token[split]:
        return {}
    measured = "cross_entropy" if split == "train" else "loss"
    losses = {
        name.removesuffix(measured): value
        for name, value in values.items()
        if name.endswith(f"/{measured}") and isinstance(value, float)
    }
    if not losses:
        return {}
    losses[""] = values["loss"] if split != "train" else [*losses.values()][-1]
    bits = 1 / math.log(2) / dataset.bytes_per_token[split]
    found: dict[str, float] = {}
    for prefix, loss in losses.items():
        found[f"{prefix}bits_per_byte"] = loss * bits
        found[f"{prefix}perplexity"] = math.exp(min(loss, _MOST_NATS))
    return found
