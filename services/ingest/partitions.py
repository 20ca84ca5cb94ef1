"""The partitions of one topic group that this process leases: where reading begins, and what may be committed."""

from collections.abc import Callable
from dataclasses import dataclass

from services.ingest.low_water import LowWater, read_commit
from services.ingest.work import InHand
from shared.bus.port import BusUnavailable, Committed, Reader, Record, Start
from shared.observe.log import Logger
from shared.request import NUM_REQUEST_PARTITIONS, Incarnation
from shared.state import keys
from shared.state.port import State, StateUnavailable
from shared.wire.to_ingest import LogPosition

GROUP = "ingest"

CLOCKS_DIFFER_S = 30.0
"""By less than this, ours and the log's."""


@dataclass(frozen=True, slots=True)
class _Taken:
    """When a partition of a topic was taken, and since when others may have dealt with what was read or named then."""

    at_s: float
    since_s: float


class Partitions:
    """The same partitions of several topics, owned together.

    Args:
        readers: by topic.
        on_lost: told which partitions are another's now.
        clock_s: unix seconds.
    """

    def __init__(
        self,
        state: State,
        member: Incarnation,
        readers: dict[str, Reader],
        on_lost: Callable[[frozenset[int]], None],
        log: Logger,
        clock_s: Callable[[], float],
    ) -> None:
        self._state = state
        self._member = member
        self._readers = readers
        self._on_lost = on_lost
        self._log = log
        self._clock_s = clock_s
        self._low_water: dict[tuple[str, int], LowWater] = {}
        self._committed: dict[tuple[str, int], Committed] = {}
        self._taken: dict[tuple[str, int], _Taken] = {}
        self._left: list[InHand] = []
        self.owned: frozenset[int] = frozenset()

    async def renew(self) -> None:
        """Renew the leases, and begin to read what was gained."""
        try:
            owned = await self._state.lease_partitions(
                GROUP, self._member, num_partitions=NUM_REQUEST_PARTITIONS, lease_ms=keys.LEASE_MS
            )
        except StateUnavailable as error:
            self._log.warning("partition leases not renewed", error=str(error))
            return
        if owned == self.owned:
            return
        try:
            await self._take(owned)
        except BusUnavailable as error:
            self._log.warning("partitions not taken", error=str(error))

    async def leave(self) -> None:
        """Commit what is dealt with, and free the partitions for others."""
        await self.commit()
        try:
            await self._state.leave_group(GROUP, self._member)
        except StateUnavailable as error:
            self._log.warning("leases left to run out", error=str(error))

    def begin(self, record: Record) -> InHand | None:
        """Take a record in hand; None: its partition is no longer ours."""
        if record.partition not in self.owned:
            return None
        low_water = self._low_water[record.topic, record.partition]
        low_water.begin(record.offset, self._clock_s(), self.others_had_since_s(record))
        return InHand(record.topic, LogPosition(record.partition, record.offset), len(record.value))

    def take_left(self) -> list[InHand]:
        """Records that whoever had the partitions before did not deal with, and that will not be read: once."""
        left, self._left = self._left, []
        return left

    def others_had_since_s(self, record: Record) -> float | None:
        """Since when others may have dealt with the record; None: nobody had it before."""
        taken = self._taken[record.topic, record.partition]
        if record.timestamp_s > taken.at_s + CLOCKS_DIFFER_S:
            return None
        return max(record.timestamp_s, taken.since_s - CLOCKS_DIFFER_S)

    def end(self, in_hand: InHand) -> None:
        """The record is dealt with."""
        self._low_water[in_hand.topic, in_hand.position.partition].end(in_hand.position.offset)

    async def num_unread(self, topic: str) -> int:
        """Records of the topic that stand behind those in hand. Raises BusUnavailable."""
        reader = self._readers[topic]
        ends = {partition: await reader.end_offset(partition) for partition in self.owned}
        return sum(max(0, end - self._low_water[topic, p].position) for p, end in ends.items() if p in self.owned)

    async def commit(self) -> None:
        """Commit for each partition that all below an offset is dealt with, where that changed."""
        for topic, reader in self._readers.items():
            now_s = self._clock_s()
            statements = {partition: self._low_water[topic, partition].statement(now_s) for partition in self.owned}
            due = {
                partition: statement
                for partition, statement in statements.items()
                if self._committed.get((topic, partition)) != statement
            }
            if not due:
                continue
            try:
                await reader.commit(due)
            except BusUnavailable as error:
                self._log.warning("not committed; a successor would read more again", error=str(error))
            else:
                self._committed |= {(topic, partition): statement for partition, statement in due.items()}

    async def _take(self, owned: frozenset[int]) -> None:
        gained, lost = owned - self.owned, self.owned - owned
        if lost:
            # What is lost is let go of first, so that what comes back later begins at its commit again.
            self.owned &= owned
            self._left = [in_hand for in_hand in self._left if in_hand.position.partition not in lost]
            self._on_lost(lost)
            await self._assign({})
        starts: dict[tuple[str, int], int | Start] = {}
        all_left: list[InHand] = []
        for topic, reader in self._readers.items():
            for partition in gained:
                committed = await reader.committed(partition)
                left = read_commit(committed)
                starts[topic, partition] = Start.BEGINNING if committed is None else left.begins
                self._committed[topic, partition] = committed or Committed(0)
                self._low_water[topic, partition] = LowWater(left)
                self._taken[topic, partition] = _Taken(self._clock_s(), left.since_s)
                all_left.extend(InHand(topic, LogPosition(partition, offset)) for offset in left.named)
        # Owned before it is read: a record of a partition that is not owned is passed over.
        self.owned = owned
        self._left.extend(all_left)
        await self._assign(starts)
        self._log.info("partitions", owned=sorted(owned))

    async def _assign(self, starts: dict[tuple[str, int], int | Start]) -> None:
        """Read what is owned, new partitions from `starts` on."""
        for topic, reader in self._readers.items():
            await reader.assign({p: starts.get((topic, p), Start.BEGINNING) for p in self.owned})
