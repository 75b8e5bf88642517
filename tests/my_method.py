"""A local method of one's own, without touching the package: `python tests/my_method.py`."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

import jdecouple as jd


def hinge(logits, labels, margin):
    """The right class above, and every other below, by a margin."""
    sign = 2 * jax.nn.one_hot(labels, logits.shape[1]) - 1
    return jnp.mean(jnp.maximum(0, margin - sign * logits))


class HingeHead(nnx.Module):
    """What the method adds to every block."""

    def __init__(self, margin, site, rngs):
        self.margin = margin
        self.readout = nnx.Linear(site.size, site.num_classes, rngs=rngs)

    def logits(self, features):
        """The head is an exit."""
        return self.readout(features.reshape(len(features), -1))

    def __call__(self, features, carry):
        """Loss of a block's output."""
        logits = self.logits(features)
        loss = hinge(logits, carry["label"], self.margin)
        return jd.objectives.HeadOutput(loss, {"hinge": loss}, logits)


@dataclasses.dataclass(frozen=True)
class Hinge:
    """What each block minimises; its fields are the method's options."""

    margin: float = 1.0
    needs_classifier: ClassVar[bool] = False
    trains_classifier: ClassVar[bool] = False

    def head(self, site, rngs):
        """The head of any block."""
        return HingeHead(self.margin, site, rngs)


jd.methods.register("hinge", Hinge, jd.routes.Local)


def get_config():
    """For train.py: --config tests/my_method.py --config.method.margin=0.5."""
    from jdecouple.train.config import default

    config = default()
    config.method.name, config.model.name = "hinge", "mlp"
    config.model.hidden, config.model.depth = 64, 3
    config.epochs, config.batch_size = 5, 64
    return config


def train(steps, **options):
    """Accuracy by exit after some steps on the digits."""
    digits = jd.data.load("digits")
    batches = jd.data.train_batches(digits.train, 64, seed=0)
    model = jd.models.get("mlp")(
        10, hidden=64, depth=3, rngs=nnx.Rngs(0), **digits.model_arguments()
    )
    trainer = jd.Trainer(
        model,
        jd.methods.get("hinge", **options),
        jd.optim.adam(2e-3),
        mesh=jd.make_mesh(stages=3),
        transform=digits.transform("none"),
        example=next(batches),
    )
    state = trainer.init()
    for _ in range(steps):
        state, _ = trainer.step(state, next(batches))
    return trainer.evaluate(state, jd.data.evaluation_batches(digits.test, 64))


if __name__ == "__main__":
    print(train(100))
