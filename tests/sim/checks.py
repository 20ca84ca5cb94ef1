"""What must be true of a schedule that has come to rest."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from services.decode.role import NO_FIRST_TOKEN
from shared.blocks import token_ids
from shared.bus.port import Committed, Record
from shared.engine.fake import fake_answer
from shared.policy.fold import PartitionFold, RequestState
from shared.request import FinishReason, Incarnation, PlacementId, RequestId, SamplingParams, WorkerRef
from shared.state.memory import Credit
from shared.wire.explanation import MAX_CANDIDATES
from shared.wire.results import RESULT_DECODER, Result
from shared.wire.to_stream_out import STREAM_OUT_DECODER, Cut, Frame, FrameEntry, Open
from shared.wire.to_worker import (
    TO_DECODE_DECODER,
    TO_PREFILL_DECODER,
    DecodeWork,
    FirstToken,
    LocalWork,
    PrefillWork,
    Stop,
)
from shared.wire.topics import DECODE, INGEST, PREFILL, RESULTS, STREAM_OUT
from tests.sim.clients import Capture
from tests.sim.world import Host, World

MAX_LOSSES = 3

RECOVERY_S = 10.0
"""Behind the end of all faults, for whatever they did: several times as long as a lease, and as late copies take."""

WORK_GOES_S = 1.0
"""When a prompt is computed its work is given back, by one call after the other."""

SERVICE_S = 1.0
SERVICE_STEPS = 5
"""For each request that there is, and of eight at least."""
SERVICE_MESSAGES = 20
"""In which its KV comes. Together so long a request may take where nothing is wrong."""

KEPT = ("num_running", "num_waiting", "num_held", "num_importing")
"""Of an engine's stats: what it has of requests."""


@dataclass(frozen=True)
class Asked:
    """One request body, as it was submitted.

    Attributes:
        refused_by_decode: decode workers cannot run it.
    """

    prompt: list[int]
    num_new: int
    num_choices: int
    refused_by_decode: bool = False


def accepted(world: World) -> dict[RequestId, Record]:
    """The first record of each job that stands on `ingest`."""
    found: dict[RequestId, Record] = {}
    for partition in range(INGEST.num_partitions):
        for record in world.log.records(INGEST.name, partition):
            assert record.key is not None
            found.setdefault(RequestId(record.key.decode()), record)
    return found


def results(world: World) -> dict[RequestId, list[bytes]]:
    found: defaultdict[RequestId, list[bytes]] = defaultdict(list)
    for partition in range(RESULTS.num_partitions):
        for record in world.log.records(RESULTS.name, partition):
            assert record.key is not None
            found[RequestId(record.key.decode())].append(record.value)
    return dict(found)


class Told:
    """All of `stream-out`, as the fold tells it."""

    def __init__(self, world: World) -> None:
        self.requests: dict[RequestId, RequestState] = {}
        self.opens: defaultdict[tuple[RequestId, int], list[Open]] = defaultdict(list)
        self.cuts: list[tuple[Record, Cut]] = []
        self.entries: defaultdict[PlacementId, list[tuple[WorkerRef, FrameEntry]]] = defaultdict(list)
        self.first_s: dict[tuple[PlacementId, Incarnation], float] = {}
        for partition in range(STREAM_OUT.num_partitions):
            fold = PartitionFold()
            for record in world.log.records(STREAM_OUT.name, partition):
                message = STREAM_OUT_DECODER.decode(record.value)
                fold.apply(record.offset, record.timestamp_s, message)
                match message:
                    case Open():
                        self.opens[message.request_id, message.choice].append(message)
                    case Cut():
                        self.cuts.append((record, message))
                    case Frame():
                        for entry in message.entries:
                            self.entries[entry.placement].append((message.worker, entry))
                            self.first_s.setdefault((entry.placement, message.worker.incarnation), record.timestamp_s)
                    case _:
                        pass
            self.requests |= fold.requests


def findings(world: World, asked: dict[RequestId, Asked], captures: Iterable[Capture]) -> Iterator[str]:
    """What is wrong."""
    told, written = Told(world), results(world)
    followed = {capture.request_id: capture for capture in captures}
    for request_id in accepted(world):
        state = told.requests.get(request_id)
        copies = written.pop(request_id, [])
        if state is None or not state.finished:
            yield f"{request_id} has not ended"
            continue
        if len(set(copies)) != 1:
            yield f"{request_id} has {len(set(copies))} different results"
            continue
        yield from _request(world, told, state, RESULT_DECODER.decode(copies[0]), asked[request_id], followed)
    yield from (f"{request_id} has a result and was never accepted" for request_id in written)
    yield from _waits(world)
    yield from _order(told)
    yield from _reasons(told)
    yield from _verdicts(world, told)
    yield from _workers(world)
    yield from _ingests(world)
    yield from world.journal.errors


def _request(
    world: World,
    told: Told,
    state: RequestState,
    result: Result,
    asked: Asked,
    followed: dict[RequestId, Capture],
) -> Iterator[str]:
    capture = followed.get(state.request_id)
    if not _may_end_so(world, told, state, result, asked, capture):
        yield f"{state.request_id} ended {result.status}: {result.error}"
    for index in range(asked.num_choices if state.view else 0):
        ids = list(state.choice(index).ids)
        if not _is_explained(asked, index, ids, told.opens[state.request_id, index]):
            yield f"{state.request_id} choice {index}: no placements give {ids}"
        if result.status == "completed":
            name = f"{state.request_id} choice {index}"
            yield from (f"{name}: {wrong}" for wrong in _text(world, result, asked, index, ids, capture))
    if capture is not None:
        cursors = [cursor for cursor, _ in capture.events]
        if any(later <= earlier for earlier, later in pairwise(cursors)):
            yield f"{state.request_id}: the client saw events twice or out of order"
        if capture.status is not None and capture.status != result.status:
            yield f"{state.request_id}: DELETE said {capture.status}, the result says {result.status}"


def _may_end_so(
    world: World, told: Told, state: RequestState, result: Result, asked: Asked, capture: Capture | None
) -> bool:
    match result.status:
        case "completed":
            return True
        case FinishReason.CANCELLED:
            if capture is None:  # its client lost the edge before it heard of it
                return state.view is not None and state.view.edge is not None
            return capture.asked_to_cancel or capture.was_alone or _at_an_unseen_edge(world, told, state)
        case FinishReason.FAILED:
            return asked.refused_by_decode or _three_losses(told, state.request_id)
        case _:
            return False


def _at_an_unseen_edge(world: World, told: Told, state: RequestState) -> bool:
    """Whether the client was, when it was called gone, at an edge that could not say that it lives."""
    gone_s = next(
        record.timestamp_s
        for record, cut in told.cuts
        if cut.request_id == state.request_id and cut.reason == state.cut_reason
    )
    edges = {edge for edge, _ in state.attached}
    return any(_was_silent(host, gone_s) for host in world.hosts if host.incarnation in edges)


def _text(
    world: World, result: Result, asked: Asked, index: int, ids: list[int], capture: Capture | None
) -> Iterator[str]:
    """What is wrong with one choice of an answer."""
    if len(ids) != asked.num_new:
        yield f"{len(ids)} tokens of {asked.num_new}"
    text = world.tokeniser.decode(ids)
    assert result.response is not None
    if result.response["choices"][index]["text"] != text:
        yield "the result is not what the log tells"
    if capture is not None and capture.ended and capture.text(index) != text:
        yield f"the client saw {capture.text(index)!r} of {text!r}"


def _is_explained(asked: Asked, choice: int, ids: list[int], opens: Sequence[Open]) -> bool:
    """Whether one placement an epoch, in the order of the epochs, gives the tokens."""
    epochs = sorted({opened.epoch for opened in opens})
    by_epoch = [{opened.placement for opened in opens if opened.epoch == epoch} for epoch in epochs]
    reached = {0}
    for placements in by_epoch:
        reached |= {
            end for start in reached for placement in placements for end in _ends(asked, choice, ids, start, placement)
        }
    return len(ids) in reached


def _ends(asked: Asked, choice: int, ids: list[int], start: int, placement: PlacementId) -> Iterator[int]:
    """How far the placement, begun behind the first `start` tokens, gives the ids."""
    sampling = SamplingParams(max_tokens=asked.num_new, temperature=0.0, ignore_eos=True)
    known = token_ids([*asked.prompt, *ids[:start]])
    made = fake_answer(known, len(asked.prompt), sampling, choice, len(ids) - start, salted_by=placement)
    for count, (is_so, should) in enumerate(zip(ids[start:], made, strict=False), 1):
        if is_so != should:
            return
        yield start + count


def _three_losses(told: Told, request_id: RequestId) -> bool:
    cuts = [cut for _, cut in told.cuts if cut.request_id == request_id and cut.outcome is None]
    return len({cut.epoch for cut in cuts}) >= MAX_LOSSES


def _waits(world: World) -> Iterator[str]:
    """Nobody waits longer than what befell the system explains: a request that stood still until some limit ran out is
    as bad as one that was lost."""
    ended_s = {
        RequestId((record.key or b"").decode()): record.timestamp_s
        for partition in range(RESULTS.num_partitions)
        for record in reversed(world.log.records(RESULTS.name, partition))
    }
    num_steps = SERVICE_STEPS * max(8, len(accepted(world)))
    for request_id, record in accepted(world).items():
        waited_s = ended_s.get(request_id, world.clock_s()) - max(record.timestamp_s, world.calm_s)
        conditions = world.conditions
        limit_s = SERVICE_S + num_steps * conditions.step_s + SERVICE_MESSAGES * conditions.delay_s
        if conditions.has_faults and record.timestamp_s < world.rested_s:
            limit_s += RECOVERY_S
        if waited_s > limit_s:
            yield f"{request_id} took {waited_s:.1f} s, which nothing explains beyond {limit_s:.1f} s"


def _order(told: Told) -> Iterator[str]:
    """What decode makes stands behind the token of prefill that it goes on from. A failure need not."""
    for opened in (opened for found in told.opens.values() for opened in found):
        for worker, entry in told.entries[opened.placement]:
            if worker == opened.prefill:
                break
            if entry.finish is not FinishReason.FAILED:
                yield f"{entry.request_id}: token {entry.index} of {opened.placement} stands before prefill's"
                break


def _reasons(told: Told) -> Iterator[str]:
    """Each placement says why it is where it is."""
    for opened in (opened for found in told.opens.values() for opened in found):
        why = opened.explanation
        if why is None or not why.reason:
            yield f"{opened.request_id}: nobody says why {opened.placement} was chosen"
            continue
        costs = [candidate.cost_s for candidate in why.candidates]
        if costs != sorted(costs) or len(costs) > MAX_CANDIDATES:
            yield f"{opened.request_id}: {opened.placement} was chosen of candidates that cost {costs}"
        if why.candidates:
            best = why.candidates[0]
            is_local = opened.prefill == opened.decode
            if (best.prefill, best.decode, best.is_local) != (opened.prefill.slot, opened.decode.slot, is_local):
                yield f"{opened.request_id}: {opened.placement} is not where it is said to be best"


def _verdicts(world: World, told: Told) -> Iterator[str]:
    """A worker that was given up for lost must not have gone on as if nothing was."""
    live = {host.incarnation: host for host in world.hosts if host.live}
    first = {(cut.request_id, cut.choice, cut.epoch): (record, cut) for record, cut in reversed(told.cuts)}
    for record, cut in first.values():
        for worker in _missed(told, cut):
            host = live.get(worker)
            if host is not None and not _was_silent(host, record.timestamp_s):
                yield f"{cut.request_id}: {worker} was given up at {record.timestamp_s - 1000:.3f} and lives"


def _missed(told: Told, cut: Cut) -> Iterator[Incarnation]:
    """Who is gone, for all that whoever wrote the cut could see."""
    if cut.lost is not None:
        yield cut.lost.incarnation
    if cut.reason == NO_FIRST_TOKEN:
        opens = told.opens[cut.request_id, cut.choice]
        yield from (opened.prefill.incarnation for opened in opens if opened.epoch == cut.epoch - 1)


def _was_silent(host: Host, at_s: float) -> bool:
    return any(start_s <= at_s <= end_s for start_s, end_s in host.silences)


def _workers(world: World) -> Iterator[str]:
    for host in world.running("prefill", "decode"):
        assert host.engine is not None
        assert host.transfer is not None
        stats = host.engine.stats()
        if stats.num_free_pages != stats.num_pages:
            yield f"{host.incarnation} has {stats.num_free_pages} free pages of {stats.num_pages}"
        left = {name: count for name in KEPT if (count := getattr(stats, name))}
        if left:
            yield f"{host.incarnation} still has {left}"
        if host.transfer.num_offers:
            yield f"{host.incarnation} has {host.transfer.num_offers} offers or loans"
        try:
            host.engine.check()
        except AssertionError as error:
            yield f"{host.incarnation}: {error}"
        taken = _credits(world, host)
        left = {key: credit.num_pages for key, credit in taken.items() if _was_told(world, key)}
        if left:
            yield f"{host.incarnation}: credits not given back: {left}"


def _credits(world: World, host: Host) -> dict[PlacementId, Credit]:
    traces = world.store.traces(host.incarnation)
    return traces.credits if traces is not None else {}


def work_kept(world: World) -> Iterator[str]:
    """Prompts that count as work though their first token is known, while nothing befalls anybody any more."""
    kept = [
        (placement, host.incarnation)
        for host in world.running("prefill", "decode")
        for placement, credit in _credits(world, host).items()
        if credit.work_us
    ]
    if not kept:
        return
    told = Told(world)
    for each in kept:
        if world.clock_s() - max(world.calm_s, told.first_s.get(each, math.inf)) > WORK_GOES_S:
            yield f"{each[1]}: {each[0]} still counts as work"


def _ingests(world: World) -> Iterator[str]:
    """All that stands in the log is dealt with. (A zombie's commit may say less than its owner's.)"""
    for host in world.running("ingest"):
        service = host.service
        left = {
            "in line": len(service._backlog._line),
            "counted as waiting": service._backlog.pace.num_waiting,
            "put down": len(service._parked),
            "in hand": sum(hands._num_records for hands in service._hands.values()),
            "held against results": len(service._ended._held),
        }
        if any(left.values()):
            yield f"{host.incarnation} has {left}"
        for (topic, partition), low_water in service._partitions._low_water.items():
            end = world.log.end_offset(topic, partition)
            if partition in service._partitions.owned and low_water.statement(world.clock_s()) != Committed(end):
                yield f"{host.incarnation} has not dealt with all {end} records of {topic}/{partition}"


def _was_told(world: World, placement: PlacementId) -> bool:
    """Whether a worker that lives was told of the placement: then its credits are given back on both.

    Where whoever should have told died, and its owner too before it had stopped it, they end with the deadline.
    """
    live = {host.incarnation for host in world.running("prefill", "decode")}
    for topic, decoder in ((PREFILL, TO_PREFILL_DECODER), (DECODE, TO_DECODE_DECODER)):
        for partition in range(topic.num_partitions):
            for record in world.log.records(topic.name, partition):
                message = decoder.decode(record.value)
                if message.target.incarnation not in live:
                    continue
                match message:
                    case PrefillWork() | LocalWork() | DecodeWork():
                        found = message.assignment.placement
                    case Stop() | FirstToken():
                        found = message.placement
                if found == placement:
                    return True
    return False


def at_rest(world: World) -> bool:
    """Whether nothing is left to do, as far as can be seen from outside."""
    told, written = Told(world), results(world)
    if any(request_id not in written or not told.requests[request_id].finished for request_id in accepted(world)):
        return False
    return not any(_workers(world)) and not any(_ingests(world))
