"""DeInfoReg's objective: information regularisation at every block (arXiv 2506.18193)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jdecouple._errors import require_bool, require_int, require_number, require_one_of
from jdecouple.methods.objectives.base import (
    BlockInfo,
    HeadOutput,
    Objective,
    at_least_float32,
    check_batch,
    inner_products,
    normalized_rows,
)
from jdecouple.methods.objectives.cross_entropy import cross_entropy
from jdecouple.methods.objectives.maps import pool_maps, pooled_info
from jdecouple.methods.objectives.similarity_matching import similarity_matching
from jdecouple.methods.objectives.tokens import POSITIONS
from jdecouple.models import layers, rows


def information_regularization(
    z: jax.Array, labels: jax.Array, num_classes: int, *, normalize: bool = True
) -> dict[str, jax.Array]:
    """The three terms of DeInfoReg's loss, unweighted, as the authors' code computes them.

    >>> z = jax.random.normal(jax.random.key(0), (8, 4))
    >>> terms = information_regularization(z, jnp.arange(8) % 2, num_classes=2)
    >>> {name: round(float(term), 3) for name, term in terms.items()}
    {'variance': 0.059, 'invariance': 0.719, 'covariance': 0.007}

    With N examples, D features, z L2-normalised by row, and zc = z minus its mean over the batch:
    variance is the mean over features of relu(1 - sqrt(var_unbiased(zc) + 1e-7)), divided by N;
    invariance the mean over all N x N pairs of (S(one-hot labels) - S(z))^2, S as in
    `similarity_matrix`; covariance the sum of the squared off-diagonal
    entries of zc'zc / N, divided by D.

    Unit rows make each deviation about 1/sqrt(D), so the hinge is always active and the variance
    term nearly the constant 1/N.

    Args:
        z: `[batch, dim]`, the projector's output, not yet normalised.
        labels: `[batch]`, int, in [0, num_classes).
        num_classes: Number of classes.
        normalize: False leaves the rows as they are: closer to VICReg, and no paper's setting.

    Returns:
        Scalars "variance", "invariance" and "covariance", float32 at least.

    Raises:
        ValueError: The shapes do not fit, or the batch has one example (no unbiased variance).
    """
    check_batch(z, labels, least=2)
    z = at_least_float32(z)
    if normalize:
        z = normalized_rows(z, floor=1e-12)
    centred = z - rows.mean_rows(z)
    variance = rows.sum_rows(jnp.square(centred)) / (z.shape[0] - 1)
    deviation = jnp.sqrt(variance + 1e-7)
    return {
        "variance": jnp.mean(jax.nn.relu(1 - deviation)) / z.shape[0],
        "invariance": similarity_matching(z, labels, num_classes),
        "covariance": _covariance_penalty(centred),
    }


def _covariance_penalty(centred: jax.Array) -> jax.Array:
    """Sum of squared off-diagonals of x'x/N over D, for `centred` x of shape [N, D].

    For N < D the sum of all squares comes from xx', which has the same one: cheaper by D/N, and on
    a data-parallel mesh it is the small x that has to travel, not the D x D matrix.
    """
    batch, dim = centred.shape
    if batch < dim:
        diagonal = jnp.sum(centred**2, axis=0) / batch
        total = jnp.sum((inner_products(centred) / batch) ** 2)
        return (total - jnp.sum(diagonal**2)) / dim
    covariance = inner_products(centred.T) / batch
    return jnp.sum(jnp.where(jnp.eye(dim, dtype=bool), 0, covariance) ** 2) / dim


class InformationRegularizationHead(nnx.Module):
    """Projector under the three terms, and a classifier: an exit at every block but embeddings."""

    def __init__(self, objective: "InformationRegularization", info: BlockInfo, rngs: nnx.Rngs):
        self.objective = objective
        self.num_classes = info.num_classes
        info = pooled_info(info, objective.head_pool)
        options = info.options(rngs)
        between: dict[str, Any] = {"batch_norm": objective.batch_norm}
        between["activation"] = objective.activation
        widths = objective.widths
        self.projector = layers.perceptron(info.size, widths, **between, **options)
        if info.is_embedding:
            self.classifier = None
        elif objective.mode == "unmerge":
            widths = (*objective.hidden_widths, info.num_classes)
            self.classifier = layers.perceptron(info.size, widths, **between, **options)
        else:
            out = widths[-1] if widths else info.size
            norm = layers.BatchNorm(out, param_dtype=info.param_dtype, rngs=rngs)
            self.classifier = nnx.Sequential(
                *([norm] if objective.batch_norm else []),
                layers.ACTIVATIONS[objective.activation],
                layers.linear(out, info.num_classes, **options),
            )

    def __call__(self, features: Any, carry: Mapping[str, Any]) -> HeadOutput:
        """Loss of `features` `[batch, ...]`, or a sequence, under `carry["label"]`."""
        labels = carry["label"]
        weights = self.objective
        features = pool_maps(features, weights.head_pool)
        z = self.projector(features)
        logits = self._classify(features, z)
        terms = information_regularization(z, labels, self.num_classes, normalize=weights.normalize)
        loss = (
            weights.variance * terms["variance"]
            + weights.invariance * terms["invariance"]
            + weights.covariance * terms["covariance"]
        )
        if logits is not None:
            terms["cross_entropy"] = cross_entropy(logits, labels)
            loss = loss + weights.alpha * terms["cross_entropy"]
        return HeadOutput(loss, terms, logits)

    def logits(self, features: Any) -> jax.Array | None:
        """Logits `[batch, classes]` of this exit; None at an embedding block."""
        features = pool_maps(features, self.objective.head_pool)
        return self._classify(features, self.projector(features))

    def _classify(self, features: jax.Array, z: jax.Array) -> jax.Array | None:
        if self.classifier is None:
            return None
        merged = self.objective.mode == "merge"
        return self.classifier(z if merged else jax.lax.stop_gradient(features))


@dataclasses.dataclass(frozen=True)
class InformationRegularization(Objective):
    """DeInfoReg: the three weighted terms of every block plus `alpha` times its cross-entropy.

    The model's own classifier is ignored: every block has one, except those that only embed tokens
    or patches, which have no cross-entropy and are no exits.

    Attributes:
        projector: Widths of the projector's dense layers (BatchNorm and ReLU between them), as text
            "2048-2048-2048" or as a tuple; or "identity" (or an empty tuple): z is the flattened
            features.
        mode: "merge": the classifier (BatchNorm, ReLU, dense) reads the projector's output, with
            its gradient. "unmerge": a net of its own (dense layers with BatchNorm and ReLU between
            them) reads the detached block output.
        variance: Weight of the variance term.
        invariance: Weight of the invariance term.
        covariance: Weight of the covariance term.
        alpha: Weight of the cross-entropy.
        normalize: Whether z is L2-normalised by row before the terms.
        head_pool: Average maps over this many bins a side before projector and classifier; 0: do
            not, as in the paper.
        hidden: Widths of the hidden layers of the "unmerge" classifier, as text or as a tuple;
            "projector": those of the projector (none under "identity").
        activation: In place of ReLU, in projector and classifier: "gelu", "relu", "sigmoid" or
            "tanh" (the authors' code for texts).
        batch_norm: Whether BatchNorm precedes it; False in the authors' code for texts.
        positions: Positions of every row that are drawn as examples where labels are those of
            positions, as in language models.
    """

    projector: str | tuple[int, ...] = "2048-2048-2048"
    mode: str = "merge"
    variance: float = 1.0
    invariance: float = 1.0
    covariance: float = 1.0
    alpha: float = 0.001
    normalize: bool = True
    head_pool: int = 0
    hidden: str | tuple[int, ...] = "projector"
    activation: str = "relu"
    batch_norm: bool = True
    positions: int = POSITIONS
    tokens: ClassVar[str] = "drawn"
    trains_classifier: ClassVar[bool] = False

    def __post_init__(self):
        for name in ("projector", "hidden"):
            if isinstance(value := getattr(self, name), list):  # modules that carry this hash it
                object.__setattr__(self, name, tuple(value))
        _ = self.widths, self.hidden_widths  # whether they are widths
        require_one_of(("merge", "unmerge"), mode=self.mode)
        require_one_of(layers.ACTIVATIONS, activation=self.activation)
        for name in ("variance", "invariance", "covariance", "alpha"):
            require_number(**{name: getattr(self, name)})
        require_bool(batch_norm=self.batch_norm, normalize=self.normalize)
        require_int(0, head_pool=self.head_pool)
        require_int(1, positions=self.positions)

    @property
    def widths(self) -> tuple[int, ...]:
        """Output sizes of the projector's dense layers; empty for "identity"."""
        return () if self.projector == "identity" else _widths("projector", self.projector)

    @property
    def hidden_widths(self) -> tuple[int, ...]:
        """Output sizes of the hidden layers of the "unmerge" classifier."""
        if self.hidden == "projector":
            return self.widths[:-1]
        return _widths("hidden", self.hidden)

    def head(self, info: BlockInfo, rngs: nnx.Rngs) -> nnx.Module:
        """Head for any block."""
        return InformationRegularizationHead(self, info, rngs)


def _widths(name: str, value: Any) -> tuple[int, ...]:
    """Positive widths of dense layers, given as text, as a tuple or as one number."""
    parts = value.split("-") if isinstance(value, str) else value
    texts = [str(part) for part in (parts if isinstance(parts, list | tuple) else (parts,))]
    if not all(text.isascii() and text.isdigit() and int(text) > 0 for text in texts):
        word = {"projector": "identity", "hidden": "projector"}[name]
        raise ValueError(
            f"{name} is {value!r}: {word!r} or positive widths as in '2048-2048-2048' are needed"
        )
    return tuple(map(int, texts))
