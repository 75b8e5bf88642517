"""Measured timelines: from a trace of JAX's profiler to the calls of a schedule."""

import collections
import contextlib
import gzip
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
from absl import logging

from jdecouple._errors import first_line
from jdecouple._files import bring, is_stored, remove_folder
from jdecouple.inference import pictures
from jdecouple.schedules import Kind, Span, draw
from jdecouple.trainer import State, Trainer

WARM_UP_STEPS = 10
_NAME = re.compile(r"jit_stage(\d+)_([FBWS]+)(?:\(.*\))?")
_MODULES = "XLA Modules"  # the line of a GPU's trace that has an event a call

Key = tuple[int, tuple[Kind, ...]]
Times = tuple[float, float]


class Profile:
    """Traces some steps of a run, and draws what the stages did in them.

    The workdir gets `profile/`, which TensorBoard and XProf read, and `timeline.png`. The first ten
    steps after `start`, where the run goes on, are not traced, because they compile; nor is any
    where `steps` is None. The stages of the trainer must be apart (`fuse=False`). What fails here
    is told and ends no training.
    """

    def __init__(self, trainer: Trainer, workdir: Path, steps: int | None, start: int, title: str):
        self._trainer, self._workdir, self._title = trainer, workdir, title
        self._first = start + WARM_UP_STEPS + 1
        self._last = self._first + steps - 1 if steps else 0
        self._tracing = False

    def before(self, step: int, state: State) -> None:
        """Begins the trace if `step`, which counts from 1 and begins with `state`, is the first."""
        if self._last and step == self._first:
            self._trainer.wait(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            try:
                self._traced = self._workdir / "profile"
                if is_stored(self._workdir):  # JAX writes on this machine alone
                    self._traced = Path(tempfile.mkdtemp())
                self._traced.mkdir(exist_ok=True)
                jax.profiler.start_trace(self._traced, profiler_options=options)
            except Exception as error:
                logging.warning("no timeline: %s", first_line(error))
            else:
                self._tracing = True

    def after(self, step: int, state: State) -> str | None:
        """Ends the trace if `step` was the last; returns what to tell the user then."""
        if not self._tracing or step < self._last:
            return None
        self._trainer.wait(state)
        count = step - self._first + 1
        title = f"{self._title}, steps {self._first} to {step}".lstrip(", ")
        path = self._workdir / "timeline.png"
        try:
            self._stop()
            measured = spans(self._traced, self._trainer, count, self._first - 1)
            pictures.save(draw(measured, title=title), path)
            if is_stored(self._workdir):
                bring(self._traced, self._workdir / "profile")
                remove_folder(self._traced)
        except Exception as error:
            return f"no timeline: {first_line(error)}"
        return f"timeline of steps {self._first} to {step}: {path}"

    def close(self) -> None:
        """Ends a trace that has begun."""
        with contextlib.suppress(Exception):  # nobody will read it
            self._stop()

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()


def spans(
    folder: str | os.PathLike[str], trainer: Trainer, batches: int, first_batch: int = 0
) -> list[Span]:
    """Reads from a trace when each call of some steps ran.

    On the CPU a call lasts from the start of its first operation to the end of its last, on a GPU
    as its line "XLA Modules" says; on several replicas from the first's start to the last's end.

    Args:
        folder: where `jax.profiler.start_trace` wrote; of several traces the newest is read.
        trainer: what was traced, from `trainer.wait` before the first step to after the last.
        batches: how many steps were traced.
        first_batch: number of the first of them, from 0.

    Returns:
        The calls in order of time, which counts from the first.

    Raises:
        ValueError: no trace, or one with another number of calls.
    """
    ran = _calls(_events(Path(folder)))
    turns = collections.defaultdict(list)
    for call in trainer.calls:
        turns[call.stage, call.kinds].append(call.microbatches)
    result = []
    for (stage, kinds), microbatches in turns.items():
        times = ran.get((stage, kinds), [])
        name = f"stage {stage}: {''.join(kind.value for kind in kinds)}"
        if len(times) != batches * len(microbatches):
            raise ValueError(
                f"the trace in {os.fspath(folder)!r} has {len(times)} calls of {name}, "
                f"{batches} step(s) make {batches * len(microbatches)}"
            )
        group = trainer.schedule.device_group(stage)
        for number, when in enumerate(times):
            batch, turn = divmod(number, len(microbatches))
            result.append(Span(stage, group, kinds, microbatches[turn], first_batch + batch, *when))
    result.sort(key=lambda span: (span.start, span.stage))
    zero = result[0].start
    return [span._replace(start=span.start - zero, end=span.end - zero) for span in result]


def _events(folder: Path) -> list[dict[str, Any]]:
    """All events of the newest trace; times are in microseconds."""
    paths = sorted(folder.glob("**/*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise ValueError(f"no *.trace.json.gz in {str(folder)!r}")
    with gzip.open(paths[-1]) as file:
        return json.load(file)["traceEvents"]


def _calls(events: list[dict[str, Any]]) -> dict[Key, list[Times]]:
    """When each call ran, in order of time, by stage and kinds; in seconds."""
    lines = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event.get("name") == "thread_name"
    }
    modules = _MODULES in lines.values()
    complete = [event for event in events if event.get("ph") == "X"]
    turns: collections.Counter = collections.Counter()
    runs: dict[tuple[str, Any], Times] = {}  # of a call by what tells its runs apart
    for event in sorted(complete, key=lambda event: event["ts"]):
        if modules:
            line = event["pid"], event["tid"]
            name = event["name"] if lines.get(line) == _MODULES else ""
            # Every device has the runs of a call in the same order.
            turns[name, line] += 1
            run = turns[name, line]
        else:
            args = event.get("args", {})
            name, run = args.get("hlo_module", ""), args.get("run_id")
        if _NAME.fullmatch(name):
            end = event["ts"] + event.get("dur", 0)
            start, before = runs.get((name, run), (event["ts"], end))
            runs[name, run] = start, max(before, end)
    calls: dict[Key, list[Times]] = collections.defaultdict(list)
    for (name, _), (start, end) in runs.items():
        stage, kinds = _NAME.fullmatch(name).groups()  # type: ignore[union-attr]
        calls[int(stage), tuple(map(Kind, kinds))].append((start / 1e6, end / 1e6))
    return {key: sorted(times) for key, times in calls.items()}
