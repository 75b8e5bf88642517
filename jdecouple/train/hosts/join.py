"""How the processes of a run meet: first by themselves, then under `jax.distributed`."""

import contextlib
import errno
import ipaddress
import os
import socket
import time
from collections.abc import Iterable
from typing import Any, NoReturn

import jax

from jdecouple.pipeline import distributed
from jdecouple.train.hosts.group import MultiProcess
from jdecouple.train.hosts.handshake import SECONDS, OtherTokenError, accept, introduce
from jdecouple.train.hosts.link import Link, Message
from jdecouple.train.hosts.process_spec import ProcessSpec
from jdecouple.train.hosts.relay import relay
from jdecouple.train.hosts.token import shared_token

PATIENCE = 300.0  # seconds in which all processes must have come
_HELD: list[socket.socket] = []
_BACKSTOP = 3600  # seconds after which JAX misses a process that `MultiProcess` has not missed
_Json = dict[str, Any]


def join(spec: ProcessSpec, *, patience: float = PATIENCE) -> MultiProcess:
    """Waits for all processes of a run, and starts `jax.distributed` with them.

    Call it before anything touches a device. All must have one token, of `shared_token`. Process 0
    waits at the coordinator's port; all else (JAX's coordination service, and where the backend has
    no transport of its own JAX's sockets) uses ports that are free.

    Args:
        spec: the run and this process's part in it.
        patience: seconds to wait for the others.

    Raises:
        ValueError: in one line: no token, a port that is taken, an address that is none, processes
            that do not come, that come twice, or that were started for another run.
    """
    hello: _Json = {"program": "jdecouple", "jax": jax.__version__}
    hello |= {"num_processes": spec.count, "index": spec.index, "name": socket.gethostname()}
    token, end = shared_token(os.environ), time.monotonic() + patience
    if spec.index == 0:
        links, names = _await_others(spec, hello, token, end)
        welcome = _welcome(links, names)
        coordinator = distributed.with_port(spec.host, welcome["port"])
    else:
        link, welcome = _find_first(spec, hello, token, end)
        links, coordinator = {0: link}, relay(spec.host, welcome["port"], patience)
    os.environ.setdefault("no_grpc_proxy", f"127.0.0.1,{spec.host}")
    jax.config.update("jax_check_proxy_envs", False)
    process = MultiProcess(spec.index, links, welcome["names"])
    distributed.initialize(
        coordinator,
        spec.count,
        spec.index,
        address=spec.address or welcome["address"],
        transfer_port=_held_port(),
        all_devices=not spec.launched,
        heartbeat_timeout=_BACKSTOP,
    )
    return process


def _welcome(links: dict[int, Link], names: list[str]) -> _Json:
    """What process 0 tells all that have come, each under which address the others reach it."""
    index, ends = 0, {}
    try:
        for index, link in links.items():
            ends[index] = link.addresses
        own = [near for near, _ in ends.values()]
        here = next((address for address in own if not _is_loopback(address)), own[0])
        shared = {"port": _free_port(), "names": names}
        for index, link in links.items():
            _, seen = ends[index]
            address = here if _is_loopback(seen) else seen
            link.send(Message("welcome", shared | {"address": address}))
    except OSError:
        _refuse(links.values(), f"process {index} ({names[index]}) went before all had come")
    return shared | {"address": here}


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _await_others(
    spec: ProcessSpec, own: _Json, token: bytes, end: float
) -> tuple[dict[int, Link], list[str]]:
    """On process 0: a link to every other, and the names of the machines of all."""
    links: dict[int, Link] = {}
    names = {0: own["name"]}
    with _listen(spec) as server, contextlib.closing(accept(server, token, end)) as accepted:
        while len(links) < spec.count - 1:
            if not (arrival := next(accepted, None)):
                missing = sorted({*range(1, spec.count)} - links.keys())
                who = f"process {', '.join(map(str, missing))} of {spec.count}"
                _refuse(links.values(), f"{who} did not come to {spec.coordinator}")
            connection, hello = arrival
            link = Link(connection)
            if mismatch := _mismatch(own, hello, links):
                _refuse([*links.values(), link], mismatch)
            index = hello["index"]
            links[index], names[index] = link, str(hello.get("name"))
    return links, [names[index] for index in range(spec.count)]


def _refuse(links: Iterable[Link], reason: str) -> NoReturn:
    for link in links:
        with contextlib.suppress(OSError):
            link.send(Message("refused", reason))
    raise ValueError(reason)


def _mismatch(own: _Json, hello: _Json, links: dict[int, Link]) -> str | None:
    index, count = hello.get("index"), own["num_processes"]
    who = f"process {index} ({hello.get('name')})"
    for key in ("program", "jax", "num_processes"):
        if hello.get(key) != own[key]:
            return f"{who} came with {key} = {hello.get(key)}, process 0 with {own[key]}"
    if type(index) is not int or not 0 <= index < count:
        return f"{who} came: 0 to {count - 1} is allowed for {count} processes"
    if index in (0, *links):
        return f"two processes came with the index {index}: each needs its own"
    return None


def _listen(spec: ProcessSpec) -> socket.socket:
    """A socket at the coordinator's address, and at no other."""
    try:
        address = distributed.bind_address(spec.host)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server(
            (address, spec.port), family=family, dualstack_ipv6=address == "::"
        )
    except OSError as error:
        said = error.strerror
        if error.errno == errno.EADDRNOTAVAIL:
            said = "this machine has no such address (0.0.0.0 stands for all that it has)"
        raise ValueError(f"process 0 cannot wait at {spec.coordinator}: {said}") from error


def _find_first(spec: ProcessSpec, hello: _Json, token: bytes, end: float) -> tuple[Link, _Json]:
    """On the other processes: a link to process 0, and what it says."""
    problem: object = "it did not answer"
    while time.monotonic() < end:
        try:
            connection = socket.create_connection((spec.host, spec.port), timeout=SECONDS)
            introduce(connection, token, hello)
            connection.settimeout(max(0.001, end - time.monotonic()))
            link = Link(connection)
            match link.receive():
                case Message("refused", str(reason)):
                    raise ValueError(reason)
                case Message(
                    "welcome", {"port": int(), "names": [*_], "address": str()} as welcome
                ):
                    connection.settimeout(None)
                    return link, welcome
            problem = "its answer is none of this program"
        except OtherTokenError as error:
            problem = error
            break
        except OSError as error:
            problem = error.strerror or error
        time.sleep(0.1)
    raise ValueError(f"process 0 was not found at {spec.coordinator}: {problem}")


def _held_port() -> int:
    """A port that nobody else is given until JAX's sockets, which share it, are made."""
    held = socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("", 0))
    _HELD.append(held)
    return held.getsockname()[1]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]
