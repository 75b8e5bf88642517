"""Runs a script of the benchmarks as a user does."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def bench(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("XLA_FLAGS", None)
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **variables}
    command = [sys.executable, str(REPOSITORY / "bench" / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
