"""What a new owner of `stream-out` partitions must know before it reads them: where to begin, and what is done."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shared.bus.port import Bus, Committed, Reader, Record
from shared.bus.to_end import read_to_end
from shared.request import RequestId, partition_of
from shared.wire.results import HEADER_STORY_OFFSET
from shared.wire.topics import RESULTS, STREAM_OUT

GROUP = "stream-out"
"""Names the edges' leases and commits."""


@dataclass(frozen=True, slots=True)
class Done:
    """A result that stands.

    Attributes:
        story_offset: of the request's first record on `stream-out`; None if the result does not tell.
    """

    results_offset: int
    story_offset: int | None


@dataclass(frozen=True, slots=True)
class TakeOver:
    """One partition as its owner before left it.

    Attributes:
        start: all below belongs to requests whose result stands.
        end_offset: of the partition, now.
        done: requests whose result stands, from the commit's note on.
        results_end: offset behind the results read.
    """

    partition: int
    start: int
    end_offset: int
    done: Mapping[RequestId, Done]
    results_end: int


async def prepare(bus: Bus, reader: Reader, partitions: Iterable[int]) -> list[TakeOver]:
    """Look up the commits through `reader` and read the tails of `results`. Raises BusUnavailable."""
    starts: dict[int, int] = {}
    notes: dict[int, int] = {}
    for partition in partitions:
        committed = await reader.committed(partition)
        starts[partition] = max(committed.offset if committed else 0, await reader.beginning_offset(partition))
        notes[partition] = _note_of(committed)
    done, results_ends = await _read_results(bus, notes)
    return [
        TakeOver(partition, start, await reader.end_offset(partition), done[partition], results_ends[partition])
        for partition, start in starts.items()
    ]


async def find_done(bus: Bus, request_id: RequestId) -> Done | None:
    """The result of a request that ended not long ago, whoever owns it. Raises BusUnavailable."""
    partition = partition_of(request_id)
    async with bus.reader(STREAM_OUT.name, group=GROUP) as reader:
        note = _note_of(await reader.committed(partition))
    done, _ = await _read_results(bus, {partition: note})
    return done[partition].get(request_id)


def _note_of(committed: Committed | None) -> int:
    return int(committed.note) if committed and committed.note else 0


async def _read_results(bus: Bus, starts: Mapping[int, int]) -> tuple[dict[int, dict[RequestId, Done]], dict[int, int]]:
    """The results from `starts` to the end, by partition and request; and the ends."""
    done: dict[int, dict[RequestId, Done]] = {partition: {} for partition in starts}

    def see(record: Record) -> None:
        if record.key is not None:
            request_id = RequestId(record.key.decode("utf-8", "replace"))
            done[record.partition].setdefault(request_id, Done(record.offset, _story_offset(record)))

    async with bus.reader(RESULTS.name, group=GROUP) as reader:
        return done, await read_to_end(reader, starts, see)


def _story_offset(record: Record) -> int | None:
    told = dict(record.headers).get(HEADER_STORY_OFFSET, b"")
    return int(told) if told.isdigit() else None
