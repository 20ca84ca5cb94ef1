"""Child processes that end with their parent, log to one file each and are awaited until ready."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NewType

from infra.local.programs import require_program
from shared.errors import StartupError

PROBE_INTERVAL_S = 0.1
LOG_TAIL_LINES = 15

StartTicks = NewType("StartTicks", int)
"""Clock ticks from boot to a process's start: with its pid the name of one process for as long as the machine runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """What to run and how to know that it is ready.

    Attributes:
        name: names the process and its log file.
        address: where it answers, as people write it.
        is_ready: one quick look; False while it is starting.
        env: added to the environment of this process.
        ready_within_s: a start that takes longer has failed.
        stop_within_s: SIGKILL follows SIGTERM after this long.
    """

    name: str
    command: tuple[str, ...]
    address: str
    is_ready: Callable[[], Awaitable[bool]]
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    ready_within_s: float = 120.0
    stop_within_s: float = 15.0


class Child:
    """One run of a ProcessSpec."""

    def __init__(self, spec: ProcessSpec, log_path: Path, process: asyncio.subprocess.Process) -> None:
        self.spec = spec
        self.log_path = log_path
        self._process = process
        self.start_ticks = start_ticks(process.pid)

    @classmethod
    async def start(cls, spec: ProcessSpec, log_path: Path) -> "Child":
        """Starts it; its output is appended to `log_path`."""
        # The kernel kills the child when the parent dies in whatever way; Ctrl-C reaches the parent only.
        setpriv = require_program("setpriv", package="util-linux", purpose="ends children with their parent")
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(setpriv, "--pdeathsig", "KILL", "--", *spec.command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | spec.env,
                start_new_session=True,
            )
        return cls(spec, log_path, process)

    @property
    def pid(self) -> int:
        """Its process id, which is also its process group."""
        return self._process.pid

    async def wait(self) -> int:
        """Its exit status, negative for a signal, once it has ended."""
        return await self._process.wait()

    async def until_ready(self) -> None:
        """Returns when it is ready.

        Raises:
            StartupError: it ended, or was not ready in time; carries the end of its log.
        """
        deadline = time.monotonic() + self.spec.ready_within_s
        while self._process.returncode is None:
            if await self.spec.is_ready():
                return
            if time.monotonic() > deadline:
                raise StartupError(self._told(f"not ready after {self.spec.ready_within_s:g} s"))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), PROBE_INTERVAL_S)
        raise StartupError(self.obituary())

    def obituary(self) -> str:
        """How it ended, with the end of its log."""
        return self._told(f"ended with {describe_exit(self._process.returncode)}")

    def _told(self, what: str) -> str:
        return f"{self.spec.name} {what}; the end of {self.log_path}:\n{tail(self.log_path)}"

    def send_signal(self, signal_number: signal.Signals) -> None:
        """Sends a signal to it alone, not to processes that it started."""
        self._process.send_signal(signal_number)

    async def stop(self) -> None:
        """SIGTERM, a wait, then SIGKILL to it and all that it started; returns when it has ended."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), self.spec.stop_within_s)
        except TimeoutError:
            pass
        finally:
            kill_group(self.pid)
            await self._process.wait()


@contextlib.asynccontextmanager
async def running(spec: ProcessSpec, log_path: Path) -> AsyncGenerator[Child]:
    """Starts `spec`, enters when it is ready, stops it at the end."""
    child = await Child.start(spec, log_path)
    try:
        await child.until_ready()
        yield child
    finally:
        await child.stop()


def kill_group(pid: int) -> None:
    """SIGKILL to the process group that `pid` leads, if any of it is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def start_ticks(pid: int) -> StartTicks | None:
    """When `pid` started, None where there is no such process or only its unread exit status."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    after_name = stat[stat.rindex(")") + 2 :].split()
    return None if after_name[0] == "Z" else StartTicks(int(after_name[19]))


def describe_exit(returncode: int | None) -> str:
    """An exit status in words."""
    if returncode is None:
        return "no exit status yet"
    if returncode < 0:
        return f"signal {signal.Signals(-returncode).name}"
    return f"exit status {returncode}"


def tail(path: Path, lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a log, each indented."""
    with path.open("rb") as log:
        log.seek(0, os.SEEK_END)
        log.seek(max(0, log.tell() - 16_384))
        last = log.read().decode(errors="replace").splitlines()[-lines:]
    return "\n".join(f"    {line}" for line in last)
