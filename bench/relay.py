"""A slow link between two network namespaces of this machine; Linux, root and iproute2.

    namespace a: tun, 10.0.0.1  <-->  relay  <-->  tun, 10.0.0.2 :namespace b

Each namespace has one TUN device, and what a process sends into it comes out of the relay's file.
The relay is this module run as a program. It holds every packet for the delay of its direction and
writes it to the other device; a link of limited bandwidth carries one packet after another. It is
also what makes the namespaces and takes them away: when its standard input ends, so that nothing
stays behind even if the benchmark is killed.

Packets of 64 KiB keep it cheap: 25 MB/s are 400 packets a second. TCP may have as many bytes in
flight as the delay asks for, from the start: the buffers of both namespaces are raised
(`SETTINGS`), and so are the first windows of the route.
"""

import collections
import contextlib
import fcntl
import json
import math
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ADDRESSES = ("10.0.0.1", "10.0.0.2")
DEVICE = "/dev/net/tun"
PACKET_BYTES = 65535
QUEUED_PACKETS = 10_000  # in a device, while the relay waits for a core
BUFFER_BYTES = 2**26  # of a connection; 0.2 s at 300 MB/s
SETTINGS = {
    "net.ipv4.tcp_rmem": f"4096 {BUFFER_BYTES} {BUFFER_BYTES}",
    "net.ipv4.tcp_wmem": f"4096 {BUFFER_BYTES} {BUFFER_BYTES}",
    "net.ipv4.tcp_slow_start_after_idle": "0",  # stages pause between batches
    "net.ipv6.conf.all.disable_ipv6": "1",
}
STOP_SECONDS = 10.0

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000


class LinkError(RuntimeError):
    """The machine cannot make a link; the message is one line."""


class SlowLink(contextlib.AbstractContextManager):
    """A link whose delay and bandwidth may change while it is in use, between its `namespaces`.

    Raises:
        LinkError: this machine lacks root, iproute2 or TUN devices, or a step fails.
    """

    def __init__(self) -> None:
        if problem := missing():
            raise LinkError(f"a slow link needs {problem}")
        self.namespaces = tuple(f"jdecouple{os.getpid()}{end}" for end in "ab")
        self._relay: Any = subprocess.Popen(
            [sys.executable, __file__, *self.namespaces],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the benchmark, which ends the relay
        )
        try:
            self._reply()
        except BaseException:
            self.__exit__()
            raise

    def prefix(self, end: int) -> list[str]:
        """Words before a command that run it in a namespace."""
        return ["ip", "netns", "exec", self.namespaces[end]]

    def set(self, delay: float, bandwidth: float = math.inf) -> None:
        """Changes both directions: seconds that a packet takes, and bytes a second."""
        self._ask(delay=delay, bandwidth=bandwidth)

    def used(self) -> dict[str, float]:
        """What the relay has taken so far: "processor" seconds, "packets" and "bytes"."""
        return self._ask()

    def __exit__(self, *problem: object) -> None:
        """Ends the relay, and with it the namespaces."""
        self._relay.stdin.close()
        try:
            self._relay.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._relay.kill()
            self._relay.wait()
            _delete(self.namespaces)
        self._relay.stdout.close()

    def _ask(self, **command: float) -> dict[str, float]:
        print(json.dumps(command), file=self._relay.stdin, flush=True)
        return self._reply()

    def _reply(self) -> dict[str, float]:
        reply = json.loads(self._relay.stdout.readline() or '{"error": "the relay ended"}')
        if "error" in reply:
            raise LinkError(reply["error"])
        return reply


def missing() -> str | None:
    """What this machine lacks for a link, in words; None if nothing."""
    if not sys.platform.startswith("linux") or os.geteuid():
        return "Linux and root"
    if not shutil.which("ip"):
        return "iproute2 (the command ip)"
    return None if os.access(DEVICE, os.R_OK | os.W_OK) else DEVICE


class Direction:
    """Packets on their way from one device to the other."""

    def __init__(self, source: int, target: int):
        self.source, self.target = source, target
        self.delay, self.bandwidth = 0.0, math.inf
        self.packets = self.bytes = 0
        self._held: collections.deque[tuple[float, bytes]] = collections.deque()
        self._free = 0.0  # when the link has sent what it was given

    @property
    def due(self) -> float:
        """When the next packet is to leave."""
        return self._held[0][0] if self._held else math.inf

    def take(self, now: float) -> None:
        """Takes what the source has."""
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = os.read(self.source, PACKET_BYTES)
                self._free = max(now, self._free) + len(packet) / self.bandwidth
                self._held.append((self._free + self.delay, packet))
                self.packets += 1
                self.bytes += len(packet)

    def give(self, now: float) -> None:
        """Gives the target what is due; packets keep their order."""
        while self._held and self._held[0][0] <= now:
            os.write(self.target, self._held.popleft()[1])


def relay(devices: Sequence[int], commands: int) -> None:
    """Relays between two devices until the commands end; answers each on standard output."""
    first, second = devices
    directions = [Direction(first, second), Direction(second, first)]
    pending = b""
    while True:
        now = time.monotonic()
        due = min(direction.due for direction in directions)
        wait = None if due == math.inf else max(0.0, due - now)
        ready, _, _ = select.select([*devices, commands], [], [], wait)
        now = time.monotonic()
        for direction in directions:
            if direction.source in ready:
                direction.take(now)
            direction.give(now)
        if commands in ready:
            read = os.read(commands, 4096)
            if not read:
                return
            *lines, pending = (pending + read).split(b"\n")
            for line in lines:
                command = json.loads(line)
                for direction in directions:
                    direction.delay = command.get("delay", direction.delay)
                    direction.bandwidth = command.get("bandwidth", direction.bandwidth)
                used = {x: sum(getattr(y, x) for y in directions) for x in ("packets", "bytes")}
                _reply({"processor": time.process_time(), **used})


def _reply(reply: dict[str, Any]) -> None:
    print(json.dumps(reply), flush=True)


def _device(namespace: str, address: str) -> int:
    """Opens a TUN device and moves it to a namespace; gives its file, which does not block."""
    file = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK)
    name = f"jd{os.getpid()}{address[-1]}"
    fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    _ip("link", "set", name, "netns", namespace)
    _ip("-n", namespace, "link", "set", "lo", "up")
    _ip("-n", namespace, "address", "add", f"{address}/30", "dev", name)
    sizes = ("mtu", str(PACKET_BYTES), "txqueuelen", str(QUEUED_PACKETS))
    _ip("-n", namespace, "link", "set", name, *sizes, "up")
    window = str(BUFFER_BYTES // PACKET_BYTES)
    route = ("10.0.0.0/30", "dev", name, "src", address)
    _ip("-n", namespace, "route", "change", *route, "initcwnd", window, "initrwnd", window)
    script = "; ".join(  # sets what there is: kernels differ
        f"echo '{value}' > /proc/sys/{key.replace('.', '/')}" for key, value in SETTINGS.items()
    )
    inside = ["ip", "netns", "exec", namespace, "sh", "-c", script]
    subprocess.run(inside, stderr=subprocess.DEVNULL)
    return file


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise LinkError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _delete(namespaces: Sequence[str]) -> None:
    """Ends what still runs in namespaces, and takes them away with their devices."""
    for name in namespaces:
        if not Path("/run/netns", name).exists():
            continue
        left = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
        for process in left.stdout.split():
            os.kill(int(process), signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", name])


def main(namespaces: Sequence[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        devices = []
        for name, address in zip(namespaces, ADDRESSES, strict=True):
            _ip("netns", "add", name)
            devices.append(_device(name, address))
        _reply({})
        relay(devices, sys.stdin.fileno())
    except (LinkError, OSError) as error:
        _reply({"error": str(error)})
    finally:
        _delete(namespaces)


if __name__ == "__main__":
    main(sys.argv[1:])
