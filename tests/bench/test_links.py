"""The link between two namespaces delays, limits and goes away; the relay loses no packet."""

import importlib
import importlib.util
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
SECONDS = 600  # after which what does not happen is a failure
# Answers every packet of the other end; then, how long some take, and a longer message.
ECHO = """
import socket
server = socket.create_server(("10.0.0.2", 5000))
print("listening", flush=True)
peer, _ = server.accept()
while data := peer.recv(1 << 20):
    peer.sendall(data[-1:])
"""
CLIENT = """
import socket, time
peer = socket.create_connection(("10.0.0.2", 5000))
for size in (1, 1, 1, 100_000):
    start = time.perf_counter()
    peer.sendall(b"x" * (size - 1) + b"y")
    while peer.recv(1 << 20)[-1:] != b"y":
        pass
    print(time.perf_counter() - start)
"""
HOLDER = """
import signal, time
from relay import SlowLink
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
link = SlowLink()
print(*link.namespaces, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def link() -> Any:
    """The module."""
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("relay")
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture
def needed(link):
    if problem := link.missing():
        pytest.skip(f"a slow link needs {problem}")


def gone(namespaces: list[str]) -> bool:
    return not any(Path("/run/netns", name).exists() for name in namespaces)


def wait_until_gone(namespaces: list[str]) -> None:
    end = time.monotonic() + SECONDS
    while not gone(namespaces):
        assert time.monotonic() < end
        time.sleep(0.01)


def round_trips(slow: Any) -> list[float]:
    """Seconds of three short messages to the other namespace and back, and of a long one."""
    with subprocess.Popen(
        [*slow.prefix(1), sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout.readline() == "listening\n"
        client = [*slow.prefix(0), sys.executable, "-c", CLIENT]
        done = subprocess.run(client, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stderr
        server.wait(SECONDS)
    return [float(line) for line in done.stdout.split()]


@pytest.mark.usefixtures("needed")
def test_a_link_delays_and_goes_away(link):
    with link.SlowLink() as slow:
        assert not gone(slow.namespaces)
        at_once = round_trips(slow)
        slow.set(0.05)
        late = round_trips(slow)
        slow.set(0.0, 1e6)
        narrow = round_trips(slow)
        assert slow.used()["bytes"] > 3 * 100_000
        assert slow.used()["processor"] > 0
    assert gone(slow.namespaces)
    assert min(at_once) < 0.05
    assert all(seconds >= 0.1 for seconds in late)
    assert min(late) < 0.2
    assert narrow[-1] >= 0.1  # 100 kB at 1 MB/s
    assert min(narrow) < 0.05


@pytest.mark.usefixtures("needed")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_nothing_stays_behind(number, link):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=BENCH,
    ) as holder:
        namespaces = holder.stdout.readline().split()
        assert len(namespaces) == 2
        assert not gone(namespaces)
        holder.send_signal(number)
        holder.wait(SECONDS)
    wait_until_gone(namespaces)


def test_without_root_it_is_refused(link, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(link.LinkError, match=r"^a slow link needs Linux and root$"):
        link.SlowLink()


# --- The relay, between sockets that keep packets apart ------------------------------------------


@pytest.fixture
def ends(link, monkeypatch):
    """Ends of a relay as (first, second, ask): two sockets, and what changes it."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    for _, inner in pairs:
        inner.setblocking(False)
    read, write = os.pipe()
    replies: list[dict] = []
    answered = threading.Event()

    def reply(values: dict) -> None:
        replies.append(values)
        answered.set()

    monkeypatch.setattr(link, "_reply", reply)
    devices = [inner.fileno() for _, inner in pairs]
    thread = threading.Thread(target=link.relay, args=(devices, read))
    thread.start()

    def ask(**command: float) -> dict:
        answered.clear()
        os.write(write, json.dumps(command).encode() + b"\n")
        assert answered.wait(SECONDS)
        return replies[-1]

    yield pairs[0][0], pairs[1][0], ask
    os.close(write)
    thread.join(SECONDS)
    assert not thread.is_alive()
    os.close(read)
    for pair in pairs:
        for end in pair:
            end.close()


def test_packets_arrive_late_whole_and_in_order(ends):
    first, second, ask = ends
    ask(delay=0.1)
    sent = [bytes([number]) * (number + 1) for number in range(20)]
    start = time.monotonic()
    for packet in sent:
        first.send(packet)
    second.send(b"back")
    assert [second.recv(65536) for _ in sent] == sent
    assert first.recv(65536) == b"back"
    assert time.monotonic() - start >= 0.1
    used = ask()
    assert used["packets"] == 21
    assert used["bytes"] == sum(map(len, sent)) + 4


def test_a_shorter_delay_lets_no_packet_overtake(ends):
    first, second, ask = ends
    ask(delay=0.2)
    first.send(b"early")
    time.sleep(0.01)
    ask(delay=0.0)
    first.send(b"late")
    assert (second.recv(64), second.recv(64)) == (b"early", b"late")


def test_bandwidth_spaces_packets_out(ends):
    first, second, ask = ends
    ask(bandwidth=1e4)
    start = time.monotonic()
    for _ in range(5):
        first.send(bytes(500))
    for number in range(1, 6):
        second.recv(65536)
        assert time.monotonic() - start >= 0.05 * number - 1e-3
    ask(bandwidth=math.inf)


# --- The benchmark -------------------------------------------------------------------------------


@pytest.mark.usefixtures("needed")
@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="pins processes to two cores",
)
def test_benchmark(tmp_path):
    rows = ["scpl,K=2", "bp:1f1b,K=2,M=2"]
    if importlib.util.find_spec("torch"):
        rows.append("torch:1f1b,K=2,M=2")
    output = tmp_path / "runs" / "slow.json"
    others = set(Path("/run/netns").glob("jdecouple*"))
    environment = {**os.environ, "PYTHONPATH": str(BENCH.parent)}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [
            *(sys.executable, BENCH / "links.py"),
            *("--hidden=16", "--depth=2", "--batch=8", "--head=8"),
            *("--seconds=0.05", "--repeats=2", "--delays", "30", "0"),
            *("--rows", *rows),
            f"--output={output}",
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    assert output.with_suffix(".md").read_text() in done.stdout
    results = json.loads(output.read_text())["results"]
    listed = [(result["row"], result["delay_ms"]) for result in results]
    assert listed == [(row, delay) for row in rows for delay in (0, 30)]
    for result in results:
        spread = result["ms"]
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
        assert result["relay"] > 0
    near, far = results[2:4]
    assert near["kept"]["median"] == 1
    assert far["extra_ms"] > 55  # there and back, in every batch
    assert far["simulated_extra_ms"] == pytest.approx(60, rel=0.05)
    for result in results[5:]:  # PyTorch's messages go there and back, too
        assert result["extra_ms"] > 55
        assert result["simulated_ms"] is None
    assert set(Path("/run/netns").glob("jdecouple*")) <= others


def test_rows_of_pytorch_have_no_wires(link, monkeypatch, capsys):
    pytest.importorskip("torch")
    given = ["--wires", "int8", "--rows", "torch:1f1b,K=2,M=4"]
    monkeypatch.setattr(sys, "argv", ["links.py", *given])
    with pytest.raises(SystemExit):
        importlib.import_module("links").parse()
    assert "PyTorch's rows take no --wires" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "bp"], "row 'bp': two stages on two devices are needed"),
        (["--rows", "fdg,K=3"], "row 'fdg,K=3': two stages"),
        (["--depth=3"], "row 'deinforeg,K=2': 3 modules are no multiple of K"),
        (["--rows", "torch"], "row 'torch': two stages"),
        (["--delays", "-1"], "--delays: -1 is no number of at least 0"),
        (["--in-flight=0"], "--in-flight: 0 is no number of at least 1"),
        (["--bandwidth=0"], "--bandwidth: 0 is no number of at least 1"),
    ],
)
def test_options_that_do_not_fit(link, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["links.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("links").parse()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
