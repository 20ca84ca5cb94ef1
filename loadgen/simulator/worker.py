"""What prefill and decode workers have in common: pages on the GPU and in host memory, wires, a line of prompts."""

from dataclasses import dataclass
from typing import Protocol

from loadgen.simulator.events import Agenda
from loadgen.simulator.hardware import Hardware, WorkerKind
from loadgen.simulator.job import Job
from loadgen.simulator.pages import Found, HostTier, PagePool, Watcher
from loadgen.simulator.prompts import Prompt, PromptQueue
from shared.blocks import PAGE_TOKENS
from shared.policy.profile import LinkRate
from shared.request import Incarnation, WorkerRef


class Told(Protocol):
    """Who hears what becomes of requests and of workers' caches."""

    def blocks_changed(self, holder: Incarnation, segment: int, num_pages: int, *, on_host: bool) -> None: ...
    def computed(self, job: Job) -> None: ...
    def first_token(self, job: Job) -> None: ...
    def pulled(self, job: Job) -> None: ...
    def finished(self, job: Job, at_s: float) -> None: ...


class Wire:
    """A link that serves one transfer after another."""

    def __init__(self, rate: LinkRate) -> None:
        self._rate = rate
        self._free_s = 0.0

    def send(self, now_s: float, num_bytes: int) -> float:
        """When bytes that are ready now have arrived."""
        if num_bytes <= 0:
            return now_s
        self._free_s = max(now_s, self._free_s) + num_bytes / self._rate.bytes_per_s
        return self._free_s + self._rate.latency_s


@dataclass(slots=True)
class Counts:
    """Of one worker.

    Attributes:
        busy_s: in steps.
        num_fetched_pages: from peers.
        num_loaded_pages: from host memory.
        num_poor_fetches: the peer had less than it was asked for, or there was no room to fetch into.
    """

    busy_s: float = 0.0
    num_fetched_pages: int = 0
    num_loaded_pages: int = 0
    num_poor_fetches: int = 0
    num_preemptions: int = 0
    num_local_prefills: int = 0


class _CacheWatcher(Watcher):
    def __init__(self, told: Told, holder: Incarnation, *, on_host: bool) -> None:
        self._told = told
        self._holder = holder
        self._on_host = on_host
        self.host: HostTier | None = None

    def held(self, segment: int, num_pages: int) -> None:
        self._told.blocks_changed(self._holder, segment, num_pages, on_host=self._on_host)

    def evicted(self, segment: int, first: int, end: int) -> None:
        if self.host is not None:
            self.host.store(segment, first, end)


class Worker:
    """Base of both roles."""

    def __init__(
        self, ref: WorkerRef, kind: WorkerKind, hardware: Hardware, agenda: Agenda, told: Told, lengths: tuple[int, ...]
    ) -> None:
        self.ref = ref
        self.kind = kind
        self.counts = Counts()
        self._hardware = hardware
        self._agenda = agenda
        self._told = told
        self._lengths = lengths
        self._num_seats_free = kind.max_running
        watcher = _CacheWatcher(told, ref.incarnation, on_host=False)
        self.pool = PagePool(kind.num_pages, lengths, watcher)
        if kind.num_host_pages:
            watcher.host = HostTier(kind.num_host_pages, _CacheWatcher(told, ref.incarnation, on_host=True))
        self.host = watcher.host
        self.queue = PromptQueue(self.pool, self._take_seat, self._admitted)
        self._peer_wire = Wire(hardware.peer_link)
        self._host_wire = Wire(hardware.host_link)

    @property
    def num_seats_free(self) -> int:
        return self._num_seats_free

    def _take_seat(self) -> bool:
        if not self._num_seats_free:
            return False
        self._num_seats_free -= 1
        return True

    def _admitted(self, prompt: Prompt) -> None:
        raise NotImplementedError

    def wake(self) -> None:
        """There may be something to do that was not there before."""
        raise NotImplementedError

    def take_prompt(self, prompt: Prompt, source: "Worker | None", num_source_pages: int) -> None:
        """Work has come: get what a peer or the host tier has of it, then let it stand in line."""
        found = self.pool.find(prompt.segments)
        if not self.queue.is_awaited(prompt, found) and (
            (source is not None and self._fetch(prompt, found, source, num_source_pages)) or self._load(prompt, found)
        ):
            return
        self.queue.line.append(prompt)
        self.wake()

    def _fetch(self, prompt: Prompt, found: Found, source: "Worker", num_wanted: int) -> bool:
        """Get pages from a peer; False if that is not possible: then it is computed."""
        there = source.pool.find(prompt.segments)
        num_pages = min(there.num_pages, num_wanted, prompt.num_findable)
        num_fetched = num_pages - found.num_pages
        if num_fetched <= 0 or not self.queue.try_acquire(prompt, found):
            self.counts.num_poor_fetches += 1
            return False
        self.counts.num_poor_fetches += num_pages < min(num_wanted, prompt.num_findable)
        self.counts.num_fetched_pages += num_fetched
        lent = source.pool.acquire(prompt.segments, there, 0)

        def arrived() -> None:
            source.pool.release(lent)
            source.wake()
            self._brought(prompt, num_pages)

        asked_s = self._agenda.now_s + self._hardware.peer_link.latency_s
        self._agenda.at(self._peer_wire.send(asked_s, num_fetched * self._hardware.page_bytes), arrived)
        return True

    def _load(self, prompt: Prompt, found: Found) -> bool:
        """Read pages back from host memory; False if there are none."""
        if self.host is None:
            return False
        num_pages = min(self._num_anywhere(prompt, found, self.host), prompt.num_findable)
        num_loaded = num_pages - found.num_pages
        if num_loaded <= 0 or not self.queue.try_acquire(prompt, found):
            return False
        self.counts.num_loaded_pages += num_loaded
        end_s = self._host_wire.send(self._agenda.now_s, num_loaded * self._hardware.page_bytes)
        self._agenda.at(end_s, self._brought, prompt, num_pages)
        return True

    def _num_anywhere(self, prompt: Prompt, found: Found, host: HostTier) -> int:
        """Pages of the run from the first on that are on the GPU or in host memory."""
        num_pages = 0
        for place, segment in enumerate(prompt.segments):
            here = self.pool.held(segment) if place < found.num_segments else 0
            first, end = host.run(segment)
            if first <= here < end:
                host.use(segment)
                here = end
            num_pages += here
            if here < self._lengths[segment]:
                break
        return num_pages

    def _brought(self, prompt: Prompt, num_pages: int) -> None:
        before = prompt.num_computed
        prompt.num_computed = max(before, num_pages * PAGE_TOKENS)
        prompt.job.num_fetched += prompt.num_computed - before
        self.queue.publish(prompt)
        self.queue.line.append(prompt)
        self.wake()
