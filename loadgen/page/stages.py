"""Where the time of requests went: stage by stage, over all of them and for the slowest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import ceil
from statistics import fmean

from loadgen.measure import Record, Stage, percentile, stages_of
from shared.request import Event

NUM_SLOWEST = 5
SLOWEST_SHARE = 0.1
SKEW_S = 0.001
"""Stamps that run backwards by more than this show that clocks differ."""

INTENDED = "intended"
FIRST_PIECE = "first piece"


class StageKind(StrEnum):
    """What a request waits for; kinds have colours."""

    LATE = "late"
    HOP = "hop"
    QUEUE = "queue"
    PREFILL = "prefill"
    HANDING_ON = "handing-on"
    TRANSFER = "transfer"
    DECODE = "decode"
    UNKNOWN_WAIT = "unknown-wait"
    UNKNOWN_STREAM = "unknown-stream"


KINDS: dict[str, tuple[StageKind, str]] = {
    INTENDED: (StageKind.LATE, "this client sent late"),
    "sent": (StageKind.HOP, "on its way into the log"),
    Event.ACCEPTED: (StageKind.HOP, "waits for ingest, is checked and tokenised"),
    Event.ADMITTED: (StageKind.HOP, "waits for room, is placed on workers"),
    Event.PLACED: (StageKind.QUEUE, "waits for the prefill worker"),
    Event.PREFILLING: (StageKind.PREFILL, "its prompt is computed"),
    Event.FIRST_TOKEN: (StageKind.HANDING_ON, "its first token goes to the decode worker"),
    Event.TRANSFERRING: (StageKind.TRANSFER, "what is left of its KV arrives, it joins a batch"),
    Event.DECODING: (StageKind.DECODE, "its tokens are made"),
    Event.FINISHED: (StageKind.HOP, "on its way back to the client"),
    FIRST_PIECE: (StageKind.UNKNOWN_STREAM, "its tokens come"),
}
"""By the event that a stage begins with: its kind and what happens in it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One stage of one request, in seconds after its intended time."""

    name: str
    kind: StageKind
    meaning: str
    from_s: float
    to_s: float


@dataclass(frozen=True, slots=True)
class Life:
    """One request from its intended time; `total_s` is what it is ranked by."""

    record: Record
    is_median: bool
    segments: tuple[Segment, ...]
    total_s: float


@dataclass(frozen=True, slots=True)
class Waterfall:
    """The slowest requests by one quantity, slowest first, and the median one before them."""

    lives: tuple[Life, ...]


@dataclass(frozen=True, slots=True)
class StageShare:
    """One stage over all completed requests.

    Attributes:
        share: of the time of all of them, from intended time to last token.
        share_of_slowest: the same over the slowest by E2E.
    """

    name: str
    kind: StageKind
    meaning: str
    count: int
    mean_s: float
    p50_s: float
    p99_s: float
    share: float
    share_of_slowest: float


@dataclass(frozen=True, slots=True)
class Stages:
    """Everything about stages.

    Attributes:
        num_slowest: how many requests are the slowest tenth; one at least, if there is any.
        has_stamps: the server told when its events were; without that only the client's own moments are known.
        skewed: stages whose stamps ran backwards, over all requests.
    """

    by_ttft: Waterfall
    by_e2el: Waterfall
    shares: tuple[StageShare, ...]
    num_slowest: int
    has_stamps: bool
    skewed: int


def stages_page_of(records: Sequence[Record], started_unix_s: float) -> Stages:
    """Of the completed requests."""
    done = [record for record in records if record.completed]
    lives = [_whole_life(record, started_unix_s) for record in done]
    num_slowest = ceil(len(done) * SLOWEST_SHARE)
    return Stages(
        by_ttft=_waterfall(done, started_unix_s, lambda record: record.ttft_s, _until_first_piece),
        by_e2el=_waterfall(done, started_unix_s, lambda record: record.e2el_s, _whole_life),
        shares=_shares(done, lives, num_slowest),
        num_slowest=num_slowest,
        has_stamps=any(record.stamps for record in done),
        skewed=sum(stage.took_s < -SKEW_S for stages in lives for stage in stages),
    )


def _whole_life(record: Record, started_unix_s: float) -> list[Stage]:
    """From the intended time to the last token; the client's own moments where there are no stamps."""
    sent_s, first_s, answered_s = record.sent_s, record.first_token_s, record.answered_s
    if sent_s is None or answered_s is None:
        return []
    late = Stage(INTENDED, "sent", record.row.at_s, sent_s)
    stages = stages_of(record, started_unix_s)
    if not stages and first_s is not None:
        stages = [Stage("sent", FIRST_PIECE, sent_s, first_s), Stage(FIRST_PIECE, "received", first_s, answered_s)]
    return [late, *stages]


def _until_first_piece(record: Record, started_unix_s: float) -> list[Stage]:
    """From the intended time to the first token's arrival."""
    stages = _whole_life(record, started_unix_s)
    before = [stage for stage in stages if stage.later in _BEFORE_FIRST_PIECE]
    if not before or record.first_token_s is None or before[-1].later == FIRST_PIECE:
        return before
    return [*before, Stage(before[-1].later, FIRST_PIECE, before[-1].to_s, record.first_token_s)]


_BEFORE_FIRST_PIECE = frozenset(
    {"sent", Event.ACCEPTED, Event.ADMITTED, Event.PLACED, Event.PREFILLING, Event.FIRST_TOKEN, FIRST_PIECE}
)


def _waterfall(
    done: Sequence[Record],
    started_unix_s: float,
    quantity: Callable[[Record], float | None],
    stages_until: Callable[[Record, float], list[Stage]],
) -> Waterfall:
    ranked = sorted((value, record.row.row, record) for record in done if (value := quantity(record)) is not None)
    if not ranked:
        return Waterfall(())
    middle = ranked[(len(ranked) - 1) // 2]
    chosen = [middle, *(entry for entry in reversed(ranked[-NUM_SLOWEST:]) if entry is not middle)]
    return Waterfall(
        tuple(
            Life(record, record is middle[2], _segments(record, stages_until(record, started_unix_s)), total_s)
            for total_s, _, record in chosen
        )
    )


def _segments(record: Record, stages: Sequence[Stage]) -> tuple[Segment, ...]:
    """The stages end to end; where clocks differ and a stage would end before it began, it has no length."""
    segments: list[Segment] = []
    cursor_s = 0.0
    for stage in stages:
        to_s = max(cursor_s, stage.to_s - record.row.at_s)
        kind, meaning = _kind(stage)
        segments.append(Segment(stage.name, kind, meaning, cursor_s, to_s))
        cursor_s = to_s
    return tuple(segments)


def _kind(stage: Stage) -> tuple[StageKind, str]:
    if stage.later == FIRST_PIECE and stage.earlier == "sent":
        return StageKind.UNKNOWN_WAIT, "waits for its first token"
    if stage.earlier == Event.FIRST_TOKEN and stage.later in (FIRST_PIECE, "received"):
        return KINDS[Event.FINISHED]
    if stage.earlier == Event.FIRST_TOKEN and stage.later == Event.FINISHED:
        return StageKind.HOP, "ends with its first token"
    return KINDS[stage.earlier]


def _shares(done: Sequence[Record], lives: Sequence[Sequence[Stage]], num_slowest: int) -> tuple[StageShare, ...]:
    slowest = set(sorted(range(len(done)), key=lambda place: done[place].e2el_s or 0.0)[len(done) - num_slowest :])
    took: dict[str, list[float]] = {}
    slow_took: dict[str, float] = {}
    found: dict[str, Stage] = {}
    for place, stages in enumerate(lives):
        for stage in stages:
            found.setdefault(stage.name, stage)
            took.setdefault(stage.name, []).append(stage.took_s)
            slow_took[stage.name] = slow_took.get(stage.name, 0.0) + (stage.took_s if place in slowest else 0.0)
    total_s = sum(map(sum, took.values())) or 1.0
    slow_total_s = sum(slow_took.values()) or 1.0
    return tuple(
        _share(found[name], sorted(took[name]), total_s, slow_took[name] / slow_total_s)
        for name in sorted(found, key=lambda name: _place(found[name]))
    )


def _share(stage: Stage, ascending_s: Sequence[float], total_s: float, share_of_slowest: float) -> StageShare:
    kind, meaning = _kind(stage)
    return StageShare(
        name=stage.name,
        kind=kind,
        meaning=meaning,
        count=len(ascending_s),
        mean_s=fmean(ascending_s),
        p50_s=percentile(ascending_s, 50),
        p99_s=percentile(ascending_s, 99),
        share=sum(ascending_s) / total_s,
        share_of_slowest=share_of_slowest,
    )


_ORDER = (INTENDED, "sent", FIRST_PIECE, *(event.value for event in Event), "received")


def _place(stage: Stage) -> tuple[int, int]:
    return _ORDER.index(stage.earlier), _ORDER.index(stage.later)
