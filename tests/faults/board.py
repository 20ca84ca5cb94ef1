"""Where the hand-overs of one worker stand, in memory that the test reads at any moment, also when the worker is dead;
and the points at which it stands still to be struck."""

import asyncio
import mmap
from collections.abc import Callable
from enum import IntEnum, auto
from pathlib import Path

from shared.transfer.control import Confirm, GiveUp, Part, Pull, Ready, Refused, Released
from shared.transfer.link import Link
from shared.transfer.serving import Serving

NUM_SLOTS = 16
"""Hand-overs of one trial."""


class Phase(IntEnum):
    """Of one hand-over at one worker; what it did last."""

    NOTHING = 0
    # at the source
    WAITING = auto()
    OFFERED = auto()
    LET_IN = auto()
    ANNOUNCED = auto()
    SENDING = auto()
    SENT = auto()
    CONFIRMED = auto()
    RELEASED = auto()
    ENDED = auto()
    # at the puller
    ASKED = auto()
    RECEIVING = auto()
    ARRIVED = auto()
    CONFIRMING = auto()
    PULLED = auto()
    FAILED = auto()
    # at the source, in a row of its own: what is computed
    FIRST_CHUNK = auto()
    LATER_CHUNK = auto()
    COMPUTED = auto()


COMPUTE_PHASES = (Phase.FIRST_CHUNK, Phase.LATER_CHUNK, Phase.COMPUTED)


def slot_of(key: str) -> int:
    """Keys end in ".<number>"."""
    return int(key.rpartition(".")[2])


class Board:
    """Two bytes a hand-over: its transfer and its computing."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._bytes = mmap.mmap(file.fileno(), 2 * NUM_SLOTS)

    @classmethod
    def create(cls, path: Path) -> "Board":
        path.write_bytes(bytes(2 * NUM_SLOTS))
        return cls(path)

    def clear(self) -> None:
        self._bytes[:] = bytes(2 * NUM_SLOTS)

    def write(self, slot: int, phase: Phase) -> None:
        self._bytes[2 * slot + (phase in COMPUTE_PHASES)] = phase

    def transfer(self, slot: int) -> Phase:
        return Phase(self._bytes[2 * slot])

    def computing(self, slot: int) -> Phase:
        return Phase(self._bytes[2 * slot + 1])


class Points:
    """Writes each phase to the board; at the one that is armed, calls `stand_still` with the hand-over's slot."""

    def __init__(self, board: Board, stand_still: Callable[[int], None]) -> None:
        self._board = board
        self._stand_still = stand_still
        self._armed: Phase | None = None
        self._num_to_pass = 0

    def arm(self, phase: Phase | None, num_to_pass: int) -> None:
        """Stand still when a hand-over is in `phase`, after so many that were in it before."""
        self._armed, self._num_to_pass = phase, num_to_pass

    def reached(self, key: str, phase: Phase) -> None:
        slot = slot_of(key)
        self._board.write(slot, phase)
        if phase is self._armed:
            if self._num_to_pass == 0:
                self._armed = None
                self._stand_still(slot)
            else:
                self._num_to_pass -= 1


def watch_links(points: Points) -> None:
    """From now on all links and servings of this process tell `points` what they do."""
    _watch_messages(points)
    _watch_bytes(points)


def _keys(link: Link) -> dict[int, str]:
    """Of the pulls on a link, by number."""
    return link.__dict__.setdefault("keys", {})


def _tags(link: Link) -> dict[int, str]:
    return link.__dict__.setdefault("tags", {})


def _watch_messages(points: Points) -> None:
    post, begin, ready = Link.post, Serving.begin, Serving.ready
    before = {Confirm: Phase.ARRIVED, Released: Phase.CONFIRMED}
    after = {
        Pull: Phase.ASKED,
        Part: Phase.ANNOUNCED,
        Confirm: Phase.CONFIRMING,
        Released: Phase.RELEASED,
        Refused: Phase.FAILED,
        GiveUp: Phase.FAILED,
    }

    def watched_post(link, message):
        if isinstance(message, Pull):
            _keys(link)[message.pull] = message.key
        key = _keys(link).get(getattr(message, "pull", -1))
        if key is None:  # a greeting, or of a probe
            post(link, message)
            return
        if isinstance(message, Ready):
            _tags(link)[message.tag] = key
        if type(message) in before:
            points.reached(key, before[type(message)])
        post(link, message)
        if type(message) in after:
            points.reached(key, after[type(message)])

    def watched_begin(serving):
        begin(serving)
        _keys(serving._link)[serving._number] = serving.offer.key
        points.reached(serving.offer.key, Phase.LET_IN)

    def watched_ready(serving, message):
        _tags(serving._link)[message.tag] = serving.offer.key
        return ready(serving, message)

    Link.post, Serving.begin, Serving.ready = watched_post, watched_begin, watched_ready


def _watch_bytes(points: Points) -> None:
    send, receive = Link.send, Link.receive

    def watched(move, during, after):
        async def watched_move(link, tag, part):
            key = _tags(link).pop(tag, None)
            if key is None:
                return await move(link, tag, part)
            under_way = asyncio.get_running_loop().call_soon(points.reached, key, during)  # when UCX has begun
            try:
                return await move(link, tag, part)
            finally:
                under_way.cancel()
                if after is not None:
                    points.reached(key, after)

        return watched_move

    Link.send = watched(send, Phase.SENDING, Phase.SENT)
    Link.receive = watched(receive, Phase.RECEIVING, None)
