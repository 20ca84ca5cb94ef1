"""Processes in one event loop that can be stopped and killed as the kernel does it.

Every task and every callback carries the process that it was begun in, by a context variable. What falls due for a
process that is stopped waits until it goes on, in the same order; what falls due for a dead one never runs, not even
a `finally`. The services know nothing of it.
"""

import asyncio
import contextlib
import heapq
from asyncio import events
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any

from tests.virtual_loop import JumpingSelector, VirtualLoop

PROCESS: ContextVar["Process | None"] = ContextVar("PROCESS", default=None)
"""Whose code runs; None: that of the world around the processes."""


class Process:
    """One process start.

    Attributes:
        stopped: by SIGSTOP, or for ever.
        dead: killed, or ended by itself.
        ended: done when it is dead; the result is what its main task raised, or None.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.stopped = False
        self.dead = False
        self.ended: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        self._context = copy_context()
        self._context.run(PROCESS.set, self)
        self._due: list[events.Handle] = []

    def run(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task:
        """Begin a task in this process."""
        return asyncio.get_running_loop().create_task(work, context=self._context.copy())

    def run_main(self, work: Coroutine[Any, Any, None]) -> asyncio.Task:
        """Begin the task with whose end the process ends."""
        task = self.run(work)
        task.add_done_callback(self._main_done, context=Context())
        return task

    def stop(self) -> None:
        """SIGSTOP."""
        self.stopped = True

    def go_on(self) -> None:
        """SIGCONT."""
        if not self.dead:
            self.release()

    def kill(self, error: BaseException | None = None) -> None:
        """SIGKILL."""
        self.stopped = self.dead = True
        if not self.ended.done():
            self.ended.set_result(error)

    def release(self) -> None:
        """Let everything run that fell due."""
        self.stopped = False
        due, self._due = self._due, []
        asyncio.get_running_loop().ready_again(due)

    def hold(self, handle: events.Handle) -> None:
        self._due.append(handle)

    def _main_done(self, task: asyncio.Task) -> None:
        if not self.dead:
            self.kill(None if task.cancelled() else task.exception())


def _run_gated(handle: events.Handle) -> None:
    process = handle._context.get(PROCESS)
    if process is not None and process.stopped:
        process.hold(handle)
        return
    try:
        handle._context.run(handle._callback, *handle._args)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001 - as asyncio itself
        handle._loop.call_exception_handler({"message": f"callback {handle!r}", "exception": error, "handle": handle})


class _Handle(events.Handle):
    __slots__ = ()
    _run = _run_gated


class _TimerHandle(events.TimerHandle):
    __slots__ = ()
    _run = _run_gated


class _Timers(JumpingSelector):
    """Knows of timers only."""

    def select(self, timeout=None):
        if timeout is None:
            raise RuntimeError("nothing is going to happen any more")
        self.skipped_s += max(0.0, timeout)
        return []


class ProcessLoop(VirtualLoop):
    """A virtual loop whose handles know their process. Nothing in it may use threads or sockets."""

    def __init__(self) -> None:
        super().__init__(_Timers())

    def call_soon(self, callback, *args, context=None):
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(self, delay, callback, *args, context=None):
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(self, when, callback, *args, context=None):
        timer = _TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._scheduled, timer)
        timer._scheduled = True
        return timer

    def ready_again(self, handles: list[events.Handle]) -> None:
        self._ready.extend(handle for handle in handles if not handle._cancelled)

    def act(self, action: Callable[[], None], delay_s: float = 0.0) -> None:
        """Do something outside all processes."""
        self.call_later(delay_s, action, context=Context())


def run_processes(work: Coroutine[Any, Any, Any], processes: list[Process]) -> Any:
    """The result of `work`; then everything is unwound, dead processes included."""
    loop = ProcessLoop()
    try:
        asyncio.set_event_loop(loop)
        result = loop.run_until_complete(work)
        loop.set_exception_handler(lambda *_: None)
        _unwind(loop, processes)
        return result
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def _unwind(loop: ProcessLoop, processes: list[Process]) -> None:
    async def unwind() -> None:
        mine = asyncio.current_task()
        for process in processes:
            process.release()
        for _ in range(20):
            left = [task for task in asyncio.all_tasks() if task is not mine]
            if not left:
                return
            for task in left:
                task.cancel()
            with contextlib.suppress(BaseException):
                await asyncio.wait(left, timeout=10)

    loop.run_until_complete(unwind())
