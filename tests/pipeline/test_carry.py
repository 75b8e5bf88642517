"""What a head writes into the carry reaches the blocks above, however they are run."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from flax import nnx

import jdecouple as jd
from jdecouple.methods.objectives import HeadOutput
from jdecouple.methods.routes import Local, Synchronous

pytestmark = pytest.mark.usefixtures("module_x64")

STEPS = 6
WIDTH = 3


class Trail(nnx.Module):
    """Writes `trail`, and compares a projection of the features with the trail from below."""

    def __init__(self, site: Any, rngs: nnx.Rngs):
        options = {"param_dtype": jnp.float64, "rngs": rngs}
        self.project = nnx.Linear(site.size, WIDTH, **options)
        self.mark = nnx.Linear(WIDTH, WIDTH, **options)
        self.readout = nnx.Linear(site.size, site.num_classes, **options)

    def __call__(self, features: Any, carry: Any) -> HeadOutput:
        below = carry.get("trail", jnp.ones((features.shape[0], WIDTH)))
        logits = self.readout(features)
        entropy = jd.objectives.cross_entropy(logits, carry["label"])
        loss = entropy + jnp.mean((self.project(features) - below) ** 2)
        # Nothing but blocks above reads what `mark` yields: it must never learn.
        return HeadOutput(loss, {}, logits, {"trail": jnp.tanh(self.mark(below)) + 0.1})

    def logits(self, features: Any) -> jax.Array:
        return self.readout(features)


@dataclasses.dataclass(frozen=True)
class Trails:
    needs_classifier: ClassVar[bool] = False
    trains_classifier: ClassVar[bool] = False
    head: ClassVar[Any] = staticmethod(Trail)


METHODS = {
    name: jd.methods.Method(name, Trails(), route())
    for name, route in (("local", Local), ("synchronous", Synchronous))
}
NAMES = pytest.mark.parametrize("name", METHODS)


@functools.cache
def trained(name: str, stages: int = 1, data: int = 1, chunk: int = 1, **options: Any) -> tuple:
    """Trainer, its weights before training and after, and the metrics of every step."""
    batches = nets.batches(STEPS, dtype=np.float64)
    trainer = jd.Trainer(
        nets.mlp(param_dtype=jnp.float64),
        METHODS[name],
        jd.optim.sgd(0.1, momentum=0.9),
        mesh=jd.make_mesh(stages, data),
        num_classes=nets.CLASSES,
        example=batches[0],
        **options,
    )
    state = trainer.init()
    before = nets.weights(trainer, state)
    metrics = []
    for start in range(0, STEPS, chunk):
        state, found = trainer.steps(state, batches[start : start + chunk])
        metrics += nets.rows(found)
    return trainer, before, nets.weights(trainer, state), metrics


def assert_equal(found: tuple, wanted: tuple) -> None:
    assert nets.largest_error(found[2], wanted[2]) < 1e-12
    for one, other in zip(found[3], wanted[3], strict=True):
        assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "stages", "remat"),
    [
        ("local", 2, "none"),
        pytest.param("synchronous", 2, "none", marks=pytest.mark.slow),
        pytest.param("synchronous", 4, "stages", marks=pytest.mark.slow),
        pytest.param("local", 4, "stages", marks=pytest.mark.slow),
        *(
            pytest.param(name, stages, remat, marks=pytest.mark.slow)
            for name in METHODS
            for stages, remat in ((2, "blocks"), (4, "elementwise"))
        ),
    ],
)
def test_stages_apart_equal_one_stage(name, stages, remat):
    assert_equal(trained(name, stages, remat=remat), trained(name))


@pytest.mark.slow
@NAMES
def test_stages_with_replicas_and_microbatches(name):
    assert_equal(trained(name, 2, 2, microbatches=2), trained(name, microbatches=2))


@pytest.mark.parametrize("name", nets.marked(METHODS, ("local",)))
def test_one_program_for_all_stages(name):
    """The first block reads no trail, so it is of another kind than the others."""
    found = trained(name, 4, engine="spmd")
    assert found[0].engine == "spmd"
    assert_equal(found, trained(name))


@pytest.mark.slow
@pytest.mark.parametrize("stages", nets.marked((1, 2), (2,)))
def test_chunks(stages):
    assert_equal(trained("local", stages, chunk=3), trained("local"))


@pytest.mark.slow
@pytest.mark.parametrize("name", nets.marked(METHODS, ("synchronous",)))
def test_no_gradient_flows_back_through_what_a_head_writes(name):
    _, before, after, _ = trained(name, 2)
    moved = {key for key in after if not np.array_equal(after[key], before[key])}
    assert {key for key in after if key not in moved} == {
        f"block_{i}/params/head/mark/{leaf}" for i in range(4) for leaf in ("kernel", "bias")
    }


class Late(Trail):
    """The third block alone writes an entry."""

    def __init__(self, site: Any, rngs: nnx.Rngs):
        super().__init__(site, rngs)
        self.late = site.index == 2

    def __call__(self, features: Any, carry: Any) -> HeadOutput:
        output = super().__call__(features, carry)
        return output._replace(carry={"late": features} if self.late else {})


def with_heads(head: Any, **options: Any) -> jd.Trainer:
    objective = type("Heads", (Trails,), {"head": staticmethod(head)})()
    return jd.Trainer(
        nets.mlp(param_dtype=jnp.float64),
        jd.methods.Method("local", objective, Local()),
        jd.optim.sgd(0.1),
        mesh=jd.make_mesh(4),
        num_classes=nets.CLASSES,
        example=nets.batches(1, dtype=np.float64)[0],
        **options,
    )


def test_one_program_needs_equal_carries():
    assert with_heads(Late, engine="auto").engine == "mpmd"
    words = ("equal blocks", "block 2", "block 1")
    nets.assert_clear(ValueError, words, lambda: with_heads(Late, engine="spmd"))


class Deaf(Trail):
    """Reads no trail."""

    def __call__(self, features: Any, carry: Any) -> HeadOutput:
        heard = {name: value for name, value in carry.items() if name != "trail"}
        return super().__call__(features, heard)


@pytest.mark.slow
def test_the_trail_has_an_effect():
    """Else the tests above would compare nothing."""
    found = []
    for head in (Trail, Deaf):
        trainer = with_heads(head)
        _, metrics = trainer.step(trainer.init(), nets.batches(1, dtype=np.float64)[0])
        found.append([float(metrics[f"block_{i}/loss"]) for i in range(4)])
    assert [one == other for one, other in zip(*found, strict=True)] == [True, False, False, False]


class Wrong(Trail):
    """Writes what is not its own."""

    def __call__(self, features: Any, carry: Any) -> HeadOutput:
        return super().__call__(features, carry)._replace(carry={"x": features})


def test_a_head_cannot_replace_the_output():
    nets.assert_clear(ValueError, ("block 0", "writes x"), lambda: with_heads(Wrong))
