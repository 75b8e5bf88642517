"""Stages in processes that outlive one another: undisturbed, killed, stopped, refused.

One run that nothing disturbs and one whose middle stage is killed are fast; the others are slow.
"""

import functools
import random
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path

import chex
import numpy as np
import pytest
import runs
from runs import arguments, final_arrays, lines, server, without_timing

from jdecouple.checkpoint import Checkpointer
from jdecouple.train.elastic import train_stage
from jdecouple.train.elastic.folder import Place, StageFolder
from jdecouple.train.elastic.inbox import Inbox
from jdecouple.train.elastic.outbox import Outbox
from jdecouple.train.errors import ConfigError
from jdecouple.train.hosts import ProcessSpec
from jdecouple.train.hosts.handshake import introduce
from jdecouple.train.hosts.link import Link, Message
from jdecouple.train.loop import train_and_evaluate

TOTAL, EVERY, BUFFER = 120, 20, 8
RUN = {"model__depth": 3, "mesh__stages": 3, "steps": TOTAL, "eval_every": TOTAL}
RUN |= {"checkpoint__every": EVERY}


class Elastic:
    """Processes of one run, a stage each, that may be killed and started again."""

    def __init__(self, folder: Path, on_loss: str = "wait", **values):
        self.folder = folder
        elastic = {"mesh__elastic": on_loss, "mesh__elastic_buffer": BUFFER}
        given = arguments(folder, **{**RUN, **elastic, **values})
        given += [f"--coordinator=127.0.0.1:{runs.free_port()}", "--num_processes=3"]
        self._commands = [[*given, f"--process_index={k}"] for k in range(3)]
        self.processes = [*server().start_together(self._commands)]

    def lines(self, index: int) -> list[dict]:
        """Metrics of a stage so far."""
        return lines(StageFolder(self.folder, index).path)

    def reach(self, index: int, step: int) -> None:
        """Waits until a stage has come to a step."""
        runs.wait_for(
            lambda: any(line["step"] >= step for line in self.lines(index)), self.processes[index]
        )

    def kill(self, index: int) -> None:
        self.processes[index].signal(signal.SIGKILL)
        assert self.processes[index].wait().returncode == -signal.SIGKILL

    def start(self, index: int) -> None:
        self.processes[index] = server().start_beside(self._commands[index])

    def end(self, code: int = 0) -> list[runs.Run]:
        codes = [process.wait().returncode for process in self.processes]
        assert codes == [code] * 3, [run.stderr[-2000:] for run in self.processes]
        return self.processes


@functools.cache
def _kept() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@functools.cache
def ordinary() -> Path:
    """The same run in one process, its stages on devices of their own."""
    folder = Path(_kept().name) / "run"
    run = server().run(*arguments(folder, **RUN), devices=3)
    assert run.returncode == 0, run.stderr
    return folder


def of_block(arrays: dict, block: int) -> dict:
    return {name: x for name, x in arrays.items() if name.startswith(f"block_{block}/")}


def counts(folder: Path) -> list[dict]:
    """What the checkpoint of the whole run says of its stages."""
    checkpoints = Checkpointer(folder / "checkpoints", read_only=True)
    return checkpoints.extras()[checkpoints.latest_step]["stages"]


def assert_equal_run(folder: Path) -> None:
    """Equal to the ordinary run to the last bit: weights, optimiser, metrics, accuracy."""
    chex.assert_trees_all_equal(final_arrays(folder), final_arrays(ordinary()))
    ours, theirs = (without_timing(lines(each)) for each in (folder, ordinary()))
    assert len(ours) == len(theirs) == TOTAL + 2
    for own, other in zip(ours, theirs, strict=True):
        assert own.items() >= other.items()
    assert all(each["missed"] == [] and each["trained"] == TOTAL for each in counts(folder))


@pytest.mark.slow
def test_undisturbed_equals_the_ordinary_run(tmp_path):
    first, *others = Elastic(tmp_path / "run").end()
    assert_equal_run(tmp_path / "run")
    assert "test accuracy" in first.stdout
    assert "stage 2: started 1 time(s), trained on 120 batches" in first.stdout
    assert [run.stdout + run.stderr for run in others] == ["", ""]


@pytest.mark.slow
def test_lost_stage_stops_only_itself(tmp_path):
    """The first goes on to its end; the middle one rejoins with what is held for it."""
    run = Elastic(tmp_path / "run")
    middle = StageFolder(run.folder, 1)
    runs.wait_for(lambda: middle.last_step >= EVERY, run.processes[1])
    run.kill(1)
    begun = middle.last_step
    run.reach(0, TOTAL)
    run.start(1)
    first, again, last = run.end()
    _, arrays = final_arrays(run.folder)
    _, wanted = final_arrays(ordinary())
    chex.assert_trees_all_equal(of_block(arrays, 0), of_block(wanted, 0))
    assert of_block(arrays, 1).keys() == of_block(wanted, 1).keys()
    zero, one, two = counts(run.folder)
    assert (zero["missed"], zero["starts"], one["starts"], two["starts"]) == ([], 1, 2, 1)
    assert one["missed"] == [[begun + 1, TOTAL - BUFFER]]  # the buffer held all that came then
    ((since, until),) = two["missed"]
    assert begun <= since - 1 < until == TOTAL - BUFFER
    for index, of in enumerate((one, two), 1):
        (gap,) = of["missed"]
        told = [line for line in lines(run.folder) if f"stage_{index}/missed" in line]
        (line,) = told
        assert line[f"stage_{index}/missed_from"] == gap[0]
        assert line["step"] == gap[1]
        assert line[f"stage_{index}/missed"] == gap[1] - gap[0] + 1 == TOTAL - of["trained"]
        assert f"missed {gap[1] - gap[0] + 1} (steps {gap[0]}-{gap[1]})" in first.stdout
    assert "stage 0: the stage above is lost" in first.stdout
    assert f"stage 1: misses the batches of steps {begun + 1} to {TOTAL - BUFFER}" in again.stdout
    assert "stage 2: the stage below is lost: waits" in last.stdout
    (tested,) = (line for line in lines(run.folder) if line["split"] == "test")
    assert {"exit_0/accuracy", "exit_1/accuracy", "exit_2/accuracy"} <= tested.keys()


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method__name": "bp"}, ("method 'bp' is not local",)),
        ({"method__name": "fdg"}, ("method 'fdg' is not local",)),
        ({"method__name": "man"}, ("method 'man' follows the weights of the stage above",)),
        ({"schedule": "interleaved"}, ("config.schedule is interleaved", "leave it at auto")),
        ({"mesh__stages": 2}, ("config.mesh.stages is 2", "3 processes")),
        ({"chunk": 2}, ("config.mesh.elastic is 'wait'", "config.chunk is 2", "leave it at 1")),
        ({"mesh__elastic": "waits"}, ("config.mesh.elastic is 'waits'", "wait, replay")),
    ],
)
def test_refusals(tmp_path, values, words):
    config = runs.tiny(**{**RUN, "mesh__elastic": "wait", **values})
    if config.method.name != "deinforeg":
        config.method.projector = None
    with pytest.raises(ConfigError) as caught:
        train_stage(config, tmp_path, ProcessSpec("127.0.0.1:1", 3, 1))
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_one_process_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs a process for every stage"):
        train_and_evaluate(runs.tiny(mesh__elastic="wait"), tmp_path)


# --- Messages ------------------------------------------------------------------------------------

TOKEN, HELLO = b"0123456789abcdef", {"stage": 1}


class Pair:
    """Both ends of the way between two stages, in one process."""

    def __init__(self, size: int, first: int = 0):
        self.told: list[str] = []
        self.first = first
        self.outbox = Outbox(size, first, "127.0.0.1", TOKEN, HELLO, self.told.append)

    def come(self, first: int, hello=HELLO, token=TOKEN, config=None) -> Inbox:
        place = Place("127.0.0.1", self.outbox.port, {"seed": 0}, 1)
        return Inbox(first, lambda: place, token, hello, config or {"seed": 0})

    def put(self, *numbers: int, hurries=lambda: False) -> None:
        for number in numbers:
            self.outbox.put(number, [np.full(3, number, np.float32)], hurries)


def numbers(inbox: Inbox, count: int) -> list[int]:
    found = [inbox.get(60) for _ in range(count)]
    assert all((each.arrays[0] == each.number).all() for each in found)
    return [each.number for each in found]


def test_a_full_buffer_waits_for_the_stage_above():
    pair = Pair(2)
    pair.put(0, 1)
    waits = threading.Thread(target=pair.put, args=range(2, 40), daemon=True)
    waits.start()  # although the stage above has not come yet
    inbox = pair.come(0)
    assert numbers(inbox, 40) == [*range(40)]
    waits.join(60)
    pair.outbox.end(40)
    assert inbox.get(60) == (40, None)


def test_without_the_stage_above_the_oldest_make_room():
    pair = Pair(3)
    connect = socket.create_connection(("127.0.0.1", pair.outbox.port))
    introduce(connect, TOKEN, HELLO)
    link = Link(connect)
    pair.put(0)
    link.send(Message("want", 0))
    assert link.receive().value == 0
    connect.close()
    pair.put(*range(1, 10))  # waits until the loss is noticed, and no longer
    assert numbers(pair.come(2), 3) == [7, 8, 9]
    assert any("is lost" in line for line in pair.told)
    assert any("is back, at step 2" in line for line in pair.told)


def test_what_is_starved_says_so():
    pair = Pair(2)
    inbox = pair.come(0)
    pair.put(0)
    assert numbers(inbox, 1) == [0]
    pair.outbox.starve()
    runs_out = time.monotonic() + 60
    while not inbox.is_lost:
        assert time.monotonic() < runs_out
        time.sleep(0.01)
    pair.put(1)
    assert numbers(inbox, 1) == [1]
    assert not inbox.is_lost


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"token": b"another token 123"}, "it has another token"),
        ({"hello": {"stage": 2}}, "refuses this one: it came with stage = 2: 1 is expected"),
        ({"config": {"seed": 3}}, "config.seed is 3, of the stage below 0"),
    ],
)
def test_strangers_are_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        Pair(2).come(0, **given).get(60)


# --- More runs -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_replay(tmp_path):
    """The stage above trains once more on the messages that it holds, and no more often."""
    run = Elastic(tmp_path / "run", on_loss="replay")
    run.reach(2, BUFFER + 1)
    run.kill(1)
    runs.wait_for(lambda: "replays" in run.processes[2].stdout, run.processes[2])
    run.reach(0, TOTAL)
    run.start(1)
    run.end()
    _, _, last = counts(run.folder)
    assert 1 <= last["replayed"] <= BUFFER
    assert last["trained"] + sum(b - a + 1 for a, b in last["missed"]) == TOTAL
    assert lines(run.folder)[-3]["stage_2/replayed"] == last["replayed"]


@pytest.mark.slow
def test_stopped_run_goes_on(tmp_path):
    """A signal to the first stops all after one batch; the same commands continue bit for bit."""
    run = Elastic(tmp_path / "run")
    run.reach(2, 5)
    run.processes[0].signal(signal.SIGTERM)
    first, *_ = run.end()
    steps = {StageFolder(run.folder, index).last_step for index in range(3)}
    (stopped,) = steps
    assert stopped < TOTAL
    assert f"stopped at step {stopped} of {TOTAL}" in first.stdout
    assert final_arrays(run.folder)[0] == stopped
    for index in range(3):
        run.start(index)
    run.end()
    assert_equal_run(run.folder)


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    """Whatever is killed whenever: the first stage's weights are those of the undisturbed run."""
    draw = random.Random(0)
    run = Elastic(tmp_path / "run")
    for _ in range(20):
        index = draw.choice((0, 1, 1, 2))
        if run.processes[index].ended:
            break
        time.sleep(draw.uniform(0, 3))
        run.processes[index].signal(signal.SIGKILL)
        run.processes[index].wait()
        run.start(index)
    run.end()
    _, arrays = final_arrays(run.folder)
    chex.assert_trees_all_equal(of_block(arrays, 0), of_block(final_arrays(ordinary())[1], 0))
    for of in counts(run.folder):
        assert of["trained"] + sum(b - a + 1 for a, b in of["missed"]) == TOTAL


@pytest.mark.slow
def test_nothing_is_missed_where_the_buffer_holds_it(tmp_path):
    """Then the whole run is the undisturbed one."""
    run = Elastic(tmp_path / "run", mesh__elastic_buffer=TOTAL)
    for step in (EVERY + 1, 2 * EVERY + 1):
        run.reach(2, step)
        run.kill(2)
        run.start(2)
    run.end()
    assert_equal_run(run.folder)
