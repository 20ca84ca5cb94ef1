"""A simulated prefill worker: whole steps of chunks, first come first served."""

from collections.abc import Callable

from loadgen.simulator.events import Agenda
from loadgen.simulator.hardware import Hardware
from loadgen.simulator.job import Job
from loadgen.simulator.prompts import Prompt
from loadgen.simulator.worker import Told, Worker
from shared.blocks import PAGE_TOKENS, pages_for
from shared.policy.profile import StepWork
from shared.request import WorkerRef


class PrefillWorker(Worker):
    """Computes prompts; their pages stay until decode has pulled them.

    Args:
        begun: told of a request at its first chunk: decode may make room for it.
        progressed: told of a request behind each of its chunks: decode may pull so much.
    """

    def __init__(
        self,
        ref: WorkerRef,
        hardware: Hardware,
        agenda: Agenda,
        told: Told,
        lengths: tuple[int, ...],
        *,
        begun: Callable[[Job], None],
        progressed: Callable[[Job], None],
    ) -> None:
        super().__init__(ref, hardware.prefill, hardware, agenda, told, lengths)
        self._begun = begun
        self._progressed = progressed
        self._is_busy = False

    def take(self, job: Job, source: Worker | None, num_source_pages: int) -> None:
        """Work has come."""
        prompt = Prompt(job, job.row.num_input, job.row.prompt.segments, self._lengths)
        self.take_prompt(prompt, source, num_source_pages)

    def give_up(self, job: Job) -> None:
        """Decode has the KV."""
        assert job.kv is not None
        self.pool.release(job.kv)
        job.kv = None
        self.wake()

    def wake(self) -> None:
        if self._is_busy:
            return
        chunks, num_tokens, num_pairs = self.queue.chunks(self.kind.max_batch_tokens)
        if not chunks:
            return
        step_s = self.kind.speeds.step_s(StepWork(num_prompt_tokens=num_tokens, num_pairs=num_pairs))
        self.counts.busy_s += step_s
        self._is_busy = True
        self._agenda.at(self._agenda.now_s + step_s, self._step_ended, chunks)

    def _admitted(self, prompt: Prompt) -> None:
        job = prompt.job
        job.kv = prompt.kv
        job.num_cached = prompt.num_computed
        job.num_computed_pages = prompt.num_computed // PAGE_TOKENS
        if job.row.num_output > 1:
            self._begun(job)

    def _step_ended(self, chunks: list[tuple[Prompt, int]]) -> None:
        for prompt, count in chunks:
            is_through = self.queue.computed(prompt, count)
            job = prompt.job
            job.num_computed_pages = (
                pages_for(prompt.num_computed) if is_through else prompt.num_computed // PAGE_TOKENS
            )
            if is_through:
                self._end(job)
            else:
                self._progressed(job)
        self._is_busy = False
        self.wake()

    def _end(self, job: Job) -> None:
        self._num_seats_free += 1
        job.prefill_ended_s = self._agenda.now_s
        job.num_made = 1
        self._told.computed(job)
        self._told.first_token(job)
        if job.row.num_output > 1:
            self._progressed(job)
        else:
            self.give_up(job)
            self._told.pulled(job)
            self._told.finished(job, self._agenda.now_s)
