"""A simulated decode worker.

Between two changes of its batch all steps take what a formula says: each reads one position more of every row than the
one before. So the worker jumps from change to change: a request comes or ends, the pages run out. Only beside prompts
that it computes itself it goes step by step.
"""

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from math import ceil, sqrt

from loadgen.simulator.events import Agenda
from loadgen.simulator.hardware import Hardware
from loadgen.simulator.job import Job
from loadgen.simulator.pages import Pinned
from loadgen.simulator.prompts import Prompt
from loadgen.simulator.worker import Told, Worker
from shared.blocks import PAGE_TOKENS, pages_for
from shared.policy.profile import StepWork
from shared.request import WorkerRef

ROUNDING_S = 1e-9


class Seat:
    """A request's place at its decode worker.

    Attributes:
        number: in the order of coming.
        num_pulled_pages: on their way or there, or found here.
        has_kv, has_token: what it waits for before it joins the batch.
        joined_at, ends_at: counts of steps of the worker; `ends_at` is behind its last token.
        num_kv: positions computed when it joined.
    """

    __slots__ = (
        "ends_at",
        "has_kv",
        "has_token",
        "is_running",
        "job",
        "joined_at",
        "kv",
        "num_kv",
        "num_pulled_pages",
        "number",
    )

    def __init__(self, job: Job, kv: Pinned, number: int) -> None:
        self.job = job
        self.kv = kv
        self.number = number
        self.num_pulled_pages = 0
        self.has_kv = False
        self.has_token = False
        self.is_running = False
        self.joined_at = 0
        self.ends_at = 0
        self.num_kv = 0


class DecodeWorker(Worker):
    """Runs answers to their end.

    Args:
        release: gives back a prefill worker's pages of a request whose KV has come.
    """

    def __init__(
        self,
        ref: WorkerRef,
        hardware: Hardware,
        agenda: Agenda,
        told: Told,
        lengths: tuple[int, ...],
        *,
        release: Callable[[Job], None],
    ) -> None:
        super().__init__(ref, hardware.decode, hardware, agenda, told, lengths)
        self._release_source = release
        self._tickets: deque[Job] = deque()
        self._seats: dict[Job, Seat] = {}
        self._rows: dict[Seat, None] = {}
        self._by_end: list[tuple[int, int, Seat]] = []
        self._starts_page = [0] * PAGE_TOKENS
        """Rows that need a new page in step s, at s modulo PAGE_TOKENS."""
        self._num_steps = 0
        self._boundary_s = 0.0
        self._num_context = 0
        self._in_step = False
        self._plan_number = 0
        self._next_number = 0
        self._grown = Pinned()
        """Pages that rows took for their answers so far."""
        self._joining: list[Seat] = []

    @property
    def num_running(self) -> int:
        return len(self._rows)

    @property
    def num_context_tokens(self) -> int:
        return self._num_context

    # Requests whose prompt another worker computes.

    def begun(self, job: Job) -> None:
        """A ticket: prefill has begun."""
        self._tickets.append(job)
        self.wake()

    def progressed(self, job: Job) -> None:
        """More of its KV is computed, or all of it."""
        seat = self._seats.get(job)
        if seat is not None:
            self._pull(seat)

    def token_came(self, job: Job) -> None:
        """Its first token, behind the ticket."""
        seat = self._seats.get(job)
        if seat is not None:
            seat.has_token = True
            self._join_if_ready(seat)

    def _reserve(self) -> None:
        """Room for those whose tickets came first, beyond what the first prompt in line here needs."""
        while self._tickets:
            job = self._tickets[0]
            segments = job.row.prompt.segments
            found = self.pool.find(segments)
            num_new = pages_for(job.row.num_input) - found.num_pages
            num_kept = self.queue.need_of_first()
            seats_kept = 1 if self.queue.line else 0
            if self._num_seats_free <= seats_kept or found.cost + num_new + num_kept > self.pool.num_free:
                return
            self._tickets.popleft()
            self._num_seats_free -= 1
            kv = self.pool.acquire(segments, found, num_new)
            seat = self._new_seat(job, kv)
            seat.num_pulled_pages = found.num_pages
            self._pull(seat)
            token_s = self._hardware.hops.token_s
            seat.has_token = job.prefill_ended_s is not None and job.prefill_ended_s + token_s <= self._agenda.now_s

    def _new_seat(self, job: Job, kv: Pinned) -> Seat:
        self._next_number += 1
        seat = self._seats[job] = Seat(job, kv, self._next_number)
        return seat

    def _pull(self, seat: Seat) -> None:
        job = seat.job
        num_pages = max(0, job.num_computed_pages - seat.num_pulled_pages)
        seat.num_pulled_pages += num_pages
        end_s = self._peer_wire.send(self._agenda.now_s, num_pages * self._hardware.page_bytes)
        if job.prefill_ended_s is not None:
            self._agenda.at(end_s, self._pulled, seat)

    def _pulled(self, seat: Seat) -> None:
        self._release_source(seat.job)
        self._told.pulled(seat.job)
        seat.has_kv = True
        self._join_if_ready(seat)

    def _join_if_ready(self, seat: Seat) -> None:
        if not (seat.has_kv and seat.has_token) or seat.is_running:
            return
        seat.is_running = True
        for segment in seat.job.row.prompt.segments:
            self.pool.publish(seat.kv, segment)
        if self._in_step:
            self._joining.append(seat)
        else:
            self._advance()
            self._join(seat, seat.job.row.num_input)
            self._plan()

    # Prompts that are computed here.

    def take(self, job: Job, source: Worker | None, num_source_pages: int) -> None:
        """Work has come for a request whose prompt is to be computed here too."""
        self.counts.num_local_prefills += 1
        prompt = Prompt(job, job.row.num_input, job.row.prompt.segments, self._lengths)
        self.take_prompt(prompt, source, num_source_pages)

    def _admitted(self, prompt: Prompt) -> None:
        if not prompt.job.num_made:
            prompt.job.num_cached = prompt.num_computed
        assert prompt.kv is not None
        self._new_seat(prompt.job, prompt.kv)

    def wake(self) -> None:
        self._advance()
        self._reserve()
        self._plan()

    def _prompt_ended(self, prompt: Prompt) -> None:
        job = prompt.job
        seat = self._seats[job]
        job.num_made += 1
        if job.num_made == 1:
            job.prefill_ended_s = self._agenda.now_s
            self._told.computed(job)
            self._told.first_token(job)
        if job.num_made == job.row.num_output:
            seat.num_kv = prompt.num_tokens
            self._complete(seat, prompt.num_tokens, self._agenda.now_s)
        else:
            self._join(seat, prompt.num_tokens)

    # The batch.

    def _join(self, seat: Seat, num_kv: int) -> None:
        """Into the batch, from the step on that comes next."""
        job = seat.job
        seat.is_running = True
        seat.joined_at = self._num_steps
        seat.ends_at = self._num_steps + job.row.num_output - job.num_made
        seat.num_kv = num_kv
        self._rows[seat] = None
        self._num_context += num_kv + 1
        self._starts_page[(self._num_steps - num_kv) % PAGE_TOKENS] += 1
        heappush(self._by_end, (seat.ends_at, seat.number, seat))

    def _leave(self, seat: Seat) -> int:
        """Out of the batch; the positions that are computed."""
        num_made = self._num_steps - seat.joined_at
        num_kv = seat.num_kv + num_made
        seat.is_running = False
        seat.job.num_made += num_made
        del self._rows[seat]
        self._num_context -= num_kv + 1
        self._starts_page[(seat.joined_at - seat.num_kv) % PAGE_TOKENS] -= 1
        num_grown = pages_for(num_kv) - pages_for(seat.num_kv)
        self._grown.num_own -= num_grown
        seat.kv.num_own += num_grown
        return num_kv

    def _time_of(self, num_steps: int) -> float:
        speeds, rows = self.kind.speeds, len(self._rows)
        first_s = speeds.decode_step_s(rows, self._num_context)
        return num_steps * first_s + speeds.context_s * rows * num_steps * (num_steps - 1) / 2

    def _steps_within(self, time_s: float) -> int:
        """Fewest steps that take at least so long."""
        speeds, rows = self.kind.speeds, len(self._rows)
        first_s = speeds.decode_step_s(rows, self._num_context)
        growth_s = speeds.context_s * rows
        if growth_s < 1e-15:
            return ceil((time_s - ROUNDING_S) / first_s)
        half = first_s - growth_s / 2
        exact = (sqrt(half * half + 2 * growth_s * time_s) - half) / growth_s
        return max(1, ceil(exact - 1e-6))

    def _advance(self) -> None:
        """Go to the first end of a step that is not before now."""
        now_s = self._agenda.now_s
        if self._in_step:
            return
        while self._rows and self._boundary_s < now_s - ROUNDING_S:
            num_steps = min(self._steps_within(now_s - self._boundary_s), self._steps_to_change())
            if num_steps:
                self._do_steps(num_steps)
                self._end_rows()
            else:
                self._preempt()
        if not self._rows:
            self._boundary_s = max(self._boundary_s, now_s)

    def _do_steps(self, num_steps: int) -> None:
        step_s = self._time_of(num_steps)
        self.counts.busy_s += step_s
        self._boundary_s += step_s
        self._grow(num_steps)
        self._num_steps += num_steps
        self._num_context += num_steps * len(self._rows)

    def _grow(self, num_steps: int) -> None:
        """Pages for the tokens of the next steps; whose they are does not matter before a row leaves."""
        self.pool.take(self._grown, self._num_new_pages(num_steps))

    def _num_new_pages(self, num_steps: int) -> int:
        whole, rest = divmod(num_steps, PAGE_TOKENS)
        starts, first = self._starts_page, self._num_steps
        return whole * len(self._rows) + sum(starts[(first + k) % PAGE_TOKENS] for k in range(rest))

    def _steps_to_change(self) -> int:
        """Steps until the first row ends, or the pages run out."""
        by_end = self._by_end
        while not by_end[0][2].is_running:
            heappop(by_end)
        num_steps = by_end[0][0] - self._num_steps
        num_free = self.pool.num_free
        if len(self._rows) * (num_steps // PAGE_TOKENS + 1) > num_free:
            num_new = 0
            for step in range(num_steps):
                num_new += self._starts_page[(self._num_steps + step) % PAGE_TOKENS]
                if num_new > num_free:
                    return step
        return num_steps

    def _end_rows(self) -> None:
        """Those whose last token this step made."""
        by_end = self._by_end
        while by_end and by_end[0][0] <= self._num_steps:
            _, _, seat = heappop(by_end)
            if seat.is_running and seat.ends_at <= self._num_steps and seat in self._rows:
                num_kv = self._leave(seat)
                self._agenda.at(self._boundary_s, self._complete, seat, num_kv, self._boundary_s)

    def _complete(self, seat: Seat, num_kv: int, at_s: float) -> None:
        num_pages = num_kv // PAGE_TOKENS
        for segment in seat.job.row.path:
            num_pages -= self._lengths[segment]
            if num_pages < 0:
                break
            self.pool.publish(seat.kv, segment)
        self._free(seat)
        self._told.finished(seat.job, at_s)
        self.wake()

    def _free(self, seat: Seat) -> None:
        self.pool.release(seat.kv)
        self._num_seats_free += 1
        del self._seats[seat.job]

    def _preempt(self) -> None:
        """The youngest gives its pages up and is computed again, before whoever else is in line."""
        seat = max(self._rows, key=lambda row: row.number)
        self._leave(seat)
        self._free(seat)
        job = seat.job
        job.num_preemptions += 1
        self.counts.num_preemptions += 1
        self.queue.line.appendleft(Prompt(job, job.row.num_input + job.num_made, job.row.path, self._lengths))

    def _plan(self) -> None:
        """Say when the batch changes next, if nothing happens before."""
        if self._in_step:
            return
        self._plan_number += 1
        if self.queue:
            if self._boundary_s > self._agenda.now_s + ROUNDING_S:
                self._agenda.at(self._boundary_s, self._changes, self._plan_number)
                return
            if self._start_mixed_step():
                return
        while self._rows:
            num_steps = self._steps_to_change()
            if num_steps:
                self._agenda.at(self._boundary_s + self._time_of(num_steps), self._changes, self._plan_number)
                return
            self._preempt()

    def _changes(self, plan_number: int) -> None:
        if plan_number == self._plan_number:
            self._advance()
            self._plan()

    def _start_mixed_step(self) -> bool:
        """A step of all rows beside chunks of prompts; False if no prompt can be begun now."""
        while self._rows and self._num_new_pages(1) > self.pool.num_free:
            self._preempt()
        num_new = self._num_new_pages(1)
        self.pool.take(self._grown, num_new)
        chunks, num_tokens, num_pairs = self.queue.chunks(self.kind.max_batch_tokens - len(self._rows))
        if not chunks:
            self.pool.give_back(self._grown, num_new)
            return False
        step_s = self.kind.speeds.step_s(StepWork(len(self._rows), self._num_context, num_tokens, num_pairs))
        self.counts.busy_s += step_s
        self._in_step = True
        self._boundary_s = self._agenda.now_s + step_s
        self._agenda.at(self._boundary_s, self._mixed_step_ended, chunks)
        return True

    def _mixed_step_ended(self, chunks: list[tuple[Prompt, int]]) -> None:
        self._num_steps += 1
        self._num_context += len(self._rows)
        self._end_rows()
        for prompt, count in chunks:
            if self.queue.computed(prompt, count):
                self._prompt_ended(prompt)
        for seat in self._joining:
            self._join(seat, seat.job.row.num_input)
        self._joining.clear()
        self._in_step = False
        self._reserve()
        self._plan()
