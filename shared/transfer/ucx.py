"""Hand-overs between processes: control messages by TCP, pages by UCX.

    puller                                                     source
      │── TCP connect ────────────────────────────────────────>│  its address stands in the ticket
      │── Knock: the source's incarnation ────────────────────>│  another one: Refused
      │── Hello: protocol, layout, incarnation, UCX address ──>│
      │<── Hello, with a challenge ────────────────────────────│  either end hangs up if protocol or layout differ
      │                                                        │
      │   once, when the two register: the self-test           │
      │── Probe: so many bytes ───────────────────────────────>│
      │<── Part of no pages ── then as below: Ready, bytes ───>│
      │── Speed: what was measured ───────────────────────────>│  the source plans with it, and refines it as it sends
      │                                                        │
      │   for each pull, many at once on one connection:       │
      │── Pull: key, wanted page indexes, proof of the ticket ─>│  checked, else Refused(reason)
      │                                                        │
      │   for each part, as soon as its KV is computed:        │  lease room in the outgoing arena
      │<── Part: which pages and layers, format, length ───────│  pack the pages into it
      │   lease room in the incoming arena                     │
      │── Ready: a new tag; and a UCX receive under it ───────>│  when both are done
      │<══════════ UCX message under that tag: pages ══════════│
      │   unpack into our pages                                │
      │                                                        │
      │── Confirm: all parts are in our arena ────────────────>│  the offer ends: PULLED
      │<── Released ───────────────────────────────────────────│  or Refused: it ended otherwise before
      │                                                        │
      │── GiveUp, in place of Confirm ────────────────────────>│  the offer ends: FAILED
      │                                                        │
      │   for each fetch:                                      │
      │── Fetch: names of blocks, a proof of each ────────────>│  keep what is here of the run, check the proofs
      │<── Found: so many ─────────────────────────────────────│  0: that is all; else a pull of those, as above

What holds:

- Only `Released` makes a pull a success. What came by UCX is worth nothing without it: a UCX send can succeed though
  nobody received it, and the source may have freed pages while they were on the wire.
- The puller knows by itself when all has come: each wanted page and layer is announced exactly once, in a form no more
  lossy than the ticket allows and of the length which that form has. A source that does otherwise is hung up on.
- Each `Ready` is answered by exactly one UCX message of its tag, or by the end of the connection. If the offer ended
  meanwhile the message is one byte long, and `Refused` says why. So a posted receive always completes, and no memory
  goes back to its arena while UCX might still write to it: ucxx has no call that cancels a single receive and says
  when that is done.
- A tag is used once in the life of a process: the next receive after one that was given up would get the old bytes.
  Half of it is random: UCX lets in whoever has its address, and nobody but the source shall answer a receive.
- What cannot be ended otherwise is ended by cutting the connection: the socket is aborted and the UCX endpoint closed,
  which completes all that is in flight on it, at both ends. Both notice a killed peer by the end of the TCP stream, and
  one that stands still by a part that makes no progress, so that it keeps nobody's arena.
- UCX never sees an address of someone who does not know our incarnation, or whose pages are not laid out as ours: the
  source makes its endpoint for the first pull that it lets in, or for the self-test, whose bytes are zeros.

Why two channels: ucxx can only listen on all interfaces (its listener takes a port and no host), a receive that waits
for control messages would keep UCX busy, and a stream that ends is the quickest news of a dead peer. The TCP listener
binds `host` alone. UCX itself listens on the devices in UCX_NET_DEVICES, by default `lo`; for peers on other hosts set
both `host` and `net_devices`.

Which transport UCX picks: between CPU processes TCP, since shared memory does not report a dead peer; between CUDA
processes of one host CUDA IPC, on each process's own GPU masked by CUDA_VISIBLE_DEVICES (the progress thread opens
device 0). UCX_TLS in the environment restricts the choice; it must leave in `tcp` or an RDMA transport for the
wire-up. The self-test asks UCX what it chose.
"""

# ucxx has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import asyncio
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from itertools import count
from types import TracebackType
from typing import Any, Self

import torch
import ucxx

from shared.blocks import BlockKey
from shared.request import Incarnation
from shared.transfer.checks import check_fetch, check_pull
from shared.transfer.control import PROTOCOL_VERSION, Hello
from shared.transfer.host_facts import HostFacts, read_host_facts
from shared.transfer.offers import Offering, Offers
from shared.transfer.port import Clock, Fetched, LinkReport, Pulled
from shared.transfer.progress_thread import ProgressThread
from shared.transfer.puller import Peer, Puller
from shared.transfer.source import Source
from shared.transfer.staging import Staging
from shared.transfer.transport import SHOW_PROTOCOLS
from shared.wire.to_worker import KvTicket

PEER_TIMEOUT_S = 5.0
"""How long connecting and the exchange of Hello may take."""


class UcxContext:
    """UCX in this process: an async context manager, one at a time (ucxx keeps it in a module variable).

    Attributes:
        address: this process's UCX worker address.
        progress: its progress thread.
    """

    address: bytes
    progress: ProgressThread

    def __init__(self, net_devices: str = "lo") -> None:
        """`net_devices`: as UCX_NET_DEVICES, which stands above it where it is set: where UCX may listen."""
        self._net_devices = net_devices
        self._tags = count(1)

    async def __aenter__(self) -> Self:
        # Without futures completed by a thread, each waiting receive would spin a core.
        ucxx.init(
            options={"NET_DEVICES": self._net_devices, **SHOW_PROTOCOLS},
            env_takes_precedence=True,
            progress_mode="thread",
            enable_python_future=True,
        )
        self.progress = ProgressThread(_worker(), time.monotonic)
        self.address = ucxx.get_worker_address().tobytes()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.progress.stop()
        # The process would hang at its exit if the notifier thread still ran; waking it first saves it a second.
        _worker().stop_request_notifier_thread()
        await asyncio.to_thread(ucxx.stop_notifier_thread)
        ucxx.reset()

    def facts(self, device: torch.device) -> HostFacts:
        """What peers are told of this process, whose KV is on `device`; UCX reads the same environment."""
        return read_host_facts(device, os.environ, net_devices=self._net_devices)

    def new_tag(self) -> int:
        """A UCX tag that this process has not received under before, and that nobody can guess."""
        return secrets.randbits(32) << 32 | next(self._tags)


def _worker() -> Any:
    # ucxx offers no public way to its worker, whose progress thread it starts by itself with a fixed timeout.
    return ucxx.core._get_ctx().worker  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]


class UcxTransfer(Offering):
    """One worker's end; see `Transfer`. Several may share a context."""

    def __init__(
        self,
        context: UcxContext,
        staging: Staging,
        *,
        incarnation: Incarnation,
        clock: Clock,
        host: str = "127.0.0.1",
        port: int = 0,
        peer_timeout_s: float = PEER_TIMEOUT_S,
    ) -> None:
        """`context` has been entered. `port` 0 takes a free one. `host` is bound, and stands in tickets: peers must be
        able to reach it."""
        self._tasks = asyncio.TaskGroup()
        super().__init__(Offers(staging.cache, incarnation, clock, self._tasks))
        hello = Hello(
            protocol=PROTOCOL_VERSION,
            layout_fingerprint=staging.cache.layout.fingerprint,
            incarnation=incarnation,
            max_part_bytes=staging.max_part_bytes,
            ucx_address=context.address,
            host=context.facts(staging.cache.device),
        )
        self._cache = staging.cache
        self._host = host
        self._port = port
        self._lifetime = AsyncExitStack()
        progress = context.progress if staging.cache.device.type == "cuda" else None
        self._source = Source(
            hello, staging, self.offers, clock, progress, self._tasks, peer_timeout_s, secrets.token_bytes
        )
        self._puller = Puller(hello, staging, context.new_tag, clock, progress, self._tasks, peer_timeout_s)

    async def __aenter__(self) -> Self:
        # Left bottom up: no new peers, then no connections, then nothing is in flight and the offers can end.
        await self._lifetime.enter_async_context(self._tasks)
        self._lifetime.push_async_callback(self.offers.close)
        self._lifetime.push_async_callback(self._source.close)
        self._lifetime.push_async_callback(self._puller.close)
        server = await asyncio.start_server(self._source.accept, self._host, self._port)
        self._lifetime.callback(server.close)
        self._port = server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._lifetime.__aexit__(kind, error, traceback)

    @property
    def address(self) -> str:
        return f"{self._host}:{self._port}"

    async def pull(self, ticket: KvTicket, *, want: Sequence[int], into: Sequence[int], timeout_s: float) -> Pulled:
        check_pull(self._cache, ticket, want, into)
        return await self._puller.pull(ticket, want, into, timeout_s)

    async def fetch(
        self, address: str, source: Incarnation, keys: Sequence[BlockKey], into: Sequence[int], *, timeout_s: float
    ) -> Fetched:
        check_fetch(self._cache, keys, into)
        return await self._puller.fetch(Peer(address, source), keys, into, timeout_s)

    async def connect(self, address: str, incarnation: Incarnation) -> LinkReport:
        return await self._puller.connect(address, incarnation)

    def links(self) -> tuple[LinkReport, ...]:
        return self._puller.links()
