"""An engine's "thread" inside the event loop: steps take virtual time."""

import asyncio
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager

from shared.engine.port import Engine, StepOutput
from shared.worker.engine_thread import MAX_UNHANDLED_STEPS, Command, EngineThread, Step, T


class LoopEngine(EngineThread):
    """As its parent, but for the thread.

    Args:
        step_s: how long the next step takes.
    """

    def __init__(self, engine: Engine, clock_s: Callable[[], float], step_s: Callable[[], float]) -> None:
        super().__init__(engine, clock_s)
        self._step_s = step_s
        self._queue: deque[Command] = deque()
        self._beside: list[Command] = []
        self._asked = asyncio.Event()

    @contextmanager
    def _others_turn(self) -> Generator[None]:
        with super()._others_turn():
            for command in self._beside:
                if command in self._queue:
                    self._queue.remove(command)
                    self._run_in_turn(command)
            self._beside.clear()
            yield

    @contextmanager
    def running(self) -> Generator[None]:
        task = asyncio.ensure_future(self._run_in_loop())
        try:
            yield
        finally:
            task.cancel()
            self.failed.cancel()

    def call(self, command: Callable[[Engine], T]) -> "asyncio.Future[T]":
        future: asyncio.Future[T] = self._loop.create_future()

        def run(engine: Engine) -> None:
            try:
                result = command(engine)
            except Exception as error:  # noqa: BLE001 - it is the caller's, if he still waits
                if not future.cancelled():
                    future.set_exception(error)
            else:
                if not future.cancelled():
                    future.set_result(result)

        self._submit(run)
        return future

    async def call_beside(self, command: Callable[[Engine], T]) -> T:
        """In the next step's wait for its batch, or before that if the engine has time."""
        future = self.call(command)
        self._beside.append(self._queue[-1])
        return await future

    def handled(self) -> None:
        self._submit(self._count_handled)

    def _submit(self, command: Command) -> None:
        self._queue.append(command)
        self._asked.set()

    async def _run_in_loop(self) -> None:
        try:
            while True:
                while self._queue:
                    self._run_in_turn(self._queue.popleft())
                    self.stats = self._engine.stats()
                if self._num_unhandled < MAX_UNHANDLED_STEPS and self._engine.has_work():
                    await self._step_in_loop()
                elif not self._queue:
                    self._asked.clear()
                    await self._asked.wait()
        except Exception as error:  # noqa: BLE001 - as its parent
            self._fail(error)

    async def _step_in_loop(self) -> None:
        started_s = self.step_started_s = self._clock_s()
        output = self._run_in_turn(_step)
        await asyncio.sleep(self._step_s())
        self.step_started_s = None
        self.stats = self._engine.stats()
        self._num_unhandled += 1
        self.steps.put_nowait(Step(output, started_s, self._clock_s()))


def _step(engine: Engine) -> StepOutput:
    return engine.step()
