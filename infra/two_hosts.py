"""Two hosts inside one machine: network namespaces with a cable between them that can be limited and cut.

```
 host A ════ link, limited each way by a token bucket ════ host B
   └───────── unlimited ──── this machine ──── unlimited ────┘
```
A process started by `Host.command` sees the link as its device `link0`. Servers of the machine that listen on
`TwoHosts.machine` are reached from both hosts; no route leads from host to host but the link.

Needs root and iproute2: `why_unavailable` says what a machine lacks. Names and addresses are drawn, so several pairs
stand side by side; what a killed process has left is removed by the next.
"""

import ipaddress
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from shared.errors import StartupError

NAME = "baton"
"""Namespaces are called `baton-<process id of the maker>-<draw>-<letter>`."""

LINK_DEVICE = "link0"
WAY_DEVICE = "way0"

UCX_ENV = {"UCX_NET_DEVICES": LINK_DEVICE, "UCX_TLS": "tcp"}
"""Lets UCX use the link, and nothing that two real hosts would not share, such as memory."""

ADDRESSES = ipaddress.IPv4Network("198.18.0.0/15")
"""Set aside for trying out networks (RFC 2544); each pair of hosts takes 8 of them."""

QUEUE_S = 0.02
"""How long a packet may wait for its turn on the limited link; longer ones are dropped, as a router does."""

BURST_S = 0.001
MIN_BURST_BYTES = 16 * 1024
"""What may pass at once; several full packets, or the limit is not reached."""


@dataclass(frozen=True, slots=True)
class Host:
    """One of the two.

    Attributes:
        namespace: its name, as `ip netns` shows it.
        address: on the link.
        way_address: where this machine reaches its servers, past the link.
    """

    namespace: str
    address: str
    way_address: str

    def command(self, *words: str) -> tuple[str, ...]:
        """The same command run inside this host; its process id stays that of the started process."""
        return ("ip", "netns", "exec", self.namespace, *words)


class Link:
    """The cable between the hosts; whole and unlimited at first."""

    def __init__(self, *hosts: Host) -> None:
        self._hosts = hosts
        self._discipline: tuple[str, ...] = ("noqueue",)

    def limit(self, bits_per_s: float) -> None:
        """From now on carry so much each way, Ethernet's headers included; infinity lifts the limit."""
        self._discipline = ("noqueue",) if bits_per_s == float("inf") else token_bucket(bits_per_s)
        self._set(self._discipline)

    def cut(self) -> None:
        """Lose every packet from now on, those that wait included; neither end is told."""
        self._set(("blackhole",))

    def mend(self) -> None:
        """Carry packets again, as fast as before the cut."""
        self._set(self._discipline)

    def sent_bytes(self, host: Host) -> int:
        """What `host` has put on the link, Ethernet's headers included; what was lost behind it counts too."""
        (device,) = json.loads(_run("ip", "-n", host.namespace, "-s", "-j", "link", "show", "dev", LINK_DEVICE))
        return device["stats64"]["tx"]["bytes"]

    def _set(self, discipline: tuple[str, ...]) -> None:
        for host in self._hosts:
            _run("tc", "-n", host.namespace, "qdisc", "replace", "dev", LINK_DEVICE, "root", *discipline)


@dataclass(frozen=True, slots=True)
class TwoHosts:
    """Both hosts and what joins them.

    Attributes:
        machine: address on which servers of this machine must listen to be reached from both.
    """

    a: Host
    b: Host
    link: Link
    machine: str


def token_bucket(bits_per_s: float) -> tuple[str, ...]:
    """The limit in `tc`'s words. Raises ValueError for a rate that is not positive."""
    if not bits_per_s > 0:
        raise ValueError(f"a link of {bits_per_s} bits per second carries nothing; cut it instead")
    burst_bytes = max(MIN_BURST_BYTES, round(bits_per_s / 8 * BURST_S))
    latency = f"{round(1e6 * QUEUE_S)}us"
    return ("tbf", "rate", f"{round(bits_per_s)}bit", "burst", str(burst_bytes), "latency", latency)


def why_unavailable() -> str | None:
    """What keeps this machine from making two hosts; None where nothing does."""
    if os.geteuid() != 0:
        return "two hosts in one machine need root"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"two hosts in one machine need {program} (apt-get install iproute2)"
    try:
        with _namespace(f"{NAME}-{os.getpid()}-probe") as name:
            _run("ip", "-n", name, "link", "set", "lo", "up")
            for discipline in (token_bucket(1e6), ("blackhole",), ("noqueue",)):
                _run("tc", "-n", name, "qdisc", "replace", "dev", "lo", "root", *discipline)
    except StartupError as refused:
        return f"this machine lets nobody make two hosts: {refused}"
    return None


@contextmanager
def two_hosts(rng: random.Random) -> Generator[TwoHosts]:
    """Makes both hosts and the link, unlimited; at the end kills what runs in them and removes all.

    Raises StartupError.
    """
    remove_left_behind()
    draw = f"{rng.getrandbits(32):08x}"
    block = _free_block(rng)
    machine, way_a, way_b, link_a, link_b = (str(block[index]) for index in (1, 2, 3, 5, 6))
    with ExitStack() as made:
        a, b = (
            Host(made.enter_context(_namespace(f"{NAME}-{os.getpid()}-{draw}-{letter}")), address, way)
            for letter, address, way in (("a", link_a, way_a), ("b", link_b, way_b))
        )
        _run(
            *("ip", "link", "add", LINK_DEVICE, "netns", a.namespace, "type", "veth"),
            *("peer", "name", LINK_DEVICE, "netns", b.namespace),
        )
        for letter, host in (("a", a), ("b", b)):
            inside = ("ip", "-n", host.namespace)
            _run(*inside, "link", "set", "lo", "up")
            _run(*inside, "addr", "add", f"{host.address}/30", "dev", LINK_DEVICE)
            _run(*inside, "link", "set", LINK_DEVICE, "up")
            way = f"bt{draw}{letter}"
            _run("ip", "link", "add", way, "type", "veth", "peer", "name", WAY_DEVICE, "netns", host.namespace)
            # Its other end goes with the namespace, only later, and the addresses should be free at once.
            made.callback(_run, "ip", "link", "del", way)
            _run("ip", "addr", "add", machine, "peer", host.way_address, "dev", way)
            _run("ip", "link", "set", way, "up")
            _run(*inside, "addr", "add", host.way_address, "peer", machine, "dev", WAY_DEVICE)
            _run(*inside, "link", "set", WAY_DEVICE, "up")
        yield TwoHosts(a, b, Link(a, b), machine)


def remove_left_behind() -> None:
    """Removes the hosts of processes that were killed before they could."""
    for line in _run("ip", "netns", "list").splitlines():
        name = line.split()[0]
        maker = name.removeprefix(f"{NAME}-").partition("-")[0]
        if name.startswith(f"{NAME}-") and maker.isdigit() and not Path(f"/proc/{maker}").exists():
            with suppress(StartupError):  # another process may be removing it at this moment
                _remove_namespace(name)


@contextmanager
def _namespace(name: str) -> Generator[str]:
    _run("ip", "netns", "add", name)
    try:
        yield name
    finally:
        _remove_namespace(name)


def _remove_namespace(name: str) -> None:
    """A namespace lives as long as a process in it: they go first."""
    for pid in _run("ip", "netns", "pids", name).split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    _run("ip", "netns", "del", name)


def _free_block(rng: random.Random) -> ipaddress.IPv4Network:
    """Eight addresses of which this machine has none."""
    devices = json.loads(_run("ip", "-j", "-4", "addr"))
    taken = {ipaddress.IPv4Address(each["local"]) for device in devices for each in device["addr_info"]}
    while True:
        first = int(ADDRESSES.network_address) + 8 * rng.randrange(ADDRESSES.num_addresses // 8)
        block = ipaddress.IPv4Network((first, 29))
        if not any(address in block for address in taken):
            return block


def _run(*command: str) -> str:
    """What a command of iproute2 says. Raises StartupError with its complaint."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StartupError(f"`{' '.join(command)}`: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout
