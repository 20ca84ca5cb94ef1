"""An event loop whose time jumps to the next timer instead of waiting for it."""

import asyncio
import selectors
from collections.abc import Coroutine
from concurrent.futures import Executor, Future
from typing import Any


class JumpingSelector(selectors.DefaultSelector):
    """Never waits: adds up in `skipped_s` what it should have waited."""

    skipped_s = 0.0

    def select(self, timeout=None):
        ready = super().select(0 if timeout is not None else None)
        if not ready and timeout:
            self.skipped_s += timeout
        return ready


class InlineExecutor(Executor):
    """Does the work in the caller: a thread's real time means nothing to a loop that jumps."""

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - handed on by the future
            future.set_exception(error)
        return future


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` counts only the waits that were jumped over, from 1000."""

    def __init__(self, selector: JumpingSelector | None = None) -> None:
        self._jumping = selector or JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return 1000.0 + self._jumping.skipped_s


def run_virtually(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`, which takes no real time however long it sleeps."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
