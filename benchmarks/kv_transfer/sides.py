"""The source and the puller of a measurement: whose pages travel, and what each is asked to do."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from shared.kv.paged_cache import PagedCache
from shared.request import Incarnation
from shared.transfer.port import Transfer
from shared.wire.codec import encode
from shared.wire.to_worker import KvTicket

SECRET = bytes(16)
SEED = 1
OTHER_SEEDS = 10**6
TIMEOUT_S = 120.0

TICKETS = TypeAdapter(list[KvTicket])


def shuffled(pages: Sequence[int], seed: int) -> list[int]:
    """The pages in a random order; of so many as they are, both processes make the same."""
    return [pages[index] for index in np.random.default_rng(seed).permutation(len(pages)).tolist()]


class Pages:
    """The pages of one process that may travel."""

    def __init__(self, cache: PagedCache, pages: Sequence[int]) -> None:
        self.cache = cache
        self.pages = pages

    def fill(self) -> None:
        """With random contents, in each process the same."""
        self.cache.pages.copy_(self.wanted())

    def wanted(self) -> torch.Tensor:
        generator = torch.Generator(self.cache.device).manual_seed(SEED)
        return torch.empty_like(self.cache.pages).normal_(generator=generator)

    def settle(self) -> None:
        """Copies of a transfer run on a stream of their own."""
        if self.cache.device.type == "cuda":
            torch.cuda.synchronize()


class Source:
    """What the source is asked to do."""

    def __init__(self, pages: Pages, transfer: Transfer) -> None:
        self._pages = pages
        self._transfer = transfer
        self._num_offers = 0

    async def offer(self, *, num_pages: int, seeds: Sequence[int]) -> list[Any]:
        """Tickets for the first `num_pages` of all pages as shuffled by each seed."""
        return [json.loads(encode(self._ticket(shuffled(self._pages.pages, seed)[:num_pages]))) for seed in seeds]

    def _ticket(self, pages: Sequence[int]) -> KvTicket:
        self._num_offers += 1
        return self._transfer.offer(
            f"{self._num_offers}",
            pages,
            num_tokens=64 * len(pages),
            secret=SECRET,
            puller=Incarnation("puller"),
            hold_s=TIMEOUT_S,
            on_end=lambda _: None,
        )

    async def withdraw(self) -> int:
        """Take back what nobody pulled; answers how much that was."""
        number = self._transfer.num_offers
        for key in range(1, self._num_offers + 1):
            self._transfer.withdraw(f"{key}")
        return number

    async def where(self) -> str:
        return self._transfer.address


class Puller:
    """What the puller is asked to do."""

    def __init__(self, pages: Pages, transfer: Transfer) -> None:
        self._pages = pages
        self._transfer = transfer
        self._wanted: torch.Tensor | None = None
        self._streaming: asyncio.Task[dict[str, float]] | None = None
        self._stop_streaming = asyncio.Event()

    async def connect(self, *, address: str) -> dict[str, Any]:
        began_s = time.perf_counter()
        report = await self._transfer.connect(address, Incarnation("source"))
        return asdict(report) | {"took_ms": 1e3 * (time.perf_counter() - began_s)}

    async def pull(self, *, tickets: list[Any], pause_s: float = 0.0) -> list[tuple[float, float]]:
        """One after another; when each began and ended, by the machine's monotonic clock."""
        spans: list[tuple[float, float]] = []
        for seed, ticket in enumerate(TICKETS.validate_python(tickets)):
            spans.append(await self._pull(ticket, seed))
            await asyncio.sleep(pause_s)
        return spans

    async def pull_and_compare(self, *, tickets: list[Any], seeds: Sequence[int]) -> bool:
        """One after another, into pages that were emptied; whether all came as they were sent."""
        if self._wanted is None:
            self._wanted = self._pages.wanted()
        equal = True
        for ticket, seed in zip(TICKETS.validate_python(tickets), seeds, strict=True):
            self._pages.cache.pages.zero_()
            self._pages.settle()
            await self._pull(ticket, seed)
            sent = shuffled(self._pages.pages, seed)[: ticket.num_tokens // 64]
            for source, page in zip(sent, self._into(ticket, seed), strict=True):
                equal = equal and torch.equal(self._pages.cache.pages[page], self._wanted[source])
        return equal

    async def pull_together(self, *, tickets: list[Any], at_once: int) -> list[float]:
        """Milliseconds until all of each `at_once` pulls are done, into pages apart."""
        parsed = TICKETS.validate_python(tickets)
        times_ms: list[float] = []
        for first in range(0, len(parsed), at_once):
            group = parsed[first : first + at_once]
            pages = shuffled(self._pages.pages, first)
            shares = [pages[index :: len(group)] for index in range(len(group))]
            began_s = time.perf_counter()
            await asyncio.gather(*(self._pull_into(ticket, share) for ticket, share in zip(group, shares, strict=True)))
            times_ms.append(1e3 * (time.perf_counter() - began_s))
        return times_ms

    async def start_stream(self, *, tickets: list[Any], gb_per_s: float | None, at_once: int) -> None:
        """Pull one ticket after another in the background, `at_once` at a time, at a rate or as fast as it goes."""
        self._stop_streaming.clear()
        parsed = TICKETS.validate_python(tickets)
        self._streaming = asyncio.create_task(self._stream(parsed, gb_per_s, at_once))

    async def stop_stream(self) -> dict[str, float]:
        """How much came, and how fast. Raises what a pull raised."""
        assert self._streaming is not None
        self._stop_streaming.set()
        return await self._streaming

    async def _stream(self, tickets: list[KvTicket], gb_per_s: float | None, at_once: int) -> dict[str, float]:
        num_bytes = self._pages.cache.layout.page_bytes * (tickets[0].num_tokens // 64)
        pause_s = 0.0 if gb_per_s is None else num_bytes / (gb_per_s * 1e9)
        following = enumerate(tickets)
        began_s = time.perf_counter()
        done: list[float] = []

        async def lane() -> None:
            for index, ticket in following:
                if self._stop_streaming.is_set():
                    return
                if (early_s := began_s + index * pause_s - time.perf_counter()) > 0:
                    await asyncio.sleep(early_s)
                started_s, ended_s = await self._pull(ticket, index)
                done.append(ended_s - started_s)

        await asyncio.gather(*(lane() for _ in range(at_once)))
        ran_out = next(following, None) is None
        took_s = time.perf_counter() - began_s
        return {"gb_per_s": len(done) * num_bytes / took_s / 1e9, "num_pulls": len(done), "ran_out": ran_out}

    async def _pull(self, ticket: KvTicket, seed: int) -> tuple[float, float]:
        into = self._into(ticket, seed)
        began_s = time.perf_counter()
        await self._pull_into(ticket, into)
        return began_s, time.perf_counter()

    async def _pull_into(self, ticket: KvTicket, into: Sequence[int]) -> None:
        num_pages = ticket.num_tokens // 64
        await self._transfer.pull(ticket, want=range(num_pages), into=into[:num_pages], timeout_s=TIMEOUT_S)

    def _into(self, ticket: KvTicket, seed: int) -> list[int]:
        """Not the order in which the source has them."""
        return shuffled(self._pages.pages, OTHER_SEEDS + seed)[: ticket.num_tokens // 64]
