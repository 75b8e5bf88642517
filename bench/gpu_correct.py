"""Losses of the golden vectors in float32 on this device, and engines against one another.

    python bench/gpu_correct.py --output correct.json

Losses and their gradients are compared with the authors' in float64, with the tolerance of
tests/methods/test_objectives.py; the losses of trainings on other engines, in full float32, with
those of all stages in one call (1e-4, relative). The exit code is 1 if any is too far off.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import runner
import worker
from runner import Columns

import jdecouple as jd

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import golden_vectors as gv

STEPS, TOLERANCE = 3, 1e-4
NET = {"model": "vgg", "hidden": 8, "depth": 4, "batch": 16}
IN_ONE_PROGRAM = ("bp", "deinforeg", "scpl")
METHODS = (*IN_ONE_PROGRAM, "fdg", "ddg")
# By name, arguments of the Trainer; the first is what the others are compared with.
ENGINES: dict[str, dict[str, Any]] = {
    "one call": {},
    "a call a stage": {"fuse": False},
    "one program": {"engine": "spmd"},
}


def cases() -> Iterator[tuple[gv.Golden, dict[str, str], Callable[[jax.Array], dict]]]:
    """A golden case, its names of losses and of their gradients, and the losses of its "in.x"."""
    for golden in map(gv.load, gv.cases("deinforeg_loss")):
        labels, classes = jnp.asarray(golden["in.labels"]), int(golden["in.n_classes"])

        def information(x: jax.Array, labels=labels, classes=classes) -> dict:
            terms = jd.objectives.information_regularization(x, labels, classes)
            names = {"variance": "loss_var", "invariance": "loss_invar", "covariance": "loss_cov"}
            return {names[x]: terms[x] for x in names} | {"loss_total": sum(terms.values())}

        terms = ("var", "invar", "cov", "total")
        yield golden, {f"loss_{term}": f"x_of_{term}" for term in terms}, information
    for golden in map(gv.load, gv.cases("contrastive__b")):
        labels, temperature = jnp.asarray(golden["in.labels"]), float(golden["in.temperature"])

        def contrastive(x: jax.Array, labels=labels, temperature=temperature) -> dict:
            loss = jd.objectives.supervised_contrastive(x, labels, temperature)
            return {"loss_deinforeg_repo": loss}

        yield golden, {"loss_deinforeg_repo": "x_deinforeg_repo"}, contrastive
    for golden in map(gv.load, gv.cases("predsim_similarity__b")):
        labels, classes = jnp.asarray(golden["in.labels"]), int(golden["in.num_classes_onehot"])

        def matching(x: jax.Array, labels=labels, classes=classes) -> dict:
            return {"loss_sim_x0.99": 0.99 * jd.objectives.similarity_matching(x, labels, classes)}

        yield golden, {"loss_sim_x0.99": "x_of_x0.99"}, matching


def golden_results() -> list[dict[str, Any]]:
    """Errors of losses and gradients."""
    results = []
    for golden, names, losses in cases():
        both = jax.jit(lambda x, f=losses: (f(x), jax.jacrev(f)(x)))
        values, gradients = both(jnp.asarray(golden["in.x"], "float32"))
        actual = {f"out64.{x}": values[x] for x in names}
        actual |= {f"grad64.{names[x]}": gradients[x] for x in names}
        for key, array in actual.items():
            theirs = golden[key.replace("64.", "32.")]
            results.append(
                {
                    "case": golden.name,
                    "what": key.partition(".")[2],
                    "error": gv.relative_error(array, golden[key]),
                    "allowed": max(1e-5, 2 * gv.relative_error(theirs, golden[key])),
                }
            )
    return results


def engine_results() -> list[dict[str, Any]]:
    """Differences of losses between engines."""
    results = []
    for method in METHODS:
        # The one program has no delayed methods.
        fitting = ENGINES if method in IN_ONE_PROGRAM else list(ENGINES)[:2]
        losses = {name: train(method, ENGINES[name]) for name in fitting}
        first, *others = losses
        for name in others:
            error = float(np.max(np.abs(losses[name] / losses[first] - 1)))
            what = f"losses of {STEPS} steps, {name} against {first}"
            results.append({"case": method, "what": what, "error": error, "allowed": TOLERANCE})
    return results


def train(method: str, arguments: dict[str, Any]) -> np.ndarray:
    """Losses of some steps of two stages on one device."""
    model, shape = worker.build_model(NET["model"], NET["hidden"], NET["depth"])
    batch, *_ = worker.build_batches(NET["batch"], shape)
    trainer = jd.Trainer(
        model,
        worker.build_method(method, 8),
        jd.optim.sgd(0.01),
        num_stages=2,
        mesh=jd.make_mesh(devices=jax.devices()[:1]),
        example=batch,
        **arguments,
    )
    state, losses = trainer.init(), []
    for _ in range(STEPS + trainer.latency):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics["loss"]))
    return np.array(losses[trainer.latency :])


COLUMNS: Columns = {
    "case": lambda r: r["case"],
    "what": lambda r: r["what"],
    "relative error": lambda r: f"{r['error']:.1e}",
    "allowed": lambda r: f"{r['allowed']:.0e}",
}


def main() -> int:
    options = runner.flags(__doc__).parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    setup = runner.describe(devices=worker.devices())
    results = golden_results() + engine_results()
    runner.publish(setup, runner.columns(COLUMNS, results), options.output, results=results)
    if wrong := [x for x in results if not x["error"] <= x["allowed"]]:
        shown = ", ".join(f"{x['case']} {x['what']} ({x['error']:.1e})" for x in wrong)
        print(f"wrong: {shown}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
