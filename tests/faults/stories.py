"""Requests as `stream-out` tells them, by the fold: who made which tokens, what was lost, when it ended."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from shared.blocks import TokenIds
from shared.bus.port import Record
from shared.policy.fold import Change, Ended, Finished, Grew, PartitionFold, RequestState, Vacated, Voided
from shared.request import Incarnation, PlacementId, RequestId
from shared.wire.codec import UndecodableMessage
from shared.wire.to_stream_out import STREAM_OUT_DECODER, Cut, Frame, FrameEntry, Open, StreamOutMessage

NEVER_S = float("inf")


@dataclass(slots=True)
class Placed:
    """A placement that counted.

    Attributes:
        until_s: when it was closed or the choice ended.
        prefill_until_s: when its decode worker had taken over.
        was_cut: it was closed while the choice went on.
        lost: the worker for whose loss it was closed.
    """

    open: Open
    from_s: float
    prefill_until_s: float = NEVER_S
    until_s: float = NEVER_S
    was_cut: bool = False
    lost: str = ""

    def needed(self, incarnation: str, at_s: float) -> bool:
        """Whether the choice could not go on without the worker then."""
        if not self.from_s <= at_s < self.until_s:
            return False
        if self.open.decode.incarnation == incarnation:
            return True
        return self.open.prefill.incarnation == incarnation and at_s < self.prefill_until_s


@dataclass(slots=True)
class Growth:
    """Tokens that one record added to a choice."""

    at_s: float
    placement: PlacementId
    index: int
    ids: TokenIds


@dataclass(slots=True)
class ChoiceStory:
    """One choice.

    Attributes:
        losses: workers lost in a row, without an accepted token since.
    """

    placed: list[Placed] = field(default_factory=list)
    grown: list[Growth] = field(default_factory=list)
    losses: list[Incarnation] = field(default_factory=list)


@dataclass(slots=True)
class Story:
    """One request as `stream-out` tells it.

    Attributes:
        changes: (offset, changes) of each record that changed something.
        ending: the cut that ended it, and when, if one did.
        finished_s: when its last choice ended.
    """

    state: RequestState
    choices: dict[int, ChoiceStory] = field(default_factory=lambda: defaultdict(ChoiceStory))
    changes: list[tuple[int, list[Change]]] = field(default_factory=list)
    ending: tuple[Cut, float] | None = None
    finished_s: float | None = None


def read_stories(records: Sequence[Record]) -> tuple[dict[RequestId, Story], list[str]]:
    """Every request that `stream-out` tells of, by id; and what of it nobody can read."""
    reader = _StoryReader()
    for record in records:
        reader.read(record)
    return reader.stories, reader.unreadable


class _StoryReader:
    def __init__(self) -> None:
        self.stories: dict[RequestId, Story] = {}
        self.unreadable: list[str] = []
        self._folds: dict[int, PartitionFold] = defaultdict(PartitionFold)
        self._decode_heard_s: dict[PlacementId, float] = {}
        """Of placements whose decode worker was heard before their `open` counted."""

    def read(self, record: Record) -> None:
        """Take the next record of its partition."""
        try:
            message = STREAM_OUT_DECODER.decode(record.value)
        except UndecodableMessage as error:
            self.unreadable.append(f"stream-out {record.partition}:{record.offset} cannot be read: {error}")
            return
        fold = self._folds[record.partition]
        applied = fold.apply(record.offset, record.timestamp_s, message)
        changes = [change for change in applied if not isinstance(change, Voided)]
        for request_id in _request_ids(message):
            state = fold.requests[request_id]
            story = self.stories.setdefault(request_id, Story(state))
            self._tell(story, record, message, [change for change in changes if change.state is state])

    def _tell(self, story: Story, record: Record, message: StreamOutMessage, changes: list[Change]) -> None:
        """Take what a record changed of one request."""
        now_s = record.timestamp_s
        if changes:
            story.changes.append((record.offset, changes))
        match message:
            case Open():
                self._open(story, message, now_s)
            case Frame():
                for entry in message.entries:
                    if entry.request_id == story.state.request_id:
                        self._hear(story, entry, message, now_s)
            case _:
                pass
        for change in changes:
            _change(story, change, now_s)
        if isinstance(message, Cut) and any(isinstance(change, Vacated | Ended) for change in changes):
            _cut(story, message, now_s)

    def _open(self, story: Story, message: Open, now_s: float) -> None:
        if not story.state.wants(message.choice) or story.state.choice(message.choice).placement != message:
            return
        placed = story.choices[message.choice].placed
        if not placed or placed[-1].open.placement != message.placement:
            placed.append(Placed(message, now_s, self._decode_heard_s.get(message.placement, NEVER_S)))

    def _hear(self, story: Story, entry: FrameEntry, frame: Frame, now_s: float) -> None:
        """Note when a placement's decode worker was first heard of."""
        placed = story.choices[entry.choice].placed if story.state.wants(entry.choice) else []
        if placed and placed[-1].open.placement == entry.placement:
            if frame.worker == placed[-1].open.decode:
                placed[-1].prefill_until_s = min(now_s, placed[-1].prefill_until_s)
        elif entry.num_cached_tokens is None:  # a prefill worker says that with its one entry
            self._decode_heard_s.setdefault(entry.placement, now_s)


def _request_ids(message: StreamOutMessage) -> Iterator[RequestId]:
    if isinstance(message, Frame):
        yield from dict.fromkeys(entry.request_id for entry in message.entries)
    else:
        yield message.request_id


def _cut(story: Story, message: Cut, now_s: float) -> None:
    """A cut that counted."""
    choice = story.choices[message.choice]
    if message.lost is not None:
        choice.losses.append(message.lost.incarnation)
        if choice.placed and choice.placed[-1].until_s == now_s:
            choice.placed[-1].lost = message.lost.incarnation
    if message.outcome is not None:
        story.ending = message, now_s


def _change(story: Story, change: Change, now_s: float) -> None:
    match change:
        case Grew(_, index, first, ids):
            choice = story.choices[index]
            choice.grown.append(Growth(now_s, choice.placed[-1].open.placement, first, ids))
            choice.losses.clear()
        case Vacated(_, index) | Ended(_, index):
            _close(story.choices[index], now_s, was_cut=isinstance(change, Vacated))
        case Finished():
            story.finished_s = now_s
        case _:
            pass


def _close(choice: ChoiceStory, now_s: float, *, was_cut: bool) -> None:
    if choice.placed and choice.placed[-1].until_s == NEVER_S:
        choice.placed[-1].until_s = now_s
        choice.placed[-1].was_cut = was_cut
