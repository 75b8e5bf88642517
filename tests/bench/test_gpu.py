"""The kit for a GPU, dry-run on the CPU."""

import importlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
LACKING = ("ml_collections", "grain", "tensorflow_datasets")  # where only wheels are carried


@pytest.fixture
def kit(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu")


@pytest.fixture
def archive(tmp_path):
    """A small CIFAR-10 as its authors publish it."""
    folder, rng = tmp_path / "data" / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        images = rng.integers(0, 256, (64, 3072), dtype=np.uint8)
        values = {b"data": images, b"labels": [i % 10 for i in range(64)]}
        (folder / name).write_bytes(pickle.dumps(values))
    return folder.parent


@pytest.mark.slow
def test_dry_run(tmp_path, archive):
    """All steps end well, without the packages that a GPU's machine may lack."""
    for name in LACKING:
        (tmp_path / "lacking" / name).mkdir(parents=True)
        (tmp_path / "lacking" / name / "__init__.py").write_text(f"raise ImportError('no {name}')")
    output = tmp_path / "out"
    variables = {"TINY": "1", "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path / "lacking")}
    command = [str(BENCH / "gpu.sh"), str(output), str(archive)]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((output / "gpu.json").read_text())
    text = (output / "gpu.md").read_text()
    states = {step["name"]: step["state"] for step in written["steps"]}
    torch = "missing" if importlib.util.find_spec("torch") is None else "done"
    assert states == {
        **dict.fromkeys(("correct", "memory", "dispatch", "training"), "done"),
        **dict.fromkeys(("peers-4-float32", "peers-4-bfloat16"), torch),
    }
    for name, state in states.items():
        assert f"- {name}: {state}" in text
        assert (f"\n## {name}\n" in text) == (state == "done")
    results = {name: value["results"] for name, value in written["results"].items()}
    assert all(result["error"] <= result["allowed"] for result in results["correct"])
    assert {result["method"] for result in results["memory"]} == {"bp", "greedy_exit"}
    assert [result["method"] for result in results["training"]] == ["deinforeg", "bp"]
    assert "not measured" in text  # the memory of a CPU


@pytest.mark.parametrize(
    ("code", "state", "why"),
    [
        ("print('fine')", "done", ""),
        ("print('a'); raise SystemExit('that was wrong')", "failed", "that was wrong"),
        ("print('no data'); raise SystemExit(77)", "missing", "no data"),
        ("raise SystemExit(3)", "failed", "exit code 3"),
        ("import time; time.sleep(60)", "late", "stopped after 1 s"),
    ],
)
def test_steps_end(kit, monkeypatch, tmp_path, code, state, why):
    monkeypatch.setattr(kit, "LEAST", 0)
    seconds = 1 if state == "late" else 60
    script = tmp_path / "script.py"
    script.write_text(code)
    start = time.monotonic()
    outcome = kit.run(kit.Step("step", seconds, [str(script)]), tmp_path, start + 100, slow=1.0)
    assert (outcome.state, outcome.why) == (state, why)
    assert time.monotonic() - start < 50


def test_steps_that_are_not_begun(kit, tmp_path):
    late = kit.run(kit.Step("step", 60, ["none.py"]), tmp_path, time.monotonic() + 1, slow=1.0)
    assert (late.state, late.why) == ("late", "not begun: no time was left")
    (tmp_path / "step.json").write_text("{}")  # of an earlier run
    lacking = kit.Step("step", 60, ["none.py"], ["no_such_module"])
    outcome = kit.run(lacking, tmp_path, time.monotonic() + 100, slow=1.0)
    assert (outcome.state, outcome.why) == ("missing", "no_such_module cannot be imported")
    kit.publish([late, outcome], tmp_path)
    assert json.loads((tmp_path / "gpu.json").read_text())["results"] == {}
    assert "- step: late (0 s): not begun: no time was left\n" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize("tiny", [True, False])
def test_commands_of_steps(kit, monkeypatch, tiny):
    """Peers and rows are those that the scripts know."""
    steps = kit.steps("data", tiny)
    assert all((BENCH / step.words[0]).is_file() for step in steps)
    rows = importlib.import_module("rows")
    for step in steps:
        if step.words[0] == "throughput.py":
            for text in step.words[step.words.index("--rows") + 1 :]:
                assert str(rows.parse(text)) == text
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    peers = importlib.import_module("peers")
    for step in steps:
        if step.words[0] == "peers.py":
            monkeypatch.setattr(sys, "argv", list(step.words))
            options = peers.parse()
            assert f"{options.batch}-{options.precision}" in step.name
            assert options.device == ("cpu" if tiny else "cuda")


@pytest.mark.parametrize("words", [[], ["no/such/folder"]])
def test_training_without_data(kit, monkeypatch, capsys, words):
    training = importlib.import_module("gpu_train")
    monkeypatch.setattr(sys, "argv", ["gpu_train.py", *words])
    assert training.main() == kit.MISSING
    assert capsys.readouterr().err == f"no data: {(words or ['no folder was given'])[0]}\n"
