"""Symmetric label noise."""

import numpy as np


def symmetric_label_noise(
    num_examples: int, num_classes: int, fraction: float, seed: int
) -> np.ndarray:
    """Draws which labels are replaced, and by what.

    Exactly `round(fraction * num_examples)` examples get a class drawn uniformly from all
    classes, the true one included, so that on average `fraction * (1 - 1 / num_classes)` of the
    labels are wrong.

    Args:
        num_examples: size of the training split.
        num_classes: number of classes.
        fraction: share of the labels that are drawn anew, in [0, 1].
        seed: seed of NumPy's PCG64.

    Returns:
        int32 [num_examples]: the new class, or -1 where the label is kept.

    Raises:
        ValueError: `fraction` is not in [0, 1].
    """
    number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
    if not number or not 0 <= fraction <= 1:
        raise ValueError(f"label_noise is {fraction!r}: a number in [0, 1] is needed")
    generator = np.random.Generator(np.random.PCG64(seed))
    chosen = generator.permutation(num_examples)[: round(fraction * num_examples)]
    replacements = np.full(num_examples, -1, np.int32)
    replacements[chosen] = generator.integers(num_classes, size=len(chosen))
    return replacements
