"""The store and its twin, as the behaviour suite sees them: connections, and time that passes."""

import asyncio
from contextlib import asynccontextmanager
from typing import Protocol

from shared.request import Incarnation, PlacementId, RequestId, WorkerRef
from shared.state.memory import MemoryState, MemoryStore
from shared.state.port import Placement, PlacementKey, Role, State, WorkerCard, WorkerLoad
from shared.state.redis import redis_state


class World(Protocol):
    """One store, empty at first.

    Attributes:
        lease_ms: long enough for the suite's calls, short enough to wait for its end.
    """

    lease_ms: int
    state: State

    async def pass_time(self, ms: int) -> None: ...

    async def flush(self) -> None:
        """The store loses its memory."""
        ...


class MemoryWorld:
    lease_ms = 2000

    def __init__(self):
        self.now_s = 1_700_000_000.0
        self.store = MemoryStore(clock=lambda: self.now_s)
        self.state = MemoryState(self.store)

    async def pass_time(self, ms):
        self.now_s += ms / 1000

    async def flush(self):
        self.store.flush()


class RedisWorld:
    # Waits are in real time here; a call takes less than a millisecond, on a busy machine some tens.
    lease_ms = 400

    def __init__(self, state):
        self.state = state

    async def pass_time(self, ms):
        await asyncio.sleep(ms / 1000)

    async def flush(self):
        await self.state._client.flushdb()


def own_database(redis_url: str) -> str:
    """Another database on the server that the run shares, so that no test of another suite meets ours."""
    return f"{redis_url.rsplit('/', 1)[0]}/9"


@asynccontextmanager
async def redis_world(redis_url: str):
    async with redis_state(own_database(redis_url)) as state:
        world = RedisWorld(state)
        await world.flush()
        yield world


def a_card(name: str, *, num_pages: int = 100, max_running: int = 8, role: Role = Role.DECODE) -> WorkerCard:
    return WorkerCard(
        incarnation=Incarnation(name),
        role=role,
        name=f"host/{name}",
        model="m",
        model_fingerprint="f",
        max_context=4096,
        num_pages=num_pages,
        max_running=max_running,
        max_batch_tokens=256,
        page_bytes=1024,
        num_host_pages=0,
        transfer_address="127.0.0.1:1",
        layout_fingerprint="l",
    )


def a_load(num_free_pages: int = 100, *, draining: bool = False, log_away: bool = False) -> WorkerLoad:
    return WorkerLoad(num_free_pages, num_running=1, num_waiting=2, draining=draining, log_away=log_away)


def a_key(name: str = "r", choice: int = 0, epoch: int = 1) -> PlacementKey:
    return PlacementKey(RequestId(name), choice, epoch)


def a_placement(name: str, prefill: WorkerRef, decode: WorkerRef) -> Placement:
    return Placement(PlacementId(name), prefill, decode)
