"""The command launch: several processes of this machine, which start, talk and end as one run.

Most tests launch small scripts; the slow ones, and one other, train.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
from runs import arguments, assert_same_run, final_arrays, lines, server

from jdecouple.train import launch, places

LAUNCH = """
import sys
from jdecouple.train import launch
launch._GRACE = launch._PATIENCE = 1
launch.main(sys.argv[1:])
"""
SOON = 300  # seconds in which all end
TWO = {"mesh__stages": 2, "checkpoint__every": 50}


class Launched:
    """A launch of several processes of a script, or of a command."""

    def __init__(
        self,
        folder: Path,
        *command: str,
        count: int = 2,
        script: str = "",
        options: tuple[str, ...] = (),
        **variables,
    ):
        if script:
            (folder / "script.py").write_text(f"import os, signal, sys, time\n{script}")
            command = (str(folder / "script.py"),)
        self._output = [folder / f"{len([*folder.iterdir()])}.{name}" for name in ("out", "err")]
        out, err = (path.open("w") for path in self._output)
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, f"--num_processes={count}", *options, "--", *command],
            # Processes share these files: unbuffered, pieces of their lines would mix.
            env={**runs.environment(), "PYTHONUNBUFFERED": "", **variables},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )

    @property
    def text(self) -> tuple[str, str]:
        """What it has printed so far."""
        out, err = (path.read_text() for path in self._output)
        return out, err

    def when(self, condition) -> None:
        """Waits until something is so; fails if it has ended before."""
        end = time.monotonic() + SOON
        while not condition():
            assert self.process.poll() is None, self.text
            assert time.monotonic() < end, self.text
            time.sleep(0.01)

    def end(self, code: int = 0) -> tuple[str, str]:
        """Waits for its end; what it has printed."""
        assert self.process.wait(SOON) == code, self.text
        return self.text


def one(folder: Path, **values) -> Path:
    """The same run in one process."""
    run = server().run(*arguments(folder, **values), devices=2)
    assert run.returncode == 0, run.stderr
    return folder


INDEX = "index = int(os.environ['JAX_PROCESS_ID'])\n"


TELL = "print('told', number, flush=True)"


def waiting(told: str = TELL, first: str = "") -> str:
    """A script that waits, and does something when it gets a signal."""
    return f"""{INDEX}
def told(number, frame):
    {told}
signal.signal(signal.SIGTERM, told)
signal.signal(signal.SIGINT, told)
open(f"ready{{index}}", "w").close()
{first}
while True:
    time.sleep(0.01)
"""


def ready(folder: Path, count: int = 2):
    return lambda: len([*folder.glob("ready*")]) == count


class TestRuns:
    def test_each_process_has_its_place(self, tmp_path):
        script = INDEX + (
            "names = [f'JAX_{x}' for x in ('COORDINATOR_ADDRESS', 'NUM_PROCESSES')]\n"
            "own = [*map(os.environ.get, names)]\n"
            "print(*own, sorted(os.sched_getaffinity(0)), sys.stdin.read())\n"
            "print(f'warning {index}', file=sys.stderr)\n"
            "print('error: nothing of it', file=sys.stderr)\n"
        )
        out, err = Launched(tmp_path, script=script, count=3).end()
        pattern = r"(\[[12]\] )?(127\.0\.0\.1:\d+) 3 (\[.*\]) "
        found = sorted(re.fullmatch(pattern, line).groups("") for line in out.splitlines())
        tags, coordinators, cores = zip(*found, strict=True)
        assert tags == ("", "[1] ", "[2] ")
        assert len({*coordinators}) == 1
        assert [*map(json.loads, cores)] == [*map(sorted, places.parts(places.cores(), 3))]
        wanted = ["warning 0", "[1] warning 1", "[2] warning 2", "error: nothing of it"]
        assert sorted(err.splitlines()) == sorted(
            [*wanted, "[1] error: nothing of it", "[2] error: nothing of it"]
        )

    def test_one_process_is_a_run_of_its_own(self, tmp_path):
        script = "print('JAX_NUM_PROCESSES' in os.environ)"
        assert Launched(tmp_path, script=script, count=1).end() == ("False\n", "")

    @pytest.mark.slow
    def test_what_is_trained_equals_one_process(self, tmp_path):
        out, err = Launched(tmp_path, "train", *arguments(tmp_path / "two", **TWO, epochs=1)).end()
        assert "test accuracy" in out
        assert not re.search(r"\[1\]|error", out + err)
        assert_same_run(tmp_path / "two", one(tmp_path / "one", **TWO, epochs=1))

    @pytest.mark.slow
    def test_a_signal_saves_and_the_same_command_goes_on(self, tmp_path):
        folder = tmp_path / "run"
        first = Launched(tmp_path, "train", *arguments(folder, **TWO, steps=10**6))
        first.when(lambda: any(line["step"] >= 5 for line in lines(folder)))
        first.process.send_signal(signal.SIGTERM)
        out, err = first.end()
        stopped, _ = final_arrays(folder)
        assert f"stopped at step {stopped} of 1000000: the same command continues" in out
        assert "error" not in err
        values = {**TWO, "steps": stopped + 9}
        out, _ = Launched(tmp_path, "train", *arguments(folder, **values)).end()
        assert f"continuing from step {stopped}" in out
        assert_same_run(folder, one(tmp_path / "one", **values))

    @pytest.mark.slow
    @pytest.mark.parametrize("victim", [0, 1])
    def test_a_lost_process_ends_the_run(self, tmp_path, victim):
        folder = tmp_path / "run"
        run = Launched(tmp_path, "train", *arguments(folder, **TWO, steps=10**6))
        run.when(lambda: any(line["step"] >= 5 for line in lines(folder)))
        children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text()
        os.kill(int(children.split()[victim]), signal.SIGKILL)
        _, err = run.end(137)
        lost = rf"{'' if victim else '.1. '}error: process {victim} \(.*\) is lost: .*\n"
        assert re.search(rf"^{lost}error: process {victim} was ended by SIGKILL\n", err, re.M)


class TestEnds:
    def test_a_process_that_fails_ends_the_others(self, tmp_path):
        script = INDEX + "if index == 1: sys.exit(7)\ntime.sleep(1000)"
        began = time.monotonic()
        assert Launched(tmp_path, script=script, count=3).end(7) == ("", "")
        assert time.monotonic() - began < 100

    def test_one_that_does_not_end_is_killed(self, tmp_path):
        fails = "while index and not os.path.exists('ready0'): pass\nif index: sys.exit(3)"
        out, _ = Launched(tmp_path, script=waiting(first=fails)).end(3)
        assert out == "told 15\n"

    def test_the_error_of_a_process_is_told_once(self, tmp_path):
        """Process 0 of a run tells the errors of all, unless something has ended it."""
        script = INDEX + "time.sleep(0.5 * index)\nsys.exit(f'error: of {index}')"
        assert Launched(tmp_path, script=script).end(1) == ("", "error: of 0\n")
        script = INDEX + "index or time.sleep(1000)\nsys.exit(f'error: of {index}')"
        assert Launched(tmp_path, script=script).end(1) == ("", "[1] error: of 1\n")

    def test_a_process_that_is_killed(self, tmp_path):
        script = INDEX + "index or time.sleep(1000)\nos.kill(os.getpid(), signal.SIGKILL)"
        told = "error: process 1 was ended by SIGKILL\n"
        assert Launched(tmp_path, script=script).end(137) == ("", told)

    def test_one_that_is_killed_is_started_again(self, tmp_path):
        """As often as is allowed; not one that fails by itself."""
        script = INDEX + (
            "if index == 0:\n"
            "    while not os.path.exists('done'): time.sleep(0.01)\n"
            "    sys.exit()\n"
            "count = len([x for x in os.listdir() if x.startswith('start')])\n"
            "open(f'start{count}', 'w').close()\n"
            "if count == 2: open('done', 'w').close()\n"
            "if count < 2: os.kill(os.getpid(), signal.SIGKILL)\n"
            "print('there', count)\n"
        )
        out, err = Launched(tmp_path, script=script, options=("--restarts=2",)).end()
        assert out == "[1] there 2\n"
        told = "process 1 was ended by SIGKILL: it is started again"
        assert err == f"{told} (1 of at most 2)\n{told} (2 of at most 2)\n"
        (tmp_path / "done").unlink()
        for path in tmp_path.glob("start*"):
            path.unlink()
        _, err = Launched(tmp_path, script=script, options=("--restarts=1",)).end(137)
        assert err == f"{told} (1 of at most 1)\nerror: process 1 was ended by SIGKILL\n"

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_goes_to_each_once(self, tmp_path, number):
        run = Launched(tmp_path, script=waiting(f"{TELL}; time.sleep(0.3); sys.exit()"))
        run.when(ready(tmp_path))
        run.process.send_signal(number)
        out, err = run.end()
        assert sorted(out.splitlines()) == [f"[1] told {number:d}", f"told {number:d}"]
        assert err == ""

    def test_the_third_signal_ends_all_at_once(self, tmp_path):
        run = Launched(tmp_path, script=waiting())
        run.when(ready(tmp_path))
        for count in range(3):
            run.when(lambda count=count: run.text[0].count("told") == 2 * count)
            run.process.send_signal(signal.SIGINT)
        run.end(137)

    @pytest.mark.skipif(sys.platform != "linux", reason="Linux tells children of it")
    def test_where_launch_is_killed_the_processes_stop(self, tmp_path):
        script = waiting("open(f'told{index}', 'w').close(); sys.exit()")
        run = Launched(tmp_path, script=script)
        run.when(ready(tmp_path))
        run.process.kill()
        run.process.wait()
        end = time.monotonic() + SOON
        while len([*tmp_path.glob("told*")]) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "--num_processes is needed; usage: jdecouple launch --num_processes K "),
        ("-n 2", "a command is needed; usage: "),
        ("-n 2 --", "a command is needed; usage: "),
        ("--num_procs 2 train", "unrecognized arguments: --num_procs; usage: "),
        ("--num_procs 2 train", "; did you mean '--num_processes'?"),
        ("-n 0 train", "--num_processes is 0: a whole number of at least 1 is needed"),
        ("-n x train", "invalid int value: 'x'"),
        ("-n 2 --restarts=-1 train", "--restarts is -1: a whole number of at least 0 is needed"),
        ("-n 2 trian", "there is no program 'trian': train, a Python file or another is needed"),
        ("-n 2 missing.py", "there is no file 'missing.py'"),
        ("-n 2 train --process_index=1", "--process_index=1 is what launch gives each process"),
        ("-n 2 train.py --coordinator h:1", "--coordinator is what launch gives each process"),
        ("-n 2 --cores 0-9999 train", "--cores has "),
        ("-n 2 --cores 3-1 train", "--cores is '3-1': numbers and ranges are needed, such as 0-3"),
        ("-n 2 --cores , train", "--cores is ',': numbers and ranges are needed, such as 0-3,8"),
        ("-n 2 --gpus 1 train", "2 processes for 1 GPU(s): each needs its own, unless --gpus=none"),
    ],
)
def test_refused(capsys, given, said):
    with pytest.raises(SystemExit) as stopped:
        launch.main(given.split())
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert (stopped.value.code, captured.out) == (2, "")
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("--config.mesh.elastic=wait", 100),
        ("--config.mesh.elastic replay", 100),
        ("--config.mesh.elastic=None", 0),
        ("--config.mesh.elastic_buffer=3", 0),
    ],
)
def test_restarts_of_elastic_runs(words, count):
    assert launch.parse(f"-n 2 train {words}".split()).restarts == count
    assert launch.parse(f"-n 2 --restarts 7 train {words}".split()).restarts == 7


@pytest.mark.slow
def test_bad_input_of_the_run_is_told_in_one_line(tmp_path):
    values = arguments(tmp_path / "run", **TWO, method__name="bq")
    out, err = Launched(tmp_path, "train", *values).end(2)
    assert out == ""
    assert re.fullmatch(r"error: .*'bq'.*\n", err)


class TestPlaces:
    def test_cores_in_the_order_given(self):
        first, *_ = cores = places.cores()
        found = launch.placed(2, f"{first},{first}-{first}", "none")
        assert [place.cores for place in found] == [[first], [first]]
        assert [place.cores for place in launch.placed(2, "none", "none")] == [[], []]
        assert [place.cores for place in launch.placed(1, None, "none")] == [cores]

    def test_gpus(self):
        found = [place.variables for place in launch.placed(2, None, "4,5,6,7")]
        assert found == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
        assert launch.placed(2, None, "none")[0].variables == {}

    @pytest.mark.parametrize(
        ("variables", "plugin", "names"),
        [
            ({}, True, ["0", "1"]),
            ({}, False, []),
            ({"JAX_PLATFORMS": "cpu"}, True, []),
            (
                {"JAX_PLATFORMS": "cuda,cpu", "CUDA_VISIBLE_DEVICES": "3,MIG-a"},
                True,
                ["3", "MIG-a"],
            ),
            ({"CUDA_VISIBLE_DEVICES": "-1"}, True, []),
            ({"CUDA_VISIBLE_DEVICES": ""}, True, []),
        ],
    )
    def test_gpus_at_hand(self, tmp_path, monkeypatch, variables, plugin, names):
        plugins = {"jax-cuda12-plugin": "1"} if plugin else {}
        monkeypatch.setattr(places, "cuda_plugins", lambda: plugins)
        (tmp_path / "dev").mkdir()
        for name in ("nvidia0", "nvidia3", "nvidiactl"):
            (tmp_path / "dev" / name).touch()
        assert places.gpus(variables, tmp_path) == names

    def test_threads_of_a_core_stay_together(self, tmp_path, monkeypatch):
        """Numbered as usual: the first threads of all cores, then the second."""
        for core in range(4):
            folder = tmp_path / f"cpu{core}"
            folder.mkdir()
            (folder / "physical_package_id").write_text("0\n")
            (folder / "core_id").write_text(f"{core % 2}\n")
        monkeypatch.setattr(places, "_TOPOLOGY", f"{tmp_path}/cpu{{}}")
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
        assert places.parts(places.cores(), 2) == [[0, 2], [1, 3]]
