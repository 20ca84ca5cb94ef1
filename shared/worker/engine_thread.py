"""The one thread that owns a worker's engine."""

import asyncio
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeVar

from shared.engine.port import Engine, EngineStats, StepOutput

T = TypeVar("T")
Command = Callable[[Engine], None]

MAX_UNHANDLED_STEPS = 4
"""The thread runs at most this many steps ahead of the loop, so that what cannot be written makes it pause."""


STOP_TIMEOUT_S = 10.0
"""At the end the step that runs is waited for so long."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step that has run; `started_s` and `ended_s` by the thread's clock.

    An engine that is one batch ahead launches in one step what the next step waits for: while it is busy, a step takes
    as long as a batch. What `output.started` names was launched, what `output.tokens` names was computed, by `ended_s`.
    """

    output: StepOutput
    started_s: float
    ended_s: float


class _Turn:
    """A lock that whoever has it cannot take again before others that wait for it: an engine on a CPU gives it back
    between two steps for no longer than a thread takes to wake up."""

    def __init__(self) -> None:
        self._next = threading.Lock()  # held while waiting
        self._lock = threading.Lock()

    def acquire(self) -> None:
        with self._next:
            self._lock.acquire()

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class EngineThread:
    """Runs the engine's steps, and commands between steps in the order in which they were submitted.

    Steps go to `steps` in order; whoever takes one calls `handled` once for it. If the engine raises, `failed` is set
    and nothing runs any more.

    Attributes:
        stats: as they were after the newest step or command.
        step_started_s: when the step that runs now began, by `clock_s`; None between steps. A device that hangs is
            seen here too: no step returns before a batch that it waits for.
        is_given_up: its step hangs: the end does not wait for it.
    """

    def __init__(self, engine: Engine, clock_s: Callable[[], float]) -> None:
        self._engine = engine
        self._clock_s = clock_s
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._num_unhandled = 0
        self._stopping = False
        self.steps: asyncio.Queue[Step] = asyncio.Queue()
        self.failed: asyncio.Future[None] = self._loop.create_future()
        self.stats: EngineStats = engine.stats()
        self.step_started_s: float | None = None
        self.is_given_up = False
        self._turn = _Turn()  # of whoever uses the engine; nobody does while a step waits for its batch
        engine.let_in(self._others_turn)

    @contextmanager
    def running(self) -> Generator[None]:
        """Run while the context is open."""
        thread = threading.Thread(target=self._run, name="engine", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._commands.put(self._stop)
            if not self.is_given_up:
                thread.join(STOP_TIMEOUT_S)  # a step that hangs must not keep the process: the thread is a daemon
            self.failed.cancel()

    def call(self, command: Callable[[Engine], T]) -> "asyncio.Future[T]":
        """Run `command` on the engine's thread between two steps. It is queued at once, whether awaited or not."""
        future: asyncio.Future[T] = self._loop.create_future()

        def resolve(result: T | None, error: Exception | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def run(engine: Engine) -> None:
            try:
                result, error = command(engine), None
            except Exception as raised:  # noqa: BLE001 - it is the caller's: the future carries it
                result, error = None, raised
            self._loop.call_soon_threadsafe(resolve, result, error)

        self._commands.put(run)
        return future

    async def call_beside(self, command: Callable[[Engine], T]) -> T:
        """Run `command`, which only calls what `Engine.let_in` allows, on a thread of its own: between two steps, or
        while a step waits for its batch. Cancelled, it may run all the same."""
        return await asyncio.to_thread(self._run_beside, command)

    def _run_beside(self, command: Callable[[Engine], T]) -> T:
        try:
            return self._run_in_turn(command)
        finally:
            self._commands.put(_look_again)  # there may be work now

    def _run_in_turn(self, command: Callable[[Engine], T]) -> T:
        with self._turn:
            return command(self._engine)

    @contextmanager
    def _others_turn(self) -> Generator[None]:
        self._turn.release()
        try:
            yield
        finally:
            self._turn.acquire()

    def handled(self) -> None:
        """One step has been dealt with."""
        self._commands.put(self._count_handled)

    def _stop(self, _: Engine) -> None:
        self._stopping = True

    def _count_handled(self, _: Engine) -> None:
        self._num_unhandled -= 1

    def _run(self) -> None:
        try:
            while not self._stopping:
                may_step = self._num_unhandled < MAX_UNHANDLED_STEPS and self._run_in_turn(_has_work)
                self._run_commands(wait=not may_step)
                if may_step and not self._stopping:
                    self._step()
        except BaseException as error:  # noqa: BLE001 - the loop must learn of it, whatever it is
            self._loop.call_soon_threadsafe(self._fail, error)

    def _fail(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)

    def _run_commands(self, *, wait: bool) -> None:
        try:
            while True:
                command = self._commands.get(block=wait)
                wait = False
                with self._turn:
                    command(self._engine)
                    self.stats = self._engine.stats()
        except Empty:
            return

    def _step(self) -> None:
        started_s = self.step_started_s = self._clock_s()
        with self._turn:
            output = self._engine.step()
            self.step_started_s = None
            step = Step(output, started_s, self._clock_s())
            self.stats = self._engine.stats()
        self._num_unhandled += 1
        self._loop.call_soon_threadsafe(self.steps.put_nowait, step)


def _has_work(engine: Engine) -> bool:
    return engine.has_work()


def _look_again(_: Engine) -> None:
    """Wakes the thread."""
