"""One process of a multi-process training, which test_processes.py starts with a JSON argument.

It trains one configuration after the other and leaves what it found in `out`.
"""

import json
import os
import sys
import time
from pathlib import Path

SPEC = json.loads(sys.argv[1])
if SPEC["core"] is not None:
    os.sched_setaffinity(0, {SPEC["core"]})

import jax.numpy as jnp  # noqa: E402
import nets  # noqa: E402
import numpy as np  # noqa: E402
import token_nets  # noqa: E402
import unets  # noqa: E402

import jdecouple as jd  # noqa: E402
from jdecouple.pipeline import distributed  # noqa: E402
from jdecouple.pipeline.step_metrics import StepMetrics  # noqa: E402

MODELS = {
    "two_blocks": lambda: nets.mlp(depth=2, batch_norm=True),
    "four_blocks": lambda: nets.mlp(depth=4, batch_norm=True),
    "reversible": lambda: nets.mlp(depth=4, batch_norm=True, reversible=True),
    "slow_end": lambda: nets.slow_end(milliseconds=60),
    "tied_gpt": lambda: token_nets.model(tied=True, depth=3),
    "unet": lambda: unets.model(jnp.float32),
}
DATA = {
    "tied_gpt": lambda: token_nets.batches(size=16),
    "unet": lambda: unets.batches(4, 16, np.float32),
}
METHODS = {"tied_gpt": token_nets.method, "unet": unets.method}


def train(run: dict) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays of this process's blocks; metrics of every step, evaluation, times."""
    data = DATA.get(run["model"], nets.batches)()
    trainer = jd.Trainer(
        MODELS[run["model"]](),
        METHODS.get(run["model"], nets.method)(run["method"]),
        jd.optim.sgd(0.05, momentum=0.9),
        mesh=jd.make_mesh(run.get("stages", 1), run.get("data", 1)),
        example=data[0],
        **run.get("trainer", {}),
    )
    state, found = trainer.init(), []
    for step in range(run["steps"]):
        if step == 1:
            trainer.wait(state)  # all is compiled; from here on the clock runs
            start = time.perf_counter()
        if step == run.get("finish"):
            state = trainer.finish(state)
        count = run.get("chunk", 1)
        if step % count == 0:
            batches = [data[(step + each) % len(data)] for each in range(count)]
            if count == 1:
                state, metrics = trainer.step(state, batches[0])
            else:
                state, metrics = trainer.steps(state, batches)
            found.append(metrics)
    dispatched = time.perf_counter() - start
    trainer.wait(state)
    rows = found
    if count > 1:
        rows = [StepMetrics([row]) for metrics in found for row in nets.rows(metrics)]
    result = {
        "dispatch_seconds": dispatched,
        "seconds": time.perf_counter() - start,
        "metrics": [trainer.gather_metrics(metrics) for metrics in rows],
        "own": sorted(found[-1]),
        "evaluation": trainer.evaluate(state, [*data, {k: v[:5] for k, v in data[0].items()}]),
        "logits": trainer.predict(state, [{"x": batch["x"][:6]} for batch in data]).tolist(),
        "blocks": [module is not None for module in trainer.modules(state)],
    }
    return nets.to_arrays(trainer, state), result


def main() -> None:
    if SPEC["num_processes"] > 1:
        distributed.initialize(
            f"127.0.0.1:{SPEC['port']}",
            SPEC["num_processes"],
            SPEC["process_id"],
            transfer_port=SPEC["transfer_port"],
        )
    out = Path(SPEC["out"])
    for name, run in SPEC["runs"].items():
        if SPEC["num_processes"] == 1:
            run = {**run, "data": 1, "trainer": {**run.get("trainer", {}), "fuse": False}}
        arrays, result = train(run)
        stem = f"{name}_{SPEC['process_id']}"
        np.savez(out / f"{stem}.npz", **arrays)
        (out / f"{stem}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
