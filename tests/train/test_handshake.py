"""Who is let in to a run of several processes, where it listens, and what a stranger can do."""

import contextlib
import hmac
import json
import os
import queue
import socket
import stat
import struct
import sys
import threading
import time

import jax
import numpy as np
import pytest
from runs import connected, free_port

from jdecouple.pipeline import distributed
from jdecouple.train.hosts import MultiProcess, ProcessSpec, SingleProcess, group, handshake, join
from jdecouple.train.hosts.handshake import OtherTokenError, accept, introduce
from jdecouple.train.hosts.link import Link, Message
from jdecouple.train.hosts.token import shared_token

TOKEN = b"a secret of the tests"
HELLO = {"program": "jdecouple", "jax": jax.__version__, "num_processes": 2, "index": 1}


def is_closed(connection: socket.socket) -> bool:
    """Whether the other end closes it, after what it may say."""
    connection.settimeout(60)
    with contextlib.suppress(ConnectionError):
        while connection.recv(4096):
            pass
    return True


def dripping(connection: socket.socket) -> None:
    """Sends a byte now and then for twenty seconds."""
    for _ in range(500):
        connection.sendall(b"x")
        time.sleep(0.04)


class TestToken:
    def test_variable(self, tmp_path):
        environ = {"JDECOUPLE_TOKEN": "sixteen letters!", "XDG_CONFIG_HOME": str(tmp_path)}
        assert shared_token(environ) == b"sixteen letters!"
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize("token", ["", "fifteen letters"])
    def test_one_that_can_be_guessed(self, token):
        with pytest.raises(ValueError, match=r"^JDECOUPLE_TOKEN has \d+ characters: at least 16"):
            shared_token({"JDECOUPLE_TOKEN": token})

    def test_file_of_the_user(self, tmp_path):
        """Whoever comes first makes it; only its owner can read it."""
        environ, found = {"XDG_CONFIG_HOME": str(tmp_path / "config")}, []
        threads = [
            threading.Thread(target=lambda: found.append(shared_token(environ))) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8
        assert len(set(found)) == 1
        folder = tmp_path / "config" / "jdecouple"
        assert [path.name for path in folder.iterdir()] == ["token"]
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / "token").stat().st_mode) == 0o600
        other = {"XDG_CONFIG_HOME": str(tmp_path / "other")}
        assert shared_token(other) != found[0]
        assert len(found[0]) == 64

    @pytest.mark.parametrize("mode", [0o640, 0o604])
    def test_file_that_others_can_read(self, tmp_path, mode):
        environ = {"XDG_CONFIG_HOME": str(tmp_path)}
        shared_token(environ)
        (tmp_path / "jdecouple" / "token").chmod(mode)
        with pytest.raises(ValueError, match=r"^no token in '.*' \(others may .*JDECOUPLE_TOKEN"):
            shared_token(environ)

    @pytest.mark.parametrize("content", [b"\xff" * 20, None])
    def test_file_that_is_none(self, tmp_path, content):
        environ = {"XDG_CONFIG_HOME": str(tmp_path)}
        shared_token(environ)
        path = tmp_path / "jdecouple" / "token"
        path.write_bytes(content) if content else path.unlink() or path.mkdir(mode=0o700)
        with pytest.raises(ValueError, match=r"^no token in .*: set JDECOUPLE_TOKEN[^\n]*$"):
            shared_token(environ)

    def test_no_folder_for_it(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match=r"^no token in .*Not a directory.*JDECOUPLE_TOKEN"):
            shared_token({"XDG_CONFIG_HOME": str(tmp_path / "file")})


class TestListens:
    @pytest.mark.parametrize(
        ("host", "address"),
        [
            ("127.0.0.1", "127.0.0.1"),
            ("127.1", "127.0.0.1"),
            ("::1", "::1"),
            ("0.0.0.0", "0.0.0.0"),
            ("localhost", "127.0.0.1"),
            ("node7", "10.0.0.7"),
            ("alias", "127.0.0.1"),
            # Others know it by another address than it does itself.
            ("machine", "::" if socket.has_dualstack_ipv6() else "0.0.0.0"),
            ("machine.lab.org", "::" if socket.has_dualstack_ipv6() else "0.0.0.0"),
        ],
    )
    def test_at_what_was_named(self, host, address, monkeypatch):
        known = {"node7": "10.0.0.7", "machine": "127.0.1.1", "machine.lab.org": "127.0.1.1"}

        def resolve(name, port, **_):
            return [(socket.AF_INET, 1, 6, "", (known.get(name, "127.0.0.1"), port))]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        monkeypatch.setattr(socket, "gethostname", lambda: "machine")
        assert distributed.bind_address(host) == address

    def test_localhost_is_never_all(self, monkeypatch):
        monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
        assert distributed.bind_address("localhost") in ("127.0.0.1", "::1")

    @pytest.mark.parametrize("process", [0, 1])
    def test_the_service_of_jax_too(self, process, monkeypatch):
        given = []
        monkeypatch.setattr(jax.config, "update", lambda *_: None)
        monkeypatch.setattr(
            jax.distributed, "initialize", lambda *_, **options: given.append(options)
        )
        distributed.initialize("[::1]:1234", 2, process)
        assert given[0]["coordinator_bind_address"] == (None if process else "[::1]:1234")

    def test_at_one_address_alone(self):
        port, told = free_port(), []

        def wait():
            with pytest.raises(ValueError, match="did not come"):
                join(ProcessSpec(f"127.0.0.1:{port}", 2, 0), patience=1)
            told.append(True)

        thread = threading.Thread(target=wait)
        thread.start()
        with connected(port), pytest.raises(OSError):
            socket.create_connection(("127.0.0.2", port), timeout=5)
        thread.join(60)
        assert told

    def test_an_address_of_another_machine(self):
        said = r"^process 0 cannot wait at 198.51.100.7:1234: this machine has no such address"
        with pytest.raises(ValueError, match=said):
            join(ProcessSpec("198.51.100.7:1234", 2, 0), patience=1)


@pytest.fixture
def door(monkeypatch):
    """Port of a process that lets in who knows the token, and a queue of those it let in."""
    monkeypatch.setattr(handshake, "SECONDS", 2.0)
    let_in: queue.SimpleQueue = queue.SimpleQueue()
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        contextlib.closing(accept(server, TOKEN, time.monotonic() + 30)) as accepted,
    ):

        def run():
            for arrival in accepted:
                if "stop" in arrival[1]:
                    return
                let_in.put(arrival)

        thread = threading.Thread(target=run)
        thread.start()
        yield server.getsockname()[1], let_in
        introduce(connected(server.getsockname()[1]), TOKEN, {"stop": True})
        thread.join(60)


def line_of(token: bytes, nonce: bytes, body: bytes) -> bytes:
    return (
        hmac.digest(token, b"hello" + nonce + body, "sha256").hex().encode() + b" " + body + b"\n"
    )


OLD = json.dumps(["hello", HELLO, []]).encode()
SAID = {
    "nothing": b"",
    "a line without end": b"x" * 100_000,
    "a long message": struct.pack("!Q", 2**60),
    "a message": struct.pack("!Q", len(OLD)) + OLD,
    "a request": b"GET / HTTP/1.1\r\n\r\n",
    "no token": json.dumps(HELLO).encode() + b"\n",
    "an empty token": line_of(b"", bytes(32), json.dumps(HELLO).encode()),
    "another nonce": line_of(TOKEN, bytes(32), json.dumps(HELLO).encode()),
}


def first_of(count):
    """Process 0 waits for the others in a thread: its port, the lines that end it, the thread."""
    port, told = free_port(), []

    def wait():
        try:
            join(ProcessSpec(f"127.0.0.1:{port}", count, 0), patience=60)
        except ValueError as error:
            told.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    return port, told, thread


class TestStrangers:
    def test_none_is_let_in_or_keeps_others_out(self, door):
        """The last one drips: the time is that of the whole handshake."""
        port, let_in = door
        with contextlib.ExitStack() as stack:
            strangers = [stack.enter_context(connected(port)) for _ in SAID]
            for stranger, said in zip(strangers, SAID.values(), strict=True):
                with contextlib.suppress(ConnectionError):  # it did not listen to the end
                    stranger.sendall(said)
            drip = stack.enter_context(connected(port))
            ours = stack.enter_context(connected(port))
            introduce(ours, TOKEN, HELLO)
            connection, hello = let_in.get(timeout=60)
            assert connection.getpeername() == ours.getsockname()
            assert hello.items() >= HELLO.items()
            with pytest.raises(ConnectionError):
                dripping(drip)
            assert all(map(is_closed, strangers))
        assert let_in.empty()

    def test_more_than_there_is_room_for(self, door, monkeypatch):
        monkeypatch.setattr(handshake, "SECONDS", 60)
        monkeypatch.setattr(handshake, "_MOST", 5)
        port, let_in = door
        with contextlib.ExitStack() as stack:
            strangers = [stack.enter_context(connected(port)) for _ in range(20)]
            introduce(stack.enter_context(connected(port)), TOKEN, HELLO)
            let_in.get(timeout=60)
            assert all(map(is_closed, strangers[:15]))

    def test_another_token(self, door):
        port, let_in = door
        with connected(port) as other, pytest.raises(OtherTokenError, match="JDECOUPLE_TOKEN"):
            introduce(other, b"another secret", HELLO)
        assert let_in.empty()

    @pytest.mark.parametrize("body", [b"[1]", b"{", b'"\xff"', b"null", b"[" * 3900])
    def test_a_hello_that_is_none(self, door, body):
        port, let_in = door
        with connected(port) as other:
            nonce = other.recv(32, socket.MSG_WAITALL)
            other.sendall(line_of(TOKEN, nonce, body))
            assert is_closed(other)
        assert let_in.empty()

    @pytest.mark.parametrize(
        "said",
        [b"", b"x" * 31, bytes(32), bytes(96), bytes(32) + b"-" * 64 + b"welcome"],
        ids=["nothing", "a part", "a nonce", "zeros", "welcome"],
    )
    @pytest.mark.parametrize("closes", [True, False])
    def test_one_at_the_port_of_process_0(self, said, closes, monkeypatch):
        monkeypatch.setattr(handshake, "SECONDS", 0.1)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            kept = []

            def answer():
                with contextlib.suppress(OSError):
                    while True:
                        connection, _ = server.accept()
                        connection.sendall(said)
                        connection.close() if closes else kept.append(connection)

            threading.Thread(target=answer, daemon=True).start()
            with pytest.raises(ValueError, match=r"^process 0 was not found at [^\n]*: .+$"):
                join(ProcessSpec(f"127.0.0.1:{port}", 2, 1), patience=0.2)
            server.shutdown(socket.SHUT_RDWR)

    @pytest.mark.parametrize("index", [7, 2, -1, float("inf"), True, None, "1", 1.5, [1]])
    def test_an_index_that_is_none(self, index):
        """Whoever knows the token is told, as all are."""
        port, told, thread = first_of(2)
        with connected(port) as other:
            introduce(other, shared_token(os.environ), {**HELLO, "index": index, "name": "x"})
            answer = Link(other).receive()
        thread.join(60)
        said = f"process {index} (x) came: 0 to 1 is allowed for 2 processes"
        assert (answer.kind, answer.value) == ("refused", said)
        assert told == [said]


def test_one_that_goes_before_all_have_come():
    """The others are told, without a traceback."""
    port, told, thread = first_of(3)
    token, hello = shared_token(os.environ), {**HELLO, "num_processes": 3, "name": "x"}
    with connected(port) as first:
        introduce(first, token, hello)
        first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # at once
    with connected(port) as second:
        introduce(second, token, {**hello, "index": 2})
        answer = Link(second).receive()
    thread.join(60)
    assert told == [answer.value] == ["process 1 (x) went before all had come"]


class Watched(MultiProcess):
    """Tells how it would end."""

    def __init__(self, *arguments):
        self.ends: queue.SimpleQueue = queue.SimpleQueue()
        super().__init__(*arguments)

    def _end(self, line, code, told_by):
        self.ends.put((line, code))
        self._left.add(told_by)  # nobody waits for it any more


@pytest.fixture
def watched():
    """A process 0, and the socket of what should be process 1."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        far = connected(server.getsockname()[1])
        near, _ = server.accept()
    with far:
        yield Watched(0, {1: Link(near)}, ["a", "b"]), far


def framed(body: bytes) -> bytes:
    return struct.pack("!Q", len(body)) + body


class TestMessages:
    @pytest.mark.parametrize(
        "body",
        [
            b'["end", ["all is well", 0], []]',
            b'["end", ["all is well", 256], []]',
            b'["end", ["all is well", -1], []]',
            b'["end", null, []]',
            b'["end", [null, 1], []]',
            b'["so far", "x", []]',
            b'["until", Infinity, []]',
            b'["until", null, []]',
            b'["what is this", null, []]',
            b'[["end"], null, []]',
            b'["data", null]',
            b'["data", null, 7]',
            b'["data", null, [["object", [2]]]]',
            b'["data", null, [["no type", [2]]]]',
            b'["data", null, [["int8", [-2]]]]',
            b'["data", null, [["int8", ["x"]]]]',
            b'["data", null, [["int8", [4611686018427387904]]]]',
            b'["data", null, [["int8", [1e999]]]]',
            b"[" * 100_000,
            b"\xff\xff",
            b"",
        ],
        ids=lambda body: ascii(body)[2:42],
    )
    def test_none_that_is_malformed_ends_well(self, watched, body):
        """It is as if the other process had gone: no success, no traceback, no hang."""
        process, far = watched
        far.sendall(framed(body))
        line, code = process.ends.get(timeout=60)
        assert line.startswith("process 1 (b) is lost")
        assert code == group.LOST

    def test_an_end_with_a_reason(self, watched):
        process, far = watched
        Link(far).send(Message("end", ["why", 2]))
        assert process.ends.get(timeout=60) == ("why", 2)

    def test_numpy_arrays_still_come(self, watched):
        process, far = watched
        Link(far).send(Message("data", 1, [np.arange(3)]))
        _, message = process.collect(0)
        assert message.arrays[0].tolist() == [0, 1, 2]

    def test_what_is_printed_has_no_control_characters(self, capsys, monkeypatch):
        monkeypatch.setattr(os, "_exit", sys.exit)
        with pytest.raises(SystemExit) as stopped:
            SingleProcess()._end("process 1 (\x1b[2Ja\x9bb\u202ec) failed: \r\nmore", 7, told_by=1)
        assert stopped.value.code == 7
        said = "error: process 1 (\\x1b[2Ja\\x9bb\\u202ec) failed: \n"
        assert capsys.readouterr().err == said
