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
- A block is on its way while another sequence computes it, or while a fill brings it from elsewhere: from a peer, or
  from host memory. A fill has pages of its own from its start, found as any others once they are written; who waits for
  them has none, so that a fill that fails leaves nothing behind, and what it brought serves every sequence alike. It
  takes no page that the head of the line needs, and none that nobody gives back: it must end by itself.
- From host memory blocks come for those alone who could be admitted now, for imports and for peers: the scheduler
  begins such a fill when it meets them, and ends it when the copies have ended (`advance`). An import shares the fill's
  pages from the beginning, and runs when both have ended, the copies and what its peer sends.
"""

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Names
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import takewhile

from shared.blocks import PAGE_TOKENS, BlockHash, BlockKey, key_chain, name_of, pages_for, root_hash
from shared.engine.batch import BatchRow, work_of
from shared.engine.port import BlockChanges, EngineLimits, EngineRequest, Fill, Reservation
from shared.engine.sequence import NO_SEAT, Sequence, SequenceState, arrival_of, line_rank_of, num_findable
from shared.kv.block_pool import BlockPool
from shared.kv.host_slots import HostSlots
from shared.kv.host_tier import HostPages, HostTier, Restore
from shared.kv.loan import Loan
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

SHARE_FREE_OF_LOSS = 1 / 8
"""Of the pages, how many are kept free of loss where there is host memory: room for a long prompt that comes at once.
More would have copies of more blocks that are not going yet, and have room for fewer that are gone."""

ACTIVE = frozenset({SequenceState.PREFILLING, SequenceState.RUNNING})
SEATED = ACTIVE | {SequenceState.IMPORTING}


class Scheduler:
    """All sequences of one engine, and its pages.

    Requests are taken as they come: whether one can ever fit is for the engine to ask before.
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
        self._tier: HostTier | None = None
        if host is None:
            self._pool = BlockPool(limits.num_pages)
        else:
            slots = HostSlots(host.num_slots)
            self._pool = BlockPool(limits.num_pages, slots)
            num_ahead = max(2 * pages_for(limits.max_batch_tokens), int(limits.num_pages * SHARE_FREE_OF_LOSS))
            most = max(1, host.num_slots // 2)  # with more it would hold little else than what is not gone
            self._tier = HostTier(self._pool, slots, host, num_ahead=min(num_ahead, most))
        self._sequences: dict[str, Sequence] = {}
        self._line: list[Sequence] = []  # waiting, by line_rank
        self._active: list[Sequence] = []  # prefilling and running, by arrival
        self._held: dict[str, Sequence] = {}
        self._importing: dict[str, Sequence] = {}
        self._landing: dict[Sequence, tuple[int, bool] | None] = {}  # wait for the host; what came meanwhile
        self._coming: dict[BlockKey, Sequence | Fill] = {}  # blocks on their way, and who brings them
        self._fills: set[Fill] = set()
        self._restores: dict[
            Restore, tuple[Fill, Callable[[], None] | None]
        ] = {}  # fills from host memory; who to tell
        self._loans: set[Loan] = set()
        self._leaving: list[Sequence] = []  # ended, with rows in flight
        self._free_seats = list(range(limits.max_running - 1, -1, -1))
        self._num_in_flight = 0
        self._next_arrival = 0
        self._next_number = 0
        self._num_preemptions = 0
        self._num_prefix_queries = 0
        self._num_prefix_hits = 0
        self._num_host_hits = 0

    @property
    def pool(self) -> BlockPool:
        return self._pool

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

    @property
    def num_host_hits(self) -> int:
        """Tokens whose KV was brought back from host memory."""
        return self._num_host_hits

    @property
    def tier(self) -> HostTier | None:
        """What goes from the pages; None: it is gone."""
        return self._tier

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
        copied = self._copied(sequence.keys[len(found) : sequence.num_findable])
        if copied:
            found += self._restore(copied, found, lambda: self._landed(sequence)).pages
            self._landing[sequence] = None
        self._sequences[request.key] = sequence
        sequence.pages = self._acquire(found, num_new - len(copied))
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

    def _landed(self, sequence: Sequence) -> None:
        """What came from host memory for an import is there."""
        arrived = self._landing.pop(sequence, None)
        if arrived is not None:
            token_id, exact = arrived
            self.imported(sequence.request.key, token_id, exact=exact)

    def fill(self, request: EngineRequest, num_pages: int) -> Fill | None:
        """See `Engine.fill`."""
        ids = request.ids[: min(num_pages, num_findable(len(request.ids))) * PAGE_TOKENS]
        return self.fill_blocks(key_chain(root_hash(self._model_fingerprint, request.cache_salt), ids))

    def fill_blocks(self, keys: Names[BlockKey]) -> Fill | None:
        """Pages for those of a prompt's first blocks, `keys`, that are neither here nor on their way.

        The pages are the caller's until `filled`, and so is all of the run behind the first block that lacks.
        """
        found = self._pool.find(keys)
        copied = self._copied(keys[len(found) :])
        _, spare = self._spare_for_import()
        cost = self._pool.cost(found, len(copied))
        if copied and cost <= spare:
            self._restore(copied, found)  # from now on those found cost nothing
            spare -= cost
        first = len(found)
        while first < len(keys) and keys[first] in self._coming:
            first += 1
        lacking = tuple(keys[first:])
        if not lacking:
            return Fill((), ())
        if self._pool.cost(found, len(lacking)) > spare:
            return None
        return self._set_aside(lacking, found)

    def filled(self, fill: Fill, num_arrived: int) -> None:
        """See `Engine.filled`."""
        if not fill.keys:
            return
        self._fills.remove(fill)
        for page, key in zip(fill.pages[:num_arrived], fill.keys, strict=False):
            self._pool.publish(page, key)
        for key in fill.keys:
            if self._coming.get(key) is fill:
                del self._coming[key]
        self._pool.release(fill.found + fill.pages)

    def bring(self, names: Names[BlockHash], over: Callable[[], None]) -> None:
        """See `Engine.bring`."""
        found = self._pool.find_named(names)
        copied = () if self._tier is None else self._tier.find_named(names[len(found) :])
        _, spare = self._spare_for_import()
        if not copied or copied[0] in self._coming or self._pool.cost(found, len(copied)) > spare:
            over()
        else:
            self._restore(copied, found, over)

    def lend(self, names: Names[BlockHash]) -> Loan:
        """See `Engine.lend`."""
        pages = self._acquire(self._pool.find_named(names), 0)
        loan = Loan(pages, tuple(map(self._pool.key_of, pages)))
        self._loans.add(loan)
        return loan

    def give_back(self, loan: Loan) -> None:
        """See `Engine.give_back`."""
        self._loans.remove(loan)
        self._pool.release(loan.pages)

    def abort(self, key: str) -> None:
        """End a sequence in any state. Unknown keys do nothing."""
        sequence = self._sequences.get(key)
        if sequence is not None:
            self.end(sequence)

    # What the engine asks in each step.

    def advance(self, num_computed: int = 0) -> None:
        """Take note of what came from host memory, and go on with what goes there beside a step that computes so many
        pages."""
        if self._tier is None:
            return
        for restore in self._tier.advance(num_computed):
            fill, over = self._restores.pop(restore)
            self.filled(fill, len(fill.keys))
            if over is not None:
                over()

    def take_block_changes(self) -> BlockChanges:
        """See `Engine.take_block_changes`."""
        self.advance()
        stored, evicted = self._pool.take_changes()
        host_stored, host_evicted = ((), ()) if self._tier is None else self._tier.take_changes()
        return BlockChanges(*(tuple(map(name_of, keys)) for keys in (stored, evicted, host_stored, host_evicted)))

    def take_all_blocks(self) -> BlockChanges:
        """See `Engine.take_all_blocks`."""
        self.take_block_changes()
        host_stored = () if self._tier is None else self._tier.hashes
        return BlockChanges(stored=tuple(map(name_of, self._pool.hashes)), host_stored=tuple(map(name_of, host_stored)))

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
            key = sequence.block_key(index)
            self._pool.publish(sequence.pages[index], key)
            if self._coming.get(key) is sequence:
                del self._coming[key]
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
        withdrawn = self._pool.withdraw(sequence.pages)
        if self._tier is not None:
            self._tier.forget(withdrawn)
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

        Who waits for a fill is served when that is over, which its caller tells, or `advance` if it is from the host.
        """
        if self._num_in_flight or self._active or self._restores:
            return True
        first = next(self._in_turn(), None)
        return first is not None and self._fits(*first)

    def check(self) -> None:
        """Raise AssertionError unless pages, seats and states add up."""
        alive = self._sequences.values()
        holders = [sequence.pages for sequence in (*alive, *self._leaving)]
        holders += [fill.found + fill.pages for fill in self._fills] + [loan.pages for loan in self._loans]
        self._pool.check(holders)
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
        if self._tier is not None:
            self._tier.check()
            assert self._landing.keys() <= set(self._importing.values()), "a request lands that is not importing"
            assert self._tier.is_restoring == bool(self._restores), "blocks are awaited from the host that do not come"
        assert all(fill in self._fills for fill, _ in self._restores.values()), "a fill from the host is over before it"
        for bringer in self._coming.values():
            is_alive = bringer in self._fills if isinstance(bringer, Fill) else bringer.state in ACTIVE
            assert is_alive, "a block is awaited from nobody"

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

    def _prefill_cost(self, sequence: Sequence, found: tuple[int, ...]) -> int:
        return self._pool.cost(found, pages_for(len(sequence.ids)) - len(found))

    def _in_turn(self) -> Iterator[tuple[Sequence, tuple[int, ...]]]:
        """The line without those who wait for a block that is on its way, each with the pages found for it."""
        for sequence in self._line:
            if sequence.awaited in self._coming:
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
        return self._num_seats_free - 1, self._pool.num_free - self._prefill_cost(head, self._found(head))

    def _admit(self, budget: int) -> list[tuple[Sequence, bool]]:
        """Move those whose turn it is from the line to a seat; whether each is new (and not preempted before)."""
        admitted: list[tuple[Sequence, bool]] = []
        if self._num_seats_free == 0:
            return admitted
        for sequence, found in self._in_turn():
            if not self._fits(sequence, found):
                break
            copied = self._copied(sequence.keys[len(found) : sequence.num_findable])
            if copied:
                if len(self._restores) >= self._num_seats_free:
                    break  # it could not be seated when it has them
                self._restore(copied, found)
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
        return sequence.awaited in self._coming

    def _seat(self, sequence: Sequence, found: tuple[int, ...]) -> None:
        sequence.move(SequenceState.PREFILLING)
        sequence.is_preempted = False
        sequence.pages = self._acquire(found, pages_for(len(sequence.ids)) - len(found))
        self._take_seat(sequence)
        sequence.num_launched = len(found) * PAGE_TOKENS
        sequence.is_prefilled = True
        self._count_found(sequence, len(found))
        for key in sequence.keys[len(found) :]:
            self._coming.setdefault(key, sequence)
        insort(self._active, sequence, key=arrival_of)

    def _count_found(self, sequence: Sequence, num_found: int) -> None:
        sequence.num_published = num_found
        if self._tier is not None:
            self._tier.used(sequence.keys[:num_found])
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
                sequence.pages += self._acquire((), 1)
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
        for key in sequence.keys[sequence.num_published :]:
            if self._coming.get(key) is sequence:
                del self._coming[key]

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.pages)
        sequence.pages = ()
        self._leave_seat(sequence)

    def _acquire(self, found: tuple[int, ...], num_new: int) -> tuple[int, ...]:
        """`BlockPool.acquire`, for which there must be pages free."""
        if self._tier is not None and self._pool.cost(found, num_new) > self._pool.num_free_at_once:
            self._tier.settle()
        return self._pool.acquire(found, num_new)

    def _set_aside(self, keys: tuple[BlockKey, ...], found: tuple[int, ...]) -> Fill:
        """A fill of pages for blocks that follow those found; there must be pages free."""
        fill = Fill(keys, self._acquire(found, len(keys))[len(found) :], found)
        self._fills.add(fill)
        for key in keys:
            self._coming.setdefault(key, fill)
        return fill

    def _copied(self, keys: Names[BlockKey]) -> tuple[BlockKey, ...]:
        """The longest run of blocks from the first on that are in host memory and that nobody else brings."""
        if self._tier is None:
            return ()
        return tuple(takewhile(lambda key: key not in self._coming, keys[: self._tier.num_found(keys)]))

    def _restore(
        self, keys: tuple[BlockKey, ...], found: tuple[int, ...], over: Callable[[], None] | None = None
    ) -> Fill:
        """Begin to bring blocks from host memory that follow those found; there must be pages free."""
        if self._tier is None:
            raise AssertionError("blocks are brought from nowhere")
        fill = self._set_aside(keys, found)
        self._restores[self._tier.restore(keys, fill.pages)] = fill, over
        self._num_host_hits += len(keys) * PAGE_TOKENS
        return fill

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
