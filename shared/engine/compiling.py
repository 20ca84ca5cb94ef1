"""Compiles Triton kernels many at once: one after the other they take most of the time of a cold start.

    work ─> each launch: queued for compilation, and nothing runs ─> threads: compile ─> build launcher, load ─> ready

Threads do, since compiler passes run without the interpreter's lock, and the assembler and the C compiler are
processes of their own.
"""

# pyright: reportUnknownMemberType=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportMissingTypeStubs=false
# triton is typed in part.

import sys
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import triton
from triton.runtime.jit import JITFunction

NO_SWITCH_S = 1000.0


def compile_launches(work: Callable[[], object]) -> int:
    """Compile and load all kernels that `work` launches and that are not there yet; none of them runs.

    What `work` does besides is done, with whatever is in the memory that its kernels would have written. No other
    thread may launch a kernel meanwhile.

    Returns how many kernels there were. Raises what `work` raises, or else the error of a kernel that does not compile.
    """
    with ThreadPoolExecutor(thread_name_prefix="compile") as threads:
        # An error raised at the mode's end would leave the mode on for good: errors are raised by result() after it.
        with triton.AsyncCompileMode(threads, ignore_errors=True) as compiling, _no_launches():
            work()
        kernels = [future.result() for future in compiling.future_kernels.values()]
        with _no_switching():
            list(threads.map(_load, kernels))
    return len(kernels)


@contextmanager
def _no_launches() -> Generator[None, None, None]:
    """Launches compile their kernel and do nothing else, as `JITFunction.warmup` would."""
    kernel_class = cast("Any", JITFunction)
    run = kernel_class.run

    def compile_alone(*args: object, **kwargs: object) -> object:
        return run(*args, **{**kwargs, "warmup": True})

    kernel_class.run = compile_alone
    try:
        yield
    finally:
        kernel_class.run = run


@contextmanager
def _no_switching() -> Generator[None, None, None]:
    """A thread goes on until it waits for something.

    All launchers are modules of one name, and Python brings one that was loaded before into whatever module bears that
    name last: a thread interrupted between the load of its launcher and the look into it may find another's.
    """
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(NO_SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(interval_s)


def _load(kernel: Any) -> None:
    _ = kernel.run  # builds the launcher, by a C compiler, and brings the code to the device
