"""What a role is to the host that runs it, and what the host gives it."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.bus.port import Producer
from shared.observe.log import Logger
from shared.observe.metrics import WorkerMetrics
from shared.policy.profile import SpeedProfile
from shared.request import Incarnation, PlacementId, WorkerRef
from shared.text.tokeniser import Tokeniser
from shared.transfer.port import Transfer
from shared.wire.to_worker import Assignment, ToDecode, ToPrefill
from shared.worker.credits import Credits
from shared.worker.engine_thread import EngineThread, Step
from shared.worker.frames import FrameWriter

NUM_REMEMBERED = 16_384
"""Placements remembered as seen or stopped: records may come twice, and a stop before the work that it stops."""


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """The parts of a worker that its role works with.

    Attributes:
        me: slot and incarnation of this worker.
        clock_s: unix seconds.
        random_bytes: that many random bytes, for secrets.
        page_bytes: bytes of one KV page.
        tasks: a failure in any of them ends the worker.
        handoff: producer for records to other workers.
        is_gone: whether a worker that was there at a time (unix seconds) has ended, for all that is known here; it does
            not come back.
        profile: how fast this worker computes; None before it has measured that.
    """

    me: WorkerRef
    engine: EngineThread
    transfer: Transfer
    page_bytes: int
    frames: FrameWriter
    handoff: Producer
    credits: Credits
    tokeniser: Tokeniser
    metrics: WorkerMetrics
    log: Logger
    clock_s: Callable[[], float]
    random_bytes: Callable[[int], bytes]
    is_gone: Callable[[Incarnation, float], bool]
    tasks: asyncio.TaskGroup
    profile: Callable[[], SpeedProfile | None]


class Role(Protocol):
    """Prefill or decode: decides what this worker does with a record and with a step's tokens."""

    def take(self, message: ToPrefill | ToDecode) -> None:
        """A record for this incarnation has arrived. Does not wait."""
        ...

    async def handle(self, step: Step) -> None:
        """A step has run."""
        ...

    def unfinished(self) -> Sequence[Assignment]:
        """What it has taken and not ended or handed on."""
        ...


class Remembered:
    """The placements seen lately; the oldest are forgotten first."""

    def __init__(self, capacity: int = NUM_REMEMBERED) -> None:
        self._capacity = capacity
        self._seen: OrderedDict[PlacementId, None] = OrderedDict()

    def add(self, placement: PlacementId) -> bool:
        """Remember it; False if it was remembered already."""
        if placement in self._seen:
            return False
        self._seen[placement] = None
        if len(self._seen) > self._capacity:
            self._seen.popitem(last=False)
        return True
