"""One process of a multi-process training run; the tests start it with a JSON argument."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import jdecouple as jd
from jdecouple.pipeline import distributed


def batches(count: int, size: int = 16) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {
            "x": rng.normal(size=(size, 20)).astype(np.float32),
            "label": rng.integers(0, 5, size).astype(np.int32),
        }
        for _ in range(count)
    ]


def train(spec: dict, mesh) -> dict:
    """Trains as `spec` says; returns parameters by name, the last metrics and an evaluation."""
    model = jd.models.mlp(5, input_size=20, hidden=24, depth=4, rngs=nnx.Rngs(0))
    data = batches(4)
    trainer = jd.Trainer(
        model,
        jd.methods.get(spec["method"], **spec.get("arguments", {})),
        jd.optim.sgd(0.05, momentum=0.9),
        mesh=mesh,
        example=data[0],
        **spec.get("trainer", {}),
    )
    state = trainer.init()
    losses = []
    for step in range(spec["steps"]):
        state, metrics = trainer.step(state, data[step % len(data)])
        losses.append(trainer.gather_metrics(metrics)["loss"])
    arrays = {
        f"{index}/{number}": np.asarray(leaf)
        for index, module in enumerate(trainer.modules(state))
        if module is not None
        for number, leaf in enumerate(jax.tree.leaves(nnx.state(module)))
    }
    return {
        "arrays": arrays,
        "losses": losses,
        "evaluation": trainer.evaluate(state, data),
        "metrics": trainer.gather_metrics(metrics),
    }


def main() -> None:
    spec = json.loads(sys.argv[1])
    distributed.initialize(f"127.0.0.1:{spec['port']}", spec["num_processes"], spec["process_id"])
    result = train(spec, jd.make_mesh(stages=spec["stages"], data=spec.get("data", 1)))
    out = Path(spec["out"])
    np.savez(out / f"arrays_{spec['process_id']}.npz", **result.pop("arrays"))
    (out / f"result_{spec['process_id']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
