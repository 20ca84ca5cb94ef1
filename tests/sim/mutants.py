"""The rules of the protocol, each of which can be taken out: the simulation must find what then goes wrong."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from services.ingest.partitions import Partitions
from services.ingest.story import StoryWriter
from services.prefill.role import PrefillRole
from services.stream_out import service as edge_service
from services.stream_out.service import StreamOut
from services.stream_out.sight import Sight
from shared.policy import fold
from shared.transfer.offers import Offers
from shared.transfer.port import Outcome
from shared.wire.codec import encode
from shared.wire.to_ingest import Resume
from shared.wire.to_stream_out import Cut
from shared.wire.topics import INGEST_RESUME, PREFILL
from shared.worker.credits import Credits
from shared.worker.peers import GONE_AFTER_S, Peers
from shared.worker.prefixes import Prefixes

Patch = AbstractContextManager[Any]
Mutant = Callable[[], Patch]


def without_placement_id() -> Patch:
    """A frame counts for the placement that is open, whichever it was made for."""
    return patch.object(fold, "_is_of", lambda placement, entry: True)


def without_compare_and_set() -> Patch:
    """An `open` of the current epoch counts though another placement is open."""
    return patch.object(
        fold,
        "_may_open",
        lambda state, choice, message: message.epoch == choice.epoch and not choice.end and not state.finished,
    )


def without_read_back() -> Patch:
    """The owner has a choice placed again when it writes the cut, behind what it has read by then."""
    original = StreamOut._do
    placed: set[tuple[StreamOut, str, int, int]] = set()

    async def do(self, partition, owner, duty):
        if isinstance(duty, Resume) and (self, duty.request_id, duty.choice, duty.epoch) in placed:
            return
        if isinstance(duty, Cut) and duty.outcome is None:
            state = owner.log.fold.requests[duty.request_id]
            ids = state.choice(duty.choice).ids[:]
            resume = Resume(
                duty.request_id, duty.choice, duty.epoch, state.view.job, state.view.sampling.max_tokens, ids
            )
            placed.add((self, duty.request_id, duty.choice, duty.epoch))
            await self.send(INGEST_RESUME.name, duty.request_id, encode(resume))
        await original(self, partition, owner, duty)

    return patch.object(StreamOut, "_do", do)


class _WorkLater:
    """A producer that keeps the work records back."""

    def __init__(self, producer: Any) -> None:
        self._producer = producer
        self._held: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    async def send(self, topic: str, *args: Any, **kwargs: Any) -> int:
        if topic == PREFILL.name:
            self._held.append(((topic, *args), kwargs))
            return 0
        return await self._producer.send(topic, *args, **kwargs)

    async def send_work(self) -> None:
        for args, kwargs in self._held:
            await self._producer.send(*args, **kwargs)


def with_open_before_work() -> Patch:
    """The `open` is written first, the work record when it is acknowledged."""
    original = StoryWriter.dispatch

    async def dispatch(self, waiting, placement):
        other = copy.copy(self)
        later = other._producer = _WorkLater(self._producer)
        await original(other, waiting, placement)
        await later.send_work()

    return patch.object(StoryWriter, "dispatch", dispatch)


def without_ack_before_token() -> Patch:
    """Decode gets the first token while its frame is on its way."""

    async def write(self, prefill, entry, made_s):
        self._context.tasks.create_task(self._context.frames.send(entry, made_s))

    return patch.object(PrefillRole, "_write", write)


def without_finished_ids() -> Patch:
    """A new owner does not ask which requests have their result."""
    original = edge_service.prepare

    async def prepare(*args):
        return [replace(each, done={}) for each in await original(*args)]

    return patch.object(edge_service, "prepare", prepare)


def without_held_gaps() -> Patch:
    """A frame that leaves a gap is dropped."""
    original = fold._take_entry

    def take_entry(state, entry, worker):
        if entry.index > len(state.choice(entry.choice).ids):
            return iter(())
        return original(state, entry, worker)

    return patch.object(fold, "_take_entry", take_entry)


def without_blindness() -> Patch:
    """An edge judges by what it sees, whether it could see for a lease or not."""
    return patch.object(Sight, "is_clear", lambda self, now_s: True)


def with_unseen_gone() -> Patch:
    """A worker that the registry was not read for yet is gone."""

    def is_gone(self, peer, heard_s):
        return self._read_s - max(self._read_since_s, self._seen_s.get(peer, self._read_since_s)) > GONE_AFTER_S

    return patch.object(Peers, "is_gone", is_gone)


def with_trusted_hints() -> Patch:
    """What a peer was said to have counts as fetched, whatever came."""
    original = Prefixes._bring

    async def bring(self, fill, ticket):
        await original(self, fill, ticket)
        return len(fill.keys)

    return patch.object(Prefixes, "_bring", bring)


def without_repayment() -> Patch:
    """A peer that breaks off keeps what it was lent."""
    original = Offers.lend

    async def lend(self, claim, proofs):
        offer = await original(self, claim, proofs)
        if offer is not None:
            give_back = offer._on_end
            offer._on_end = lambda outcome: give_back(outcome) if outcome is Outcome.PULLED else None
        return offer

    return patch.object(Offers, "lend", lend)


def without_left_jobs() -> Patch:
    """Who takes a partition over reads on where its predecessor had read to, and looks nothing up that it left."""
    return patch.object(Partitions, "take_left", lambda self: [])


def with_kept_work() -> Patch:
    """A prompt counts as work until its answer ends."""
    return patch.object(Credits, "computed", lambda self, placement, worker: None)


MUTANTS: dict[str, Mutant] = {
    "placement-id": without_placement_id,
    "open-compare-and-set": without_compare_and_set,
    "read-back": without_read_back,
    "work-before-open": with_open_before_work,
    "ack-before-token": without_ack_before_token,
    "finished-ids": without_finished_ids,
    "held-gaps": without_held_gaps,
    "blind-judge": without_blindness,
    "unseen-gone": with_unseen_gone,
    "trusted-hints": with_trusted_hints,
    "repayment": without_repayment,
    "left-jobs": without_left_jobs,
    "kept-work": with_kept_work,
}


@contextmanager
def taken_out(name: str | None) -> Iterator[None]:
    """Run without the rule of that name."""
    with nullcontext() if name is None else MUTANTS[name]():
        yield
