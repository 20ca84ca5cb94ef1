"""Decides what each batch computes, and which sequence holds which pages and which seat meanwhile.

One idea: in every batch a sequence's tokens launched catch up with its tokens wanted, as far as the batch's token
budget allows. A decode row is the case where one token is missing, a prefill chunk the case where many are.

    schedule ──> in flight ──> collected ──> for each row: publish what is full, then maybe hold, end or fail

- A batch may be scheduled while another is in flight: a row goes on from what has been launched, be it a prompt's next
  chunk or a token that nobody has seen yet. What must not happen under a batch in flight waits for its end: no
  sequence is preempted, and who ends keeps pages and seat until no batch in flight has a row of it.
- A seat is held from admission (or `reserve`) to the end: running, prefilling and importing sequences together never
  exceed `max_running`, so an import always can run, and each prefilling sequence finds budget beside the decode rows.
- Admission takes pages for all ids at once; afterwards a sequence asks for one more page each PAGE_TOKENS tokens.
- Who lacks that page takes it from the youngest sequence that runs or prefills, which may be itself. Those that hold
  their KV for a peer keep it from their first chunk on, and importing ones keep theirs.
- The line is served in order: preempted ones by age, then new ones by age. Nobody overtakes the head, an import
  neither; only a sequence whose next block is on its way steps aside until that is over.
- What is here, on its way or lent, the block book knows (`block_book.py`). From host memory blocks come for those alone
  who could be admitted now, for imports and for peers: the scheduler begins such a fill when it meets them. An import
  shares the fill's pages from the beginning, and runs when both have ended, the copies and what its peer sends.
"""

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Names
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from shared.blocks import PAGE_TOKENS, BlockHash, key_chain, pages_for, root_hash
from shared.engine.batch import BatchRow, work_of
from shared.engine.block_book import BlockBook
from shared.engine.port import EngineLimits, EngineRequest, Fill, Reservation
from shared.engine.sequence import NO_SEAT, Sequence, SequenceState, arrival_of, line_rank_of, num_findable
from shared.kv.host_tier import HostPages
from shared.policy.profile import StepWork


@dataclass(frozen=True, slots=True)
class Batch:
    """What to compute next.

    Attributes:
        rows: empty if there is nothing to launch now.
        sequences: whose it is; one for each row.
        started: keys of requests whose first chunk this is.
        num_decode: how many of the rows, the first ones, are decode rows; the others are chunks.
    """

    rows: tuple[BatchRow, ...]
    sequences: tuple[Sequence, ...]
    started: tuple[str, ...]
    num_decode: int

    @property
    def work(self) -> StepWork:
        return work_of(self.rows, self.num_decode)

    @property
    def num_tokens(self) -> int:
        """Token rows."""
        return self.num_decode + sum([chunk.end - chunk.start for chunk in self.rows[self.num_decode :]])


NOTHING = Batch((), (), (), 0)

ACTIVE = frozenset({SequenceState.PREFILLING, SequenceState.RUNNING})
SEATED = ACTIVE | {SequenceState.IMPORTING}


class Scheduler:
    """All sequences of one engine.

    Requests are taken as they come: whether one can ever fit is for the engine to ask before.

    Attributes:
        blocks: what is in its pages.
    """

    def __init__(self, limits: EngineLimits, model_fingerprint: str, host: HostPages | None = None) -> None:
        """`host`: memory for what goes from the pages; None: it is gone."""
        if limits.max_running < 1:
            raise ValueError(f"max_running is {limits.max_running}, it must be 1 or more")
        if limits.max_batch_tokens < limits.max_running:
            raise ValueError(
                f"max_batch_tokens is {limits.max_batch_tokens}, it must be max_running ({limits.max_running}) or more:"
                " a step computes a token of every running request"
            )
        self._limits = limits
        self._model_fingerprint = model_fingerprint
        self.blocks = BlockBook(limits, host)
        self._pool = self.blocks.pool
        self._sequences: dict[str, Sequence] = {}
        self._line: list[Sequence] = []  # waiting, by line_rank
        self._active: list[Sequence] = []  # prefilling and running, by arrival
        self._held: dict[str, Sequence] = {}
        self._importing: dict[str, Sequence] = {}
        self._landing: dict[Sequence, tuple[int, bool] | None] = {}  # wait for the host; what came meanwhile
        self._leaving: list[Sequence] = []  # ended, with rows in flight
        self._free_seats = list(range(limits.max_running - 1, -1, -1))
        self._num_in_flight = 0
        self._next_arrival = 0
        self._next_number = 0
        self._num_preemptions = 0
        self._num_prefix_queries = 0
        self._num_prefix_hits = 0

    @property
    def num_waiting(self) -> int:
        return len(self._line)

    @property
    def num_running(self) -> int:
        """Prefilling and running."""
        return len(self._active)

    @property
    def num_held(self) -> int:
        return len(self._held)

    @property
    def num_importing(self) -> int:
        return len(self._importing)

    @property
    def num_preemptions(self) -> int:
        return self._num_preemptions

    @property
    def num_prefix_queries(self) -> int:
        """Tokens looked up in the prefix index, by requests that came (not again by preempted ones)."""
        return self._num_prefix_queries

    @property
    def num_prefix_hits(self) -> int:
        """Tokens of those that were found."""
        return self._num_prefix_hits

    def __contains__(self, key: str) -> bool:
        return key in self._sequences

    # What the caller asks.

    def add(self, request: EngineRequest) -> None:
        """Put a request at the end of the line."""
        sequence = self._new_sequence(request, SequenceState.WAITING)
        self._sequences[request.key] = sequence
        insort(self._line, sequence, key=line_rank_of)

    def reserve(self, request: EngineRequest) -> Reservation | None:
        """Seat and pages for an import; None if there are none now beyond what the head of the line needs."""
        seats, pages = self._spare_for_import()
        if seats < 1:
            return None
        sequence = self._new_sequence(request, SequenceState.IMPORTING)
        found = self._found(sequence)
        num_new = pages_for(len(sequence.ids)) - len(found)
        if self._pool.cost(found, num_new) > pages:
            return None
        copied = self.blocks.copied(sequence.keys, len(found), sequence.num_findable)
        if copied:
            found += self.blocks.restore(copied, found, lambda: self._landed(sequence)).pages
            self._landing[sequence] = None
        self._sequences[request.key] = sequence
        sequence.pages = self.blocks.acquire(found, num_new - len(copied))
        self._take_seat(sequence)
        self._count_found(sequence, len(found))
        self._importing[request.key] = sequence
        return Reservation(pages=sequence.pages, num_cached_pages=len(found))

    def imported(self, key: str, token_id: int, *, exact: bool) -> None:
        """The KV that was to be imported is there, and `token_id` follows. Raises KeyError for a request that is not
        importing, or of which that was said before."""
        sequence = self._importing[key]
        if sequence in self._landing:
            if self._landing[sequence] is not None:
                raise KeyError(key)
            self._landing[sequence] = token_id, exact
            return
        del self._importing[key]
        sequence.move(SequenceState.RUNNING)
        insort(self._active, sequence, key=arrival_of)
        sequence.num_launched = len(sequence.ids)
        sequence.ids.append(token_id)
        sequence.is_exact = exact
        self.publish(sequence, sequence.num_launched)

    def fill(self, request: EngineRequest, num_pages: int) -> Fill | None:
        """See `Engine.fill`."""
        ids = request.ids[: min(num_pages, num_findable(len(request.ids))) * PAGE_TOKENS]
        keys = key_chain(root_hash(self._model_fingerprint, request.cache_salt), ids)
        return self.blocks.fill(keys, self._spare_for_import()[1])

    def bring(self, names: Names[BlockHash], over: Callable[[], None]) -> None:
        """See `Engine.bring`."""
        self.blocks.bring(names, self._spare_for_import()[1], over)

    def abort(self, key: str) -> None:
        """End a sequence in any state. Unknown keys do nothing."""
        sequence = self._sequences.get(key)
        if sequence is not None:
            self.end(sequence)

    # What the engine asks in each step.

    def schedule(self) -> Batch:
        """The next batch: decode rows, then chunks of what is prefilling, then of what is admitted; each by age.

        It counts as in flight from now on. It is empty if nobody has anything to launch or if a page is lacking that
        only a preemption can give: then what is in flight has to be collected first.
        """
        if not self._grow_running():
            return NOTHING
        sequences: list[Sequence] = []
        rows: list[BatchRow] = []
        started: list[str] = []
        for sequence in self._active:
            if sequence.state is SequenceState.RUNNING and sequence.num_launched < sequence.last_end:
                sequences.append(sequence)
                rows.append(_decode_row(sequence))
        num_decode = len(rows)
        budget = self._limits.max_batch_tokens - num_decode
        for sequence in self._active:
            if sequence.state is SequenceState.PREFILLING and budget:
                sequences.append(sequence)
                rows.append(_chunk(sequence, budget))
                budget -= rows[-1].end - rows[-1].start
        if budget and self._line:
            for sequence, is_new in self._admit(budget):
                sequences.append(sequence)
                rows.append(_chunk(sequence, budget))
                budget -= rows[-1].end - rows[-1].start
                if is_new:
                    started.append(sequence.request.key)
        if rows:
            self._num_in_flight += 1
        return Batch(tuple(rows), tuple(sequences), tuple(started), num_decode)

    def collected(self, batch: Batch) -> None:
        """A batch, the oldest in flight, is done: who ended since its launch frees what it kept for it."""
        self._num_in_flight -= 1
        for sequence in batch.sequences:
            sequence.num_in_flight -= 1
        if self._leaving:
            for sequence in self._leaving:
                if not sequence.num_in_flight:
                    self._release(sequence)
            self._leaving = [sequence for sequence in self._leaving if sequence.num_in_flight]

    def publish(self, sequence: Sequence, end: int) -> None:
        """KV of the positions below `end` is in the pages: others may find the blocks that are full now, if exact."""
        if not sequence.is_exact:
            return
        while sequence.num_published < end // PAGE_TOKENS:
            index = sequence.num_published
            self.blocks.publish(sequence.pages[index], sequence.block_key(index), sequence)
            sequence.num_published += 1

    def hold(self, sequence: Sequence) -> None:
        """The sequence computes no more: it gives up its seat and keeps its pages until it ends."""
        sequence.move(SequenceState.HELD)
        self._active.remove(sequence)
        self._stop_computing(sequence)
        self._leave_seat(sequence)
        self._held[sequence.request.key] = sequence

    def fail(self, sequence: Sequence) -> None:
        """End (or hold) a sequence whose KV is not to be trusted: nobody shall find any of its pages."""
        self.blocks.distrust(sequence.pages)
        if sequence.request.hold_kv:
            self.hold(sequence)
        else:
            self.end(sequence)

    def end(self, sequence: Sequence) -> None:
        """Forget a sequence; what it has is free when no batch in flight has a row of it."""
        key, state = sequence.request.key, sequence.state
        sequence.move(SequenceState.ENDED)
        match state:
            case SequenceState.WAITING:
                self._line.remove(sequence)
            case SequenceState.PREFILLING | SequenceState.RUNNING:
                self._active.remove(sequence)
            case SequenceState.HELD:
                del self._held[key]
            case SequenceState.IMPORTING:
                del self._importing[key]
                self._landing.pop(sequence, None)
            case SequenceState.ENDED:
                raise AssertionError("no sequence ends twice")
        del self._sequences[key]
        self._stop_computing(sequence)
        if sequence.num_in_flight:
            self._leaving.append(sequence)
        else:
            self._release(sequence)

    def has_work(self) -> bool:
        """Whether anything is in flight or `schedule` has anybody to serve.

        Who waits for a fill is served when that is over, which its caller tells, or `BlockBook.advance`.
        """
        if self._num_in_flight or self._active or self.blocks.num_restores:
            return True
        first = next(self._in_turn(), None)
        return first is not None and self._fits(*first)

    def check(self) -> None:
        """Raise AssertionError unless pages, seats and states add up."""
        alive = self._sequences.values()
        self.blocks.check([sequence.pages for sequence in (*alive, *self._leaving)], self._active)
        seats = [sequence.seat for sequence in (*alive, *self._leaving) if sequence.seat != NO_SEAT]
        assert sorted(seats + self._free_seats) == list(range(self._limits.max_running)), "the seats do not add up"
        groups: tuple[tuple[Iterable[Sequence], AbstractSet[SequenceState]], ...] = (
            (self._line, {SequenceState.WAITING}),
            (self._active, ACTIVE),
            (self._held.values(), {SequenceState.HELD}),
            (self._importing.values(), {SequenceState.IMPORTING}),
        )
        listed: Counter[str] = Counter()
        for members, states in groups:
            for sequence in members:
                assert sequence.state in states, f"{sequence.request.key} is listed apart from its state"
                listed[sequence.request.key] += 1
        assert listed == Counter(self._sequences.keys()), "a sequence is listed twice or not at all"
        assert self._line == sorted(self._line, key=line_rank_of), "the line is out of order"
        assert self._active == sorted(self._active, key=arrival_of), "active sequences are out of order"
        for sequence in alive:
            name, state = sequence.request.key, sequence.state
            assert (sequence.seat != NO_SEAT) == (state in SEATED), f"{name} is {state.name} in seat {sequence.seat}"
            assert len(sequence.pages) * PAGE_TOKENS >= sequence.num_launched, "more is launched than pages hold"
            assert sequence.num_launched <= sequence.last_end, "more is launched than is wanted"
            assert 0 <= sequence.num_in_flight <= self._num_in_flight, "a row is in flight without its batch"
            assert not sequence.num_in_flight or state in ACTIVE, f"{name} is {state.name} and in flight"
            assert sequence.num_published <= len(sequence.pages), "more is published than the pages there are"
            assert sequence.pages or state is not SequenceState.PREFILLING, "prefilling without pages"
            assert not sequence.pages or state is not SequenceState.WAITING, "waiting with pages"
            if sequence.request.hold_kv:
                num_pages = 0 if state is SequenceState.WAITING else pages_for(len(sequence.ids))
                assert len(sequence.pages) == num_pages, f"{name} holds {len(sequence.pages)} pages of {num_pages}"
                assert not sequence.is_preempted, f"{name} lost its pages"
            else:
                assert state is not SequenceState.HELD, f"{name} is held, and nobody asked for it"
            if not sequence.is_exact:
                own = sequence.pages[sequence.num_published :]
                assert not set(own) & set(self._pool.find(sequence.keys)), f"{name} is not exact, and found"
        for sequence in self._leaving:
            assert sequence.state is SequenceState.ENDED, "a sequence leaves that has not ended"
            assert 0 < sequence.num_in_flight <= self._num_in_flight, "an ended sequence keeps what nobody uses"
        assert self._landing.keys() <= set(self._importing.values()), "a request lands that is not importing"

    # Inside.

    @property
    def _num_seats_free(self) -> int:
        return len(self._free_seats)

    def _new_sequence(self, request: EngineRequest, state: SequenceState) -> Sequence:
        root = root_hash(self._model_fingerprint, request.cache_salt)
        self._next_arrival += 1
        return Sequence(request, self._next_arrival, root, state)

    def _found(self, sequence: Sequence) -> tuple[int, ...]:
        return self._pool.find(sequence.keys[: sequence.num_findable])

    def _landed(self, sequence: Sequence) -> None:
        """What came from host memory for an import is there."""
        arrived = self._landing.pop(sequence, None)
        if arrived is not None:
            token_id, exact = arrived
            self.imported(sequence.request.key, token_id, exact=exact)

    def _prefill_cost(self, sequence: Sequence, found: tuple[int, ...]) -> int:
        return self._pool.cost(found, pages_for(len(sequence.ids)) - len(found))

    def _in_turn(self) -> Iterator[tuple[Sequence, tuple[int, ...]]]:
        """The line without those who wait for a block that is on its way, each with the pages found for it."""
        for sequence in self._line:
            if sequence.awaited in self.blocks.coming:
                continue
            found = self._found(sequence)
            if not self._awaits_block(sequence, len(found)):
                yield sequence, found

    def _fits(self, sequence: Sequence, found: tuple[int, ...]) -> bool:
        """Whether a waiting sequence could be admitted now."""
        return self._num_seats_free > 0 and self._prefill_cost(sequence, found) <= self._pool.num_free

    def _spare_for_import(self) -> tuple[int, int]:
        """Seats and pages beyond what the head of the line needs: a stream of imports must not starve it."""
        if not self._line:
            return self._num_seats_free, self._pool.num_free
        head = self._line[0]
        found = self._found(head)
        num_coming = self.blocks.num_coming(head.keys[len(found) : head.num_findable])  # into pages that are set aside
        return self._num_seats_free - 1, self._pool.num_free - self._prefill_cost(head, found) + num_coming

    def _admit(self, budget: int) -> list[tuple[Sequence, bool]]:
        """Move those whose turn it is from the line to a seat; whether each is new (and not preempted before)."""
        admitted: list[tuple[Sequence, bool]] = []
        if self._num_seats_free == 0:
            return admitted
        for sequence, found in self._in_turn():
            if not self._fits(sequence, found):
                break
            copied = self.blocks.copied(sequence.keys, len(found), sequence.num_findable)
            if copied:
                if self.blocks.num_restores >= self._num_seats_free:
                    break  # it could not be seated when it has them
                self.blocks.restore(copied, found)
                continue
            admitted.append((sequence, not sequence.is_preempted))
            self._seat(sequence, found)
            budget -= len(sequence.ids) - sequence.num_launched
            if budget <= 0:
                break
        if admitted:
            self._line = [sequence for sequence in self._line if sequence.state is SequenceState.WAITING]
        return admitted

    def _awaits_block(self, sequence: Sequence, num_found: int) -> bool:
        """Whether the block after those found is on its way; noted, so that the next look costs one look-up."""
        sequence.awaited = sequence.keys[num_found] if num_found < sequence.num_findable else None
        return sequence.awaited in self.blocks.coming

    def _seat(self, sequence: Sequence, found: tuple[int, ...]) -> None:
        sequence.move(SequenceState.PREFILLING)
        sequence.is_preempted = False
        sequence.pages = self.blocks.acquire(found, pages_for(len(sequence.ids)) - len(found))
        self._take_seat(sequence)
        sequence.num_launched = len(found) * PAGE_TOKENS
        sequence.is_prefilled = True
        self._count_found(sequence, len(found))
        self.blocks.expect(sequence.keys[len(found) :], sequence)
        insort(self._active, sequence, key=arrival_of)

    def _count_found(self, sequence: Sequence, num_found: int) -> None:
        sequence.num_published = num_found
        self.blocks.used(sequence.keys[:num_found])
        if sequence.num_cached_tokens is not None:
            return
        sequence.num_cached_tokens = min(num_found * PAGE_TOKENS, sequence.request.prompt_len)
        self._num_prefix_queries += len(sequence.ids)
        self._num_prefix_hits += num_found * PAGE_TOKENS

    def _grow_running(self) -> bool:
        """Give running sequences the page for the token they compute next, oldest first.

        Who holds its KV never lacks one: it computes no token behind its ids.

        False if pages are lacking and who has them may not be preempted yet.
        """
        lacking = [sequence for sequence in self._active if sequence.num_launched == len(sequence.pages) * PAGE_TOKENS]
        for sequence in lacking:
            # The state is asked for each: those behind may be preempted on the way.
            if sequence.state is not SequenceState.RUNNING or sequence.num_launched == sequence.last_end:
                continue
            while self._pool.num_free == 0 and sequence.state is SequenceState.RUNNING:
                if self._num_in_flight:
                    return False
                self._preempt(next(each for each in reversed(self._active) if not each.request.hold_kv))
            if sequence.state is SequenceState.RUNNING:
                sequence.pages += self.blocks.acquire((), 1)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        sequence.move(SequenceState.WAITING)
        self._active.remove(sequence)
        self._stop_computing(sequence)
        self._release(sequence)
        sequence.num_launched = 0
        sequence.num_published = 0
        sequence.extend_keys(sequence.num_findable)
        sequence.is_exact = True  # all of it is computed again
        sequence.is_preempted = True
        insort(self._line, sequence, key=line_rank_of)
        self._num_preemptions += 1

    def _stop_computing(self, sequence: Sequence) -> None:
        """Nobody need wait for the blocks that it has not published."""
        self.blocks.expect_no_more(sequence.keys[sequence.num_published :], sequence)

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.pages)
        sequence.pages = ()
        self._leave_seat(sequence)

    def _take_seat(self, sequence: Sequence) -> None:
        sequence.seat = self._free_seats.pop()
        self._next_number += 1
        sequence.number = self._next_number

    def _leave_seat(self, sequence: Sequence) -> None:
        if sequence.seat != NO_SEAT:
            self._free_seats.append(sequence.seat)
            sequence.seat = NO_SEAT


def _decode_row(sequence: Sequence) -> BatchRow:
    """The row of the newest token, seen or not; marks it as launched."""
    start = sequence.num_launched
    end = start + 1
    sequence.num_launched = end
    sequence.num_in_flight += 1
    request = sequence.request
    prompt_len, sampling = request.prompt_len, request.sampling
    return BatchRow(
        request.key,
        sequence.number,
        sequence.seat,
        sequence.ids,
        start,
        end,
        sequence.pages,
        prompt_len,
        True,
        sampling,
        request.choice,
        end - prompt_len < sampling.min_tokens,
    )


def _chunk(sequence: Sequence, max_tokens: int) -> BatchRow:
    """The next `max_tokens` of the ids, or as many as are left; marks them as launched."""
    request = sequence.request
    start = sequence.num_launched
    end = min(start + max_tokens, len(sequence.ids))
    sequence.num_launched = end
    sequence.num_in_flight += 1
    is_last = end == len(sequence.ids)
    if is_last:
        sequence.move(SequenceState.RUNNING)
    return BatchRow(
        key=request.key,
        sequence=sequence.number,
        seat=sequence.seat,
        ids=sequence.ids,
        start=start,
        end=end,
        pages=sequence.pages,
        prompt_len=request.prompt_len,
        sample=is_last,
        sampling=request.sampling,
        choice=request.choice,
        forbid_end=is_last and end - request.prompt_len < request.sampling.min_tokens,
    )
