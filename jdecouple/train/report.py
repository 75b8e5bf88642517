"""What a run leaves behind for people: config.json and the closing table."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdecouple.train.run import Run
from jdecouple.trainer import Trainer

_PACKAGES = ("jdecouple", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def write_config(folder: Path, run: Run) -> None:
    """Writes `config.json`: the configuration, the versions, the devices, the partition."""
    trainer = run.trainer
    content = {
        "config": run.config.to_dict(),
        "total_steps": run.total_steps,
        "engine": trainer.engine,
        "boundaries": list(trainer.boundaries),
        "parameters": parameters(trainer),
        "devices": [
            [str(device) for device in placement.devices] for placement in trainer.placements
        ],
        "device_kind": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version(), **_versions()},
    }
    temporary = folder / ".config.json.tmp"
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, folder / "config.json")


def parameters(trainer: Trainer) -> int:
    """Numbers that a trainer's blocks, heads and classifier learn."""
    leaves = trainer.to_arrays(trainer.abstract())
    return sum(int(np.prod(leaf.shape)) for name, leaf in leaves.items() if "/params/" in name)


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Test results of a finished run, chosen three ways.

    Args:
        lines: all lines of `metrics.jsonl`.

    Returns:
        "test" at the last step; "test_at_best_validation" at the step with the highest
        validation accuracy (the first of equals), if there was a validation split;
        "best_test" at the step with the highest test accuracy of any exit, as the papers
        report: not a result, since the test set chose it.
    """
    tests = {line["step"]: line for line in lines if line["split"] == "test"}
    validations = [line for line in lines if line["split"] == "validation"]
    found = {"test": tests[max(tests)]}
    if validations:
        best = max(validations, key=lambda line: line["accuracy"])
        found["test_at_best_validation"] = tests[best["step"]]
    found["best_test"] = max(tests.values(), key=lambda line: max(exits(line).values()))
    return found


def show(result: Mapping[str, Any], folder: Path, best_step: int | None) -> None:
    """Prints the closing table."""
    rows = {
        "test": "last step",
        "test_at_best_validation": "best validation",
        "best_test": "best exit at its best test step (as the papers report; not a result)",
    }
    print("\ntest accuracy")
    for key, label in rows.items():
        if key not in result:
            continue
        line = result[key]
        found = exits(line)
        value = max(found.values()) if key == "best_test" else line["accuracy"]
        listed = ", ".join(f"{name} {each:.2%}" for name, each in found.items())
        print(f"  {label}: {value:.2%} at step {line['step']} ({listed})")
    print(f"curves:      {folder / 'curves.png'}")
    best = "" if best_step is None else f" (best by validation: step {best_step})"
    print(f"checkpoints: {folder / 'checkpoints'}{best}")


def exits(line: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy by exit, such as "exit_0", of a line of `metrics.jsonl`."""
    return {
        name.removesuffix("/accuracy"): value
        for name, value in line.items()
        if name.startswith("exit_") and name.endswith("/accuracy")
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
