"""A TCP proxy that stands between one process and one thing it depends on, and can be cut.

OPEN    bytes go through
RESET   connections were aborted, new ones are aborted at once
FROZEN  nothing goes through and nobody is told: what was sent meanwhile arrives at the end, as on a network that
        lost packets for a while
"""

import asyncio
from contextlib import suppress
from enum import StrEnum

HOST = "127.0.0.1"

ACCEPTING_S = 0.05
"""What was accepted just before the end becomes a connection within this, and is aborted: else its socket is left."""


class Path(StrEnum):
    OPEN = "open"
    RESET = "reset"
    FROZEN = "frozen"


class Proxy:
    """Carries connections from a port of its own to `target_port`; `path` says how it is."""

    def __init__(self, target_port):
        self.target_port = target_port
        self.path = Path.OPEN
        self.pairs = set()
        self.ends = set()
        self.tasks = set()
        self.port = 0
        self._thawed = asyncio.Event()
        self._thawed.set()

    async def open(self, port=0):
        """Listen on `port`, or on any free one."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _End(_Pair(self)), HOST, port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self):
        self._server.close()
        self.path = Path.RESET
        self._thawed.set()
        await asyncio.sleep(ACCEPTING_S)
        await asyncio.gather(*self.tasks)  # cancelled in the midst of connecting they would leave a socket
        for end in tuple(self.ends):
            end.transport.abort()
        while self.ends:
            await asyncio.sleep(0)

    def cut(self, path):
        """From now on as `path` says."""
        self.path = path
        if path is Path.FROZEN:
            self._thawed.clear()
        else:
            self._thawed.set()
        for pair in tuple(self.pairs):
            if path is Path.RESET:
                pair.abort()
            else:
                pair.settle()

    def restore(self):
        self.cut(Path.OPEN)

    async def thawed(self):
        await self._thawed.wait()


class _Pair:
    """The two ends of one connection: what comes in at one goes out at the other."""

    def __init__(self, proxy):
        self.proxy = proxy
        self.ends = []

    def joined(self, end):
        proxy = self.proxy
        proxy.ends.add(end)
        self.ends.append(end)
        if proxy.path is Path.RESET or self.ends[0].transport.is_closing():
            self.abort()
        elif len(self.ends) == 1:
            proxy.pairs.add(self)
            task = asyncio.ensure_future(self._connect())
            proxy.tasks.add(task)
            task.add_done_callback(proxy.tasks.discard)
        else:
            for data in self.ends[0].early:
                end.transport.write(data)
            self.settle()

    async def _connect(self):
        await self.proxy.thawed()
        try:
            await asyncio.get_running_loop().create_connection(lambda: _End(self), HOST, self.proxy.target_port)
        except OSError:
            self.abort()

    def other(self, end):
        return next((each for each in self.ends if each is not end), None)

    def settle(self):
        """Each end is read from while the path is open and the other end takes what comes."""
        if len(self.ends) < 2:
            return
        for end in self.ends:
            if self.proxy.path is Path.OPEN and not self.other(end).is_full:
                end.transport.resume_reading()
            else:
                end.transport.pause_reading()

    def lost(self, end):
        """One end is gone: what stands in the other's buffer still goes out."""
        self.proxy.pairs.discard(self)
        self.proxy.ends.discard(end)
        other = self.other(end)
        if other is not None:
            other.transport.close()

    def abort(self):
        self.proxy.pairs.discard(self)
        for end in self.ends:
            end.transport.abort()


class _End(asyncio.Protocol):
    """One end; `early` came before there was another."""

    def __init__(self, pair):
        self._pair = pair
        self._out = None
        self.early = []
        self.transport = None
        self.is_full = False

    def connection_made(self, transport):
        self.transport = transport
        self._pair.joined(self)

    def data_received(self, data):
        if self._out is None:
            other = self._pair.other(self)
            if other is None:  # not connected yet
                self.early.append(data)
                return
            self._out = other.transport
        self._out.write(data)

    def pause_writing(self):
        self.is_full = True
        self._pair.settle()

    def resume_writing(self):
        self.is_full = False
        self._pair.settle()

    def connection_lost(self, _):
        self._pair.lost(self)


class Paths:
    """All proxies between one process and one thing it depends on: one for each broker, say."""

    def __init__(self, proxies):
        self.proxies = proxies

    def cut(self, path):
        for proxy in self.proxies:
            proxy.cut(path)

    def restore(self):
        for proxy in self.proxies:
            proxy.restore()

    async def close(self):
        for proxy in self.proxies:
            with suppress(OSError):
                await proxy.close()
