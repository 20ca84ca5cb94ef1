"""Letters of `dead-letter`, for operators: list them, look at one, hand its job in again."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from shared.bus.port import Bus, Record
from shared.bus.to_end import read_to_end
from shared.errors import BatonError
from shared.request import REQUEST_ID_PATTERN, RequestId, partition_of
from shared.wire.results import (
    HEADER_ERROR,
    HEADER_HISTORY,
    HEADER_SOURCE_BYTES,
    HEADER_SOURCE_OFFSET,
    HEADER_SOURCE_PARTITION,
    HEADER_SOURCE_TOPIC,
)
from shared.wire.to_ingest import HEADER_DEADLINE, HEADER_TENANT
from shared.wire.topics import DEAD_LETTER, INGEST

GROUP = "dead-letter"


class NotReplayed(BatonError):
    """The letter's job cannot be handed in again."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One letter.

    Attributes:
        written_s: unix seconds, by the broker's clock.
        num_source_bytes: of the original job; `body` is shorter where it did not fit.
        history: JSON of the workers that were lost with it, if any were.
    """

    request_id: RequestId
    written_s: float
    tenant: str
    error: str
    source: str
    num_source_bytes: int
    history: str
    body: bytes

    @property
    def is_whole(self) -> bool:
        return bool(self.body) and len(self.body) == self.num_source_bytes

    @property
    def summary(self) -> str:
        """One line, without the prompt."""
        written = datetime.fromtimestamp(self.written_s, UTC).isoformat(timespec="seconds")
        kept = "" if self.is_whole else f"{len(self.body)} of "
        return f"{written}  {self.request_id}  {self.tenant}  {kept}{self.num_source_bytes} bytes  {self.error}"

    @property
    def details(self) -> str:
        """Several lines, without the prompt."""
        lost = [f"lost: {self.history}"] if self.history else []
        return "\n".join([self.summary, f"from {self.source}", *lost])


def read_letter(record: Record) -> DeadLetter:
    """A record of `dead-letter`; what a stranger wrote there is shown as far as it can be read."""
    headers = {name: value.decode("utf-8", "replace") for name, value in record.headers}
    source = [headers.get(name, "?") for name in (HEADER_SOURCE_TOPIC, HEADER_SOURCE_PARTITION, HEADER_SOURCE_OFFSET)]
    num_bytes = headers.get(HEADER_SOURCE_BYTES, "")
    return DeadLetter(
        request_id=RequestId((record.key or b"").decode("utf-8", "replace")),
        written_s=record.timestamp_s,
        tenant=headers.get(HEADER_TENANT, ""),
        error=headers.get(HEADER_ERROR, ""),
        source=f"{source[0]}, partition {source[1]} offset {source[2]}",
        num_source_bytes=int(num_bytes) if num_bytes.isdecimal() else 0,
        history=headers.get(HEADER_HISTORY, ""),
        body=record.value,
    )


async def read_letters(bus: Bus) -> list[DeadLetter]:
    """All that are kept, the oldest first. Raises BusUnavailable."""
    letters: list[DeadLetter] = []
    async with bus.reader(DEAD_LETTER.name, group=GROUP) as reader:
        starts = dict.fromkeys(range(DEAD_LETTER.num_partitions), 0)
        await read_to_end(reader, starts, lambda record: letters.append(read_letter(record)))
    return sorted(letters, key=lambda letter: letter.written_s)


def find(letters: Iterable[DeadLetter], request_id: RequestId) -> DeadLetter:
    """The newest letter about the request. Raises NotReplayed if there is none."""
    found = [letter for letter in letters if letter.request_id == request_id]
    if not found:
        raise NotReplayed(f"no letter about {request_id}")
    return found[-1]


async def replay(bus: Bus, letter: DeadLetter, *, new_id: RequestId, deadline_s: float) -> None:
    """Hand the job in again: the same bytes for the same tenant, as another request with another deadline.

    Raises NotReplayed if the letter does not hold the whole job, or the id can be none.
    """
    if not REQUEST_ID_PATTERN.fullmatch(new_id):
        raise NotReplayed(f"a request id matches {REQUEST_ID_PATTERN.pattern}")
    if not letter.is_whole:
        raise NotReplayed(f"the letter has {len(letter.body)} of the job's {letter.num_source_bytes} bytes")
    headers = (
        (HEADER_DEADLINE, str(int(deadline_s * 1000)).encode()),
        *(((HEADER_TENANT, letter.tenant.encode()),) if letter.tenant else ()),
    )
    async with bus.producer() as producer:
        await producer.send(INGEST.name, partition_of(new_id), letter.body, key=new_id.encode(), headers=headers)
