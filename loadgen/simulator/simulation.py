"""A run: rows come, stand in the backlog, are placed by a policy, computed, moved and answered, in virtual time.

    due ──(parent answered?)──> sent ──> backlog ──policy──> prefill ──┬──> decode ──> answered
                                             └──────────────────────> decode (computes the prompt itself)

The backlog, the views and the credits are those of `services/ingest`: its line, whose first waits until there is room,
exact credits, and news of blocks that come late. A policy is asked as ingest asks it.
"""

from collections import deque
from dataclasses import dataclass, replace
from math import floor

from loadgen.simulator.decode import DecodeWorker
from loadgen.simulator.events import Agenda
from loadgen.simulator.hardware import Hardware, WorkerKind
from loadgen.simulator.holders import SegmentHolders
from loadgen.simulator.job import Job
from loadgen.simulator.lengths import Asked, Lengths
from loadgen.simulator.policies import Policy
from loadgen.simulator.prefill import PrefillWorker
from loadgen.simulator.worker import Counts, Worker
from loadgen.simulator.workload import SimRow, Workload
from shared.blocks import PAGE_TOKENS
from shared.policy.line import Claim, Entry, Line
from shared.policy.placement import Chosen, NeverFits, NoRoomNow
from shared.policy.profile import LinkRate
from shared.policy.views import ClusterView, RequestView, WorkerView
from shared.request import Incarnation, Priority, RequestId, WorkerRef

MODEL = "simulated"
ROOM_POLL_S = 0.02
"""As services/ingest: how often the first in line looks for room."""

DEADLINE_S = 600.0
"""Of requests after their arrival, by which the line orders them; it ends none."""

BEAT_S = 0.5
"""How often a worker says how it is, where placements go by that alone."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated beside the workload.

    Attributes:
        speed: of the trace's clock.
        seed: draws when each row comes within its tick, ties, and what a policy draws.
        max_new_tokens: what a request allows its answer that does not state its length; nobody but its engine knows
            where it ends.
        gauges: placements see what workers said of themselves at their last beat, and no credits.
        max_wait_s: a request that would stand in the backlog for longer is refused; None: nobody is.
    """

    hardware: Hardware
    num_prefill: int
    num_decode: int
    speed: float = 1.0
    seed: int = 0
    max_new_tokens: int = 4096
    gauges: bool = False
    max_wait_s: float | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """A run.

    Attributes:
        jobs: all, in the order of the workload's rows.
        duration_s: until the last answer was complete.
        num_held_back: next turns that waited for their parent's answer, against the trace's clock.
    """

    jobs: tuple[Job, ...]
    duration_s: float
    prefill: tuple[Counts, ...]
    decode: tuple[Counts, ...]
    num_held_back: int
    num_no_room: int


class _Credits:
    """What placements took of a worker and have not given back, and its view made of that."""

    __slots__ = ("_is_decode", "_is_stale", "_view", "num", "num_pages", "work_s")

    def __init__(self, view: WorkerView, *, is_decode: bool) -> None:
        self._view = view
        self._is_decode = is_decode
        self._is_stale = False
        self.num = 0
        self.num_pages = 0
        self.work_s = 0.0

    def change(self, num: int, num_pages: int, work_s: float) -> None:
        self.num += num
        self.num_pages += num_pages
        self.work_s = max(0.0, self.work_s + work_s)
        self._is_stale = True

    @property
    def view(self) -> WorkerView:
        """The worker as decisions see it."""
        if self._is_stale:
            self._view = replace(
                self._view,
                num_credits=self.num,
                num_credit_pages=self.num_pages,
                queued_prefill_s=self.work_s,
                num_context_tokens=self.num_pages * PAGE_TOKENS if self._is_decode else 0,
            )
            self._is_stale = False
        return self._view


class Simulation:
    """One run of a workload under a policy."""

    def __init__(self, workload: Workload, policy: Policy, lengths: Lengths, setup: Setup) -> None:
        self._workload = workload
        self._policy = policy
        self._lengths = lengths
        self._setup = setup
        self._hops = setup.hardware.hops
        self._agenda = Agenda()
        self._jobs: dict[int, Job] = {}
        self._children: dict[int, list[SimRow]] = {}
        self._line = Line[Job]()
        self._is_blocked = False
        self._num_placed = 0
        self._num_held_back = 0
        self._num_no_room = 0
        self._news: deque[tuple[float, Incarnation, int, int, bool]] = deque()
        self._holders = SegmentHolders(workload.segment_pages)
        pages, hardware = workload.segment_pages, setup.hardware
        refs = [WorkerRef(slot, Incarnation(f"w{slot}")) for slot in range(setup.num_prefill + setup.num_decode)]
        links = {ref.incarnation: hardware.peer_link for ref in refs}
        self._prefill = [
            PrefillWorker(ref, hardware, self._agenda, self, pages, begun=self._begun, progressed=self._progressed)
            for ref in refs[: setup.num_prefill]
        ]
        self._decode = [
            DecodeWorker(ref, hardware, self._agenda, self, pages, release=self._release)
            for ref in refs[setup.num_prefill :]
        ]
        self._workers: dict[WorkerRef, Worker] = {worker.ref: worker for worker in (*self._prefill, *self._decode)}
        self._credits = {
            worker.ref: _Credits(
                _first_view(worker.ref, worker.kind, hardware, links), is_decode=isinstance(worker, DecodeWorker)
            )
            for worker in self._workers.values()
        }
        self._gauges: ClusterView | None = None
        self._gauges_read_s = 0.0

    def run(self) -> Finished:
        """Simulate all of it."""
        for row, at_s in zip(
            self._workload.rows, self._workload.times(self._setup.seed, self._setup.speed), strict=True
        ):
            self._agenda.at(at_s, self._due, row)
        self._agenda.run()
        jobs = tuple(self._jobs[row.index] for row in self._workload.rows)
        return Finished(
            jobs=jobs,
            duration_s=max((job.last_token_s or job.arrived_s) for job in jobs),
            prefill=tuple(worker.counts for worker in self._prefill),
            decode=tuple(worker.counts for worker in self._decode),
            num_held_back=self._num_held_back,
            num_no_room=self._num_no_room,
        )

    def check_empty(self) -> None:
        """Raise AssertionError unless every page and every credit is back."""
        assert not len(self._line), "somebody waits for ever"
        for ref, worker in self._workers.items():
            worker.pool.check(())
            assert worker.num_seats_free == worker.kind.max_running, f"{ref}: a seat is taken"
            credits_left = self._credits[ref]
            assert not credits_left.num, f"{ref}: credits are not given back"
            assert not credits_left.num_pages, f"{ref}: credits are not given back"
            assert credits_left.work_s < 1e-6, f"{ref}: work is not given back"

    # Clients.

    def _due(self, row: SimRow) -> None:
        """Send it, or wait for the answer that it goes on from."""
        parent = None if row.parent is None else self._jobs.get(row.parent)
        if row.parent is None or (parent is not None and parent.is_over):
            self._send(row)
        else:
            self._num_held_back += 1
            self._children.setdefault(row.parent, []).append(row)

    def _send(self, row: SimRow) -> None:
        job = self._jobs[row.index] = Job(row, self._agenda.now_s)
        self._agenda.at(self._agenda.now_s + self._hops.placed_s, self._stand_in_line, job)

    def _ended(self, job: Job) -> None:
        """The client has all of the answer, or a refusal."""
        job.is_over = True
        for row in self._children.pop(job.row.index, ()):
            self._send(row)

    # Ingest.

    def _stand_in_line(self, job: Job) -> None:
        expected, _ = self._lengths.predict(job.row, self._asked(job.row))
        patience_s = DEADLINE_S if self._setup.max_wait_s is None else self._setup.max_wait_s
        deadline_s = job.arrived_s + patience_s
        self._line.add(job, Claim(Priority.STANDARD, job.row.source, deadline_s, job.row.num_input + expected))
        if not self._is_blocked:
            self._place_all()

    def _place_all(self) -> None:
        """Place whom there is room for; others wait until something is given back."""
        self._is_blocked = False
        while (first := self._line.first()) is not None:
            late = None if self._setup.max_wait_s is None else self._line.late(self._agenda.now_s)
            if late is not None:
                self._line.leave(late)
                self._refuse(late.item, "waited too long")
            elif not self._settle(first) and not any(self._settle(entry) for entry in self._line.overtakers()):
                self._num_no_room += 1
                self._is_blocked = True
                if self._setup.gauges:
                    self._agenda.at(self._gauges_read_s + BEAT_S, self._room_changed)
                return

    def _settle(self, entry: Entry[Job]) -> bool:
        """Place it, or refuse what can never be; False: there is no room for it now."""
        job = entry.item
        decision = self._policy.decide(
            self._request_view(job), self._cluster_view(), self._holders, tie_break=self._num_placed
        )
        match decision:
            case NoRoomNow():
                return False
            case NeverFits():
                self._line.leave(entry)
                self._refuse(job, f"it can have {decision.limit_tokens} tokens")
            case Chosen():
                self._line.place(entry)
                self._dispatch(job, decision)
        return True

    def _refuse(self, job: Job, reason: str) -> None:
        job.refusal = reason
        self._ended(job)

    def _room_changed(self) -> None:
        """The first in line looks again at its next poll."""
        if self._is_blocked:
            self._is_blocked = False
            next_poll_s = (floor(self._agenda.now_s / ROOM_POLL_S) + 1) * ROOM_POLL_S
            self._agenda.at(next_poll_s, self._place_all)

    def _request_view(self, job: Job) -> RequestView:
        row, asked = job.row, self._asked(job.row)
        expected, reserve = self._lengths.predict(row, asked)
        return RequestView(
            request_id=RequestId(f"r{row.index}"),
            choice=0,
            model=MODEL,
            num_tokens=row.num_input,
            max_new_tokens=asked.at_most,
            expected_new_tokens=expected,
            usual_new_tokens=self._lengths.usual(),
            reserve_new_tokens=reserve,
            blocks=row.prompt,  # pyright: ignore[reportArgumentType] - a sequence that a policy hands to Holders
        )

    def _asked(self, row: SimRow) -> Asked:
        if self._workload.states_lengths:
            return Asked(row.num_output, row.num_output)
        return Asked(1, self._setup.max_new_tokens)

    def _cluster_view(self) -> ClusterView:
        now_s, news = self._agenda.now_s, self._news
        while news and news[0][0] <= now_s:
            _, holder, segment, num_pages, on_host = news.popleft()
            self._holders.note(holder, segment, num_pages, on_host=on_host)
        if self._setup.gauges:
            if self._gauges is None or now_s - self._gauges_read_s >= BEAT_S:
                self._gauges, self._gauges_read_s = self._read_gauges(), now_s
            return self._gauges
        return ClusterView(
            tuple(self._credits[worker.ref].view for worker in self._prefill),
            tuple(self._credits[worker.ref].view for worker in self._decode),
        )

    def _read_gauges(self) -> ClusterView:
        def gauge(worker: Worker) -> WorkerView:
            prompts = [*worker.queue.active, *worker.queue.line]
            left_s = sum(
                worker.kind.speeds.prefill_s(prompt.num_tokens - prompt.num_computed, prompt.num_computed)
                for prompt in prompts
            )
            return replace(
                self._credits[worker.ref].view,
                num_credits=worker.kind.max_running - worker.num_seats_free + len(worker.queue.line),
                num_credit_pages=worker.pool.num_in_use,
                queued_prefill_s=left_s,
                num_context_tokens=worker.num_context_tokens if isinstance(worker, DecodeWorker) else 0,
            )

        return ClusterView(tuple(map(gauge, self._prefill)), tuple(map(gauge, self._decode)))

    def _dispatch(self, job: Job, chosen: Chosen) -> None:
        self._num_placed += 1
        job.placed_s = self._agenda.now_s
        job.chosen = chosen
        job.is_local = chosen.prefill == chosen.decode
        if not job.is_local:
            self._credits[chosen.prefill].change(1, chosen.num_prefill_pages, chosen.prefill_s)
        work_s = chosen.prefill_s if job.is_local else 0.0
        self._credits[chosen.decode].change(1, chosen.num_decode_pages, work_s)
        source = None if chosen.fetch is None else self._workers[chosen.fetch.source]
        num_pages = 0 if chosen.fetch is None else chosen.fetch.num_pages
        worker = self._workers[chosen.prefill]
        assert isinstance(worker, PrefillWorker | DecodeWorker)
        self._agenda.at(self._agenda.now_s + self._hops.work_s, worker.take, job, source, num_pages)

    # What workers tell.

    def blocks_changed(self, holder: Incarnation, segment: int, num_pages: int, *, on_host: bool) -> None:
        self._news.append((self._agenda.now_s + self._hops.feed_s, holder, segment, num_pages, on_host))

    def computed(self, job: Job) -> None:
        """The work of its prompt is done."""
        assert job.chosen is not None
        self._credits[job.chosen.prefill].change(0, 0, -job.chosen.prefill_s)

    def first_token(self, job: Job) -> None:
        assert job.chosen is not None
        job.first_token_s = self._agenda.now_s + self._hops.frame_s
        if not job.is_local and job.row.num_output > 1:
            decode = self._workers[job.chosen.decode]
            assert isinstance(decode, DecodeWorker)
            self._agenda.at(self._agenda.now_s + self._hops.token_s, decode.token_came, job)

    def pulled(self, job: Job) -> None:
        """Its prefill worker has no part in it any more."""
        assert job.chosen is not None
        self._credits[job.chosen.prefill].change(-1, -job.chosen.num_prefill_pages, 0.0)
        self._room_changed()

    def finished(self, job: Job, at_s: float) -> None:
        assert job.chosen is not None
        job.last_token_s = at_s + self._hops.frame_s
        self._credits[job.chosen.decode].change(-1, -job.chosen.num_decode_pages, 0.0)
        self._lengths.learn(job.row, self._asked(job.row))
        self._room_changed()
        self._agenda.at(job.last_token_s, self._ended, job)

    def _begun(self, job: Job) -> None:
        self._decode_of(job).begun(job)

    def _progressed(self, job: Job) -> None:
        self._decode_of(job).progressed(job)

    def _release(self, job: Job) -> None:
        assert job.chosen is not None
        worker = self._workers[job.chosen.prefill]
        assert isinstance(worker, PrefillWorker)
        worker.give_up(job)

    def _decode_of(self, job: Job) -> DecodeWorker:
        assert job.chosen is not None
        worker = self._workers[job.chosen.decode]
        assert isinstance(worker, DecodeWorker)
        return worker


def _first_view(ref: WorkerRef, kind: WorkerKind, hardware: Hardware, links: dict[Incarnation, LinkRate]) -> WorkerView:
    return WorkerView(
        ref=ref,
        model=MODEL,
        num_pages=kind.num_pages,
        num_credit_pages=0,
        num_credits=0,
        max_running=kind.max_running,
        max_context=hardware.max_context,
        layout_fingerprint="",
        max_batch_tokens=kind.max_batch_tokens,
        page_bytes=hardware.page_bytes,
        profile=kind.speeds,
        links=links,
        queued_prefill_s=0.0,
        num_context_tokens=0,
        takes_work=True,
    )


def simulate(workload: Workload, policy: Policy, lengths: Lengths, setup: Setup) -> Finished:
    """Run it; every page and credit is back at the end."""
    simulation = Simulation(workload, policy, lengths, setup)
    finished = simulation.run()
    simulation.check_empty()
    return finished
