"""Optimisers of the papers and some more, from optax parts."""

from typing import Any

import jax
import optax

from jdecouple._errors import require_number
from jdecouple.optim.schedules import LearningRate

_MUON_RMS = 0.2  # root mean square of a step's entries, before the learning rate


def _rate(learning_rate: LearningRate) -> LearningRate:
    """A schedule, or a number that is checked."""
    if not callable(learning_rate):
        require_number(positive=True, learning_rate=learning_rate)
    return learning_rate


def lars(
    learning_rate: LearningRate,
    *,
    weight_decay: float = 1e-4,
    momentum: float = 0.9,
    trust_coefficient: float = 0.001,
) -> optax.GradientTransformation:
    """LARS (arXiv 1708.03888) as DeInfoReg's authors define it.

    A parameter p of two or more axes with gradient g moves along q (g + weight_decay p), where
    q = trust_coefficient |p| / |g + weight_decay p|, or 1 where either norm is 0. Parameters of
    fewer axes (biases, BatchNorm) get neither decay nor adaptation. Momentum accumulates these, and
    the learning rate multiplies last (in `optax.lars` it comes before the momentum).

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((2, 2))}
    >>> optimizer = lars(0.2, weight_decay=0.0)
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> updates["kernel"][0]  # 0.2 x 0.001
    Array([-0.0002, -0.0002], dtype=float32)

    Args:
        learning_rate: Number or schedule.
        weight_decay: L2 coefficient.
        momentum: Decay of the accumulated update, in [0, 1).
        trust_coefficient: The factor eta of q.

    Raises:
        ValueError: A number is out of range.
    """
    require_number(weight_decay=weight_decay)
    require_number(positive=True, trust_coefficient=trust_coefficient)
    require_number(below=1, momentum=momentum)

    def has_axes(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=has_axes),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient), has_axes),
        optax.trace(momentum),
        optax.scale_by_learning_rate(_rate(learning_rate)),
    )


def adam(
    learning_rate: LearningRate,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980); with `weight_decay` > 0 AdamW (arXiv 1711.05101).

    The decay is decoupled: it is added after the scaling by the moments and multiplied by the
    learning rate. (The papers' code ignored weight decay under Adam.)

    Args:
        learning_rate: Number or schedule.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay coefficient.

    Raises:
        ValueError: A number is out of range.
    """
    decayed = adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    if weight_decay:
        return decayed
    return optax.adam(learning_rate, b1=b1, b2=b2, eps=eps)  # whose state has another layout


def adamw(
    learning_rate: LearningRate,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101): `adam` with a decay of every parameter, by default PyTorch's.

    Args:
        learning_rate: Number or schedule.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay coefficient.

    Raises:
        ValueError: A number is out of range.
    """
    require_number(weight_decay=weight_decay, eps=eps)
    require_number(below=1, b1=b1, b2=b2)
    return optax.adamw(_rate(learning_rate), b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)


def nadam(
    learning_rate: LearningRate,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Adam with Nesterov momentum (Dozat, ICLR workshop 2016); with a decoupled decay NAdamW.

    The first moment of a step is b1 m / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t), with m the moment
    that already holds the gradient g of step t.

    Args:
        learning_rate: Number or schedule.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay coefficient.

    Raises:
        ValueError: A number is out of range.
    """
    require_number(weight_decay=weight_decay, eps=eps)
    require_number(below=1, b1=b1, b2=b2)
    return optax.nadamw(_rate(learning_rate), b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)


def nadamw(
    learning_rate: LearningRate,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> optax.GradientTransformation:
    """NAdamW: `nadam` with a decay of every parameter, by default PyTorch's of AdamW.

    With `b1=0.99` it is what Ajanthan et al. (arXiv 2505.01099) train asynchronous pipelines with.

    Args:
        learning_rate: Number or schedule.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay coefficient.

    Raises:
        ValueError: A number is out of range.
    """
    return nadam(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)


def muon(
    learning_rate: LearningRate,
    *,
    beta: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Muon (Jordan 2024): momentum whose matrices are orthogonalised; Adam for all else.

    Matrices are the arrays named "kernel" of two axes (dense layers, [in, out]) and of four
    (convolutions, [height, width, in, out], as the matrix [height width in, out]). Those of
    classifiers are left to Adam, as its author advises for the last layer, and so are biases,
    norms, embeddings and recurrent layers. A matrix [m, n] moves by 0.2 sqrt(max(m, n)) times its
    orthogonalised momentum, whose entries then have a root mean square of 0.2, as those of AdamW's
    steps have in large models (arXiv 2502.16982); in small ones AdamW's are longer, and Muon wants
    a higher learning rate.

    Args:
        learning_rate: Number or schedule.
        beta: Decay of the momentum, in [0, 1).
        nesterov: Whether a step looks ahead along the momentum (and that of Adam, as `nadam` does).
        weight_decay: Decoupled decay coefficient, on every parameter.
        b1: Adam's decay of the first moment, in [0, 1).
        b2: Adam's decay of the second moment, in [0, 1).
        eps: Added to norms, and to the root of the second moment.

    Raises:
        ValueError: A number is out of range.
    """
    require_number(weight_decay=weight_decay, eps=eps)
    require_number(below=1, beta=beta, b1=b1, b2=b2)
    return optax.contrib.muon(
        _rate(learning_rate),
        beta=beta,
        nesterov=nesterov,
        weight_decay=weight_decay,
        adam_b1=b1,
        adam_b2=b2,
        eps=eps,
        adam_weight_decay=weight_decay,
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=_MUON_RMS,
    )


def _matrices(params: Any) -> Any:
    """Which axes of each array are the rows and the columns of a matrix; None of those without."""

    def axes(path: tuple, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        names = "/".join(jax.tree_util.keystr((key,), simple=True) for key in path).split("/")
        if names[-1] != "kernel" or leaf.ndim not in (2, 4) or "classifier" in names:
            return None
        *rows, column = range(leaf.ndim)
        return optax.contrib.MuonDimensionNumbers(tuple(rows), (column,))

    return jax.tree_util.tree_map_with_path(axes, params)


def sgd(
    learning_rate: LearningRate,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Stochastic gradient descent; the decay is L2, added to the gradient before the momentum.

    Args:
        learning_rate: Number or schedule.
        momentum: Decay of the accumulated gradient, in [0, 1).
        nesterov: Whether the step looks ahead along the momentum.
        weight_decay: L2 coefficient, on every parameter.

    Raises:
        ValueError: A number is out of range, or `nesterov` without momentum.
    """
    require_number(weight_decay=weight_decay)
    require_number(below=1, momentum=momentum)
    if nesterov and momentum == 0:
        raise ValueError("nesterov is True: a momentum above 0 is needed")
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.trace(momentum, nesterov=nesterov) if momentum else optax.identity(),
        optax.scale_by_learning_rate(_rate(learning_rate)),
    )
