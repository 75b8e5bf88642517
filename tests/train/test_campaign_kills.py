"""A campaign of kills and of full disks: whatever happens, the run ends as if nothing had.

Each test prints its figures (`pytest -m slow -s`), which docs/reliability.md tells.
"""

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import runs
from runs import BP, arguments, assert_same_run, delayed, finished, server
from test_hosts import end, start, whole

from jdecouple.checkpoint import Checkpointer

pytestmark = pytest.mark.slow

RUNS = {"deinforeg": {}, "bp": BP, "fdg": delayed("fdg"), "fr": delayed("fr")}
KILLS, KILLS_OF_SEVERAL, FULL_DISKS = 100, 20, 50


def finish_again_and_again(
    folder: Path,
    kills: int,
    begin: Callable[[Path], list[runs.Run]],
    reference: Path,
    seed: int,
) -> int:
    """Runs that are killed at random moments until so many are; each is equal to a quiet one.

    Returns:
        How many runs came to their end, and were compared.
    """
    chance = random.Random(seed)
    ends, killed, workdir = 0, 0, folder / "0"
    began = time.monotonic()
    end(begin(folder / "timed"))
    length = time.monotonic() - began
    while killed < kills or workdir.exists():
        processes = begin(workdir)
        victim = chance.choice(processes)
        until = time.monotonic() + chance.uniform(0, 1.1 * length)
        while killed < kills and time.monotonic() < until and not victim.ended:
            time.sleep(0.001)
        if killed < kills and not victim.ended:
            victim.signal(signal.SIGKILL)
            killed += 1
        codes = [process.wait().returncode for process in processes]
        if any(codes):
            assert victim.returncode == -signal.SIGKILL, [p.stderr for p in processes]
            for process in processes:
                assert "Traceback" not in process.stderr
        else:
            assert_same_run(workdir, reference)
            ends += 1
            workdir = folder / str(ends)
    return ends


@pytest.mark.parametrize("name", RUNS)
def test_kills_of_one_process(tmp_path, name):
    kills = KILLS // len(RUNS)
    values = RUNS[name]
    ends = finish_again_and_again(
        tmp_path,
        kills,
        lambda folder: [server().start(*arguments(folder, **values))],
        finished(**values),
        seed=0,
    )
    print(f"{name}: {kills} kills of one process, {ends} runs equal to the last bit")


@pytest.mark.parametrize(
    ("count", "apart"),
    [(2, False), (2, True), (3, False), (4, False)],
    ids=["two", "two-apart", "three", "four"],
)
def test_kills_of_one_of_several_processes(tmp_path, count, apart):
    values = {"num_stages": count, "mesh__stages": count, "model__depth": count}
    values = {**delayed("fdg"), **values}
    ends = finish_again_and_again(
        tmp_path,
        KILLS_OF_SEVERAL,
        lambda folder: start(folder, count, apart=apart, **values),
        whole(count, **values),
        seed=1,
    )
    how = "that do not see one folder" if apart else "that save by stage"
    kills = f"{KILLS_OF_SEVERAL} kills of one of {count} processes {how}"
    print(f"{kills}, {ends} runs equal to the last bit")


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[int | None], None]]:
    """Sets the free bytes of the disk below `tmp_path / "disk"`, None for plenty.

    A small tmpfs where this process may mount one. Else the size of each file is bounded, which
    ends a write at the same places.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and not subprocess.run(command, capture_output=True).returncode
    filler = folder / "filler"

    def leave(free: int | None) -> None:
        if not mounted:
            server().file_limit = free
            return
        filler.unlink(missing_ok=True)
        if free is not None:
            spare = shutil.disk_usage(folder).free - free
            with filler.open("wb") as file:
                while spare > 0:
                    spare -= file.write(bytes(min(spare, 1 << 20)))

    yield leave
    server().file_limit = None
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disks(tmp_path, disk):
    """Told in one line; what was saved before stays; with room again the run comes to its end."""
    workdir, reference = tmp_path / "disk" / "run", finished(**BP)
    size = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file())
    chance, refused = random.Random(2), 0
    for point in range(FULL_DISKS):
        shutil.rmtree(workdir, ignore_errors=True)
        disk(int(chance.uniform(0, 4) * size))
        run = server().run(*arguments(workdir, **BP))
        told = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in run.stderr, run.stderr
        assert run.returncode in (0, 1, 2), (run.returncode, run.stderr)
        assert len(told) == bool(run.returncode), run.stderr
        refused += bool(told)
        saved = Checkpointer(workdir / "checkpoints", read_only=True).steps()
        disk(None)
        again = server().run(*arguments(workdir, **BP))
        assert again.returncode == 0, (point, again.stderr)
        if run.returncode and saved:
            assert f"continuing from step {saved[-1]} " in again.stdout
        assert_same_run(workdir, reference)
    print(f"{FULL_DISKS} sizes of a disk: {refused} too small, all told in a line; all went on")
    assert FULL_DISKS // 4 < refused < FULL_DISKS
