"""Decides what each step computes, and which sequence holds which pages meanwhile.

One idea: in every step a sequence's tokens computed catch up with its tokens wanted, as far as the step's token budget
allows. A decode row is the case where one token is missing, a prefill chunk the case where many are.

- A seat is held from admission (or `reserve`) to the end: running, prefilling and importing sequences together never
  exceed `max_running`, so an import always can run, and each prefilling sequence finds budget beside the decode rows.
- Admission takes pages for all ids at once; afterwards a sequence asks for one more page each PAGE_TOKENS tokens.
- Who lacks that page takes it from the youngest sequence that runs or prefills, which may be itself. Held and
  importing sequences keep theirs.
- The line is served in order: preempted ones by age, then new ones by age. Nobody overtakes the head, an import
  neither; only a sequence whose next block is being computed by another one steps aside until that is done.
"""

from bisect import insort
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from shared.blocks import PAGE_TOKENS, BlockHash, pages_for, root_hash
from shared.engine.batch import BatchRow
from shared.engine.port import EngineLimits, EngineRequest, Reservation
from shared.engine.sequence import Sequence, SequenceState, arrival_of, line_rank_of
from shared.kv.block_pool import BlockPool


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work.

    Attributes:
        rows: what to compute.
        sequences: whose it is; one for each row.
        started: keys of requests whose first chunk this is.
    """

    rows: tuple[BatchRow, ...]
    sequences: tuple[Sequence, ...]
    started: tuple[str, ...]


class Scheduler:
    """All sequences of one engine, and its pages.

    Requests are taken as they come: whether one can ever fit is for the engine to ask before.
    """

    def __init__(self, limits: EngineLimits, model_fingerprint: str) -> None:
        if limits.max_running < 1:
            raise ValueError(f"max_running is {limits.max_running}, it must be 1 or more")
        if limits.max_batch_tokens < limits.max_running:
            raise ValueError(
                f"max_batch_tokens is {limits.max_batch_tokens}, it must be max_running ({limits.max_running}) or more:"
                " a step computes a token of every running request"
            )
        self._limits = limits
        self._model_fingerprint = model_fingerprint
        self._pool = BlockPool(limits.num_pages)
        self._sequences: dict[str, Sequence] = {}
        self._line: list[Sequence] = []  # waiting, by line_rank
        self._active: list[Sequence] = []  # prefilling and running, by arrival
        self._held: dict[str, Sequence] = {}
        self._importing: dict[str, Sequence] = {}
        self._computing: dict[BlockHash, Sequence] = {}  # blocks on their way, and who computes them
        self._next_arrival = 0
        self._num_preemptions = 0
        self._num_prefix_queries = 0
        self._num_prefix_hits = 0

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
        num_new = pages_for(len(sequence.ids) - 1) - len(found)
        if self._pool.cost(found, num_new) > pages:
            return None
        self._sequences[request.key] = sequence
        sequence.pages = self._pool.acquire(found, num_new)
        self._count_found(sequence, len(found))
        self._importing[request.key] = sequence
        return Reservation(pages=sequence.pages, num_cached_pages=len(found))

    def imported(self, key: str) -> None:
        """The import's KV is complete. Raises KeyError for a request that is not importing."""
        sequence = self._importing.pop(key)
        sequence.move(SequenceState.RUNNING)
        insort(self._active, sequence, key=arrival_of)
        self.computed_to(sequence, len(sequence.ids) - 1)

    def abort(self, key: str) -> None:
        """End a sequence in any state. Unknown keys do nothing."""
        sequence = self._sequences.get(key)
        if sequence is not None:
            self.end(sequence)

    # What the engine asks in each step.

    def schedule(self) -> Batch:
        """The next batch: decode rows, then chunks of what is prefilling, then of what is admitted; each by age."""
        budget = self._limits.max_batch_tokens
        sequences: list[Sequence] = []
        rows: list[BatchRow] = []
        for sequence in tuple(self._active):
            # The state is asked again for each: those behind may be preempted on the way.
            if sequence.state is SequenceState.RUNNING and self._grow(sequence):
                sequences.append(sequence)
                rows.append(_row(sequence, 1))
        budget -= len(rows)
        prefilling = [sequence for sequence in self._active if sequence.state is SequenceState.PREFILLING]
        started: list[str] = []
        for sequence in prefilling:
            if not budget:
                break
            sequences.append(sequence)
            rows.append(_row(sequence, budget))
            budget -= rows[-1].end - rows[-1].start
        if budget and self._line:
            for sequence, is_new in self._admit(budget):
                sequences.append(sequence)
                rows.append(_row(sequence, budget))
                budget -= rows[-1].end - rows[-1].start
                if is_new:
                    started.append(sequence.request.key)
        return Batch(tuple(rows), tuple(sequences), tuple(started))

    def computed_to(self, sequence: Sequence, end: int) -> None:
        """KV of the positions below `end` is in the pages: publish the blocks that are full now."""
        sequence.num_computed = end
        while sequence.num_published < end // PAGE_TOKENS:
            index = sequence.num_published
            block_hash = sequence.block_hash(index)
            self._pool.publish(sequence.pages[index], block_hash)
            if self._computing.get(block_hash) is sequence:
                del self._computing[block_hash]
            sequence.num_published += 1

    def extend(self, sequence: Sequence, token_id: int) -> None:
        """The token after all computed ids is known, and its successor is wanted."""
        sequence.ids.append(token_id)
        if sequence.state is not SequenceState.RUNNING:
            sequence.move(SequenceState.RUNNING)

    def hold(self, sequence: Sequence) -> None:
        """The sequence gives up its seat and keeps its pages."""
        sequence.move(SequenceState.HELD)
        self._active.remove(sequence)
        self._held[sequence.request.key] = sequence

    def fail(self, sequence: Sequence) -> None:
        """End a sequence whose KV is not to be trusted: nobody shall find any of its pages."""
        self._pool.withdraw(sequence.pages)
        self.end(sequence)

    def end(self, sequence: Sequence) -> None:
        """Forget a sequence and free what it has."""
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
            case SequenceState.ENDED:
                raise AssertionError("no sequence ends twice")
        self._free_pages(sequence)
        del self._sequences[key]

    def has_work(self) -> bool:
        """Whether `schedule` has anybody to serve. (With no one active nothing is being computed, so none waits.)"""
        return bool(self._active) or (bool(self._line) and self._fits(self._line[0]))

    def check(self) -> None:
        """Raise AssertionError unless pages, seats and states add up."""
        self._pool.check(sequence.pages for sequence in self._sequences.values())
        groups: tuple[tuple[Iterable[Sequence], set[SequenceState]], ...] = (
            (self._line, {SequenceState.WAITING}),
            (self._active, {SequenceState.PREFILLING, SequenceState.RUNNING}),
            (self._held.values(), {SequenceState.HELD}),
            (self._importing.values(), {SequenceState.IMPORTING}),
        )
        listed: Counter[str] = Counter()
        for members, states in groups:
            for sequence in members:
                assert sequence.state in states, f"{sequence.request.key} is listed apart from its state"
                listed[sequence.request.key] += 1
        assert listed == Counter(self._sequences.keys()), "a sequence is listed twice or not at all"
        assert self._num_seats_free >= 0, "more sequences have a seat than max_running"
        assert self._line == sorted(self._line, key=line_rank_of), "the line is out of order"
        assert self._active == sorted(self._active, key=arrival_of), "active sequences are out of order"
        for sequence in self._sequences.values():
            assert len(sequence.pages) * PAGE_TOKENS >= sequence.num_computed, "more is computed than pages hold"
            assert sequence.num_published <= len(sequence.pages), "more is published than the pages there are"
            assert sequence.pages or sequence.state is not SequenceState.PREFILLING, "prefilling without pages"
            assert not sequence.pages or sequence.state is not SequenceState.WAITING, "waiting with pages"
        for sequence in self._computing.values():
            assert sequence.state in (SequenceState.PREFILLING, SequenceState.RUNNING), "a block is awaited from nobody"

    # Inside.

    @property
    def _num_seats_free(self) -> int:
        return self._limits.max_running - len(self._active) - len(self._importing)

    def _new_sequence(self, request: EngineRequest, state: SequenceState) -> Sequence:
        root = root_hash(self._model_fingerprint, request.cache_salt)
        self._next_arrival += 1
        return Sequence(request, self._next_arrival, root, state)

    def _found(self, sequence: Sequence) -> tuple[int, ...]:
        return self._pool.find(sequence.hashes[: sequence.num_findable])

    def _prefill_cost(self, sequence: Sequence, found: tuple[int, ...]) -> int:
        return self._pool.cost(found, pages_for(len(sequence.ids)) - len(found))

    def _fits(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence could be admitted now."""
        return self._num_seats_free > 0 and self._prefill_cost(sequence, self._found(sequence)) <= self._pool.num_free

    def _spare_for_import(self) -> tuple[int, int]:
        """Seats and pages beyond what the head of the line needs: a stream of imports must not starve it."""
        if not self._line:
            return self._num_seats_free, self._pool.num_free
        head = self._line[0]
        return self._num_seats_free - 1, self._pool.num_free - self._prefill_cost(head, self._found(head))

    def _admit(self, budget: int) -> list[tuple[Sequence, bool]]:
        """Move those whose turn it is from the line to a seat; whether each is new (and not preempted before)."""
        admitted: list[tuple[Sequence, bool]] = []
        for sequence in self._line:
            if budget <= 0 or self._num_seats_free == 0:
                break
            if sequence.awaited in self._computing:
                continue
            found = self._found(sequence)
            if self._awaits_block(sequence, len(found)):
                continue
            if self._prefill_cost(sequence, found) > self._pool.num_free:
                break
            admitted.append((sequence, not sequence.is_preempted))
            self._seat(sequence, found)
            budget -= len(sequence.ids) - sequence.num_computed
        if admitted:
            self._line = [sequence for sequence in self._line if sequence.state is SequenceState.WAITING]
        return admitted

    def _awaits_block(self, sequence: Sequence, num_found: int) -> bool:
        """Whether the block after those found is on its way; noted, so that the next look costs one look-up."""
        sequence.awaited = sequence.hashes[num_found] if num_found < sequence.num_findable else None
        return sequence.awaited in self._computing

    def _seat(self, sequence: Sequence, found: tuple[int, ...]) -> None:
        sequence.move(SequenceState.PREFILLING)
        sequence.is_preempted = False
        sequence.pages = self._pool.acquire(found, pages_for(len(sequence.ids)) - len(found))
        sequence.num_computed = len(found) * PAGE_TOKENS
        self._count_found(sequence, len(found))
        for block_hash in sequence.hashes[len(found) :]:
            self._computing.setdefault(block_hash, sequence)
        insort(self._active, sequence, key=arrival_of)

    def _count_found(self, sequence: Sequence, num_found: int) -> None:
        sequence.num_published = num_found
        if sequence.num_cached_tokens is not None:
            return
        sequence.num_cached_tokens = min(num_found * PAGE_TOKENS, sequence.request.prompt_len)
        self._num_prefix_queries += len(sequence.ids)
        self._num_prefix_hits += num_found * PAGE_TOKENS

    def _grow(self, sequence: Sequence) -> bool:
        """Give a running sequence the page for its newest id; false if it was itself the youngest and is preempted."""
        if pages_for(len(sequence.ids)) == len(sequence.pages):
            return True
        while self._pool.num_free == 0:
            youngest = self._active[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.pages += self._pool.acquire((), 1)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        sequence.move(SequenceState.WAITING)
        self._active.remove(sequence)
        self._free_pages(sequence)
        sequence.num_computed = 0
        sequence.num_published = 0
        sequence.is_preempted = True
        insort(self._line, sequence, key=line_rank_of)
        self._num_preemptions += 1

    def _free_pages(self, sequence: Sequence) -> None:
        self._pool.release(sequence.pages)
        sequence.pages = ()
        for block_hash in sequence.hashes[sequence.num_published :]:
            if self._computing.get(block_hash) is sequence:
                del self._computing[block_hash]


def _row(sequence: Sequence, max_tokens: int) -> BatchRow:
    """The next `max_tokens` positions of the sequence, or as many as are left."""
    request = sequence.request
    end = min(sequence.num_computed + max_tokens, len(sequence.ids))
    sample = end == len(sequence.ids)
    return BatchRow(
        key=request.key,
        ids=sequence.ids,
        start=sequence.num_computed,
        end=end,
        pages=sequence.pages[: pages_for(end)],
        prompt_len=request.prompt_len,
        sample=sample,
        sampling=request.sampling,
        choice=request.choice,
        forbid_end=sample and sequence.index < request.sampling.min_tokens,
    )
