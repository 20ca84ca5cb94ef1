"""Processes that come back: each seat holds one incarnation of a service after the other."""

import asyncio
import json
import os
import signal
import sys
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass

from infra.local.process import describe_exit, tail
from infra.local.programs import require_program
from tests.faults.cluster.template import Spec

START_TIMEOUT_S = 60.0
RESTART_DELAY_S = 0.3


class Template:
    """Forks processes that have imported these services already, and hears how they end."""

    def __init__(self, *services):
        self._services = services
        self._forked = asyncio.Queue()
        self._ends = {}
        self.pids = set()

    @asynccontextmanager
    async def running(self, log_path):
        setpriv = require_program("setpriv", package="util-linux", purpose="ends children with their parent")
        with log_path.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(setpriv, "--pdeathsig", "KILL", "--", sys.executable, "-m", "tests.faults.cluster.template"),
                *self._services,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "UCX_WARN_UNUSED_ENV_VARS": "n"},
                start_new_session=True,
            )
        self._process = process
        listening = None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                line = await process.stdout.readline()
            assert line, f"the template ended:\n{tail(log_path)}"
            listening = asyncio.create_task(self._listen())
            yield self
        finally:
            for pid in tuple(self.pids):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            if listening is not None:
                await listening
            process._transport.close()

    async def fork(self, spec):
        """The pid of a new process, and a future of its exit status."""
        self._process.stdin.write(json.dumps(asdict(spec)).encode() + b"\n")
        return await self._forked.get()

    async def _listen(self):
        while line := await self._process.stdout.readline():
            word = json.loads(line)
            if "name" in word:
                end = asyncio.get_running_loop().create_future()
                self.pids.add(word["pid"])
                self._ends[word["pid"]] = end
                self._forked.put_nowait((word["pid"], end))
            else:
                self.pids.discard(word["pid"])
                self._ends.pop(word["pid"]).set_result(word["status"])


@dataclass
class Life:
    """One incarnation of a seat.

    Attributes:
        ended_s, status: unix seconds and exit status, once it has ended.
        wanted_end: the signal by which the harness ends it, if it did.
        is_stopped: by SIGSTOP.
    """

    number: int
    pid: int
    log: object
    started_s: float
    ended_s: float | None = None
    status: int | None = None
    wanted_end: signal.Signals | None = None
    is_stopped: bool = False
    _incarnation: str | None = None

    def events(self):
        """What it has logged as JSON."""
        for line in self.log.read_text(errors="replace").splitlines():
            if line.startswith("{"):
                with suppress(ValueError):
                    yield json.loads(line)

    @property
    def incarnation(self):
        """As it stands in the records, once it is known."""
        if self._incarnation is None:
            for event in self.events():
                known = event.get("incarnation") or event.get("client_id")
                if known:
                    self._incarnation = known
                    break
        return self._incarnation

    def last_error(self):
        """The last line that it logged as an error, "" if there is none."""
        errors = [event for event in self.events() if event.get("level") == "error"]
        return json.dumps(errors[-1]) if errors else ""


class Seat:
    """A service's place in the cluster: its ports, its proxies, and whoever sits there now.

    Attributes:
        role: "edge", "ingest", "prefill" or "decode".
        paths: by what they lead to: "kafka", "redis", for workers "peers".
        lives: all incarnations, the one of now last.
        held_back_s: how long the next incarnation waits before it comes.
    """

    def __init__(self, name, role, template, env, paths, folder):
        self.name = name
        self.role = role
        self.paths = paths
        self.env = env
        self.lives = []
        self.held_back_s = RESTART_DELAY_S
        self._template = template
        self._folder = folder
        self._keeping = None

    @property
    def life(self):
        return self.lives[-1]

    @property
    def is_alive(self):
        return bool(self.lives) and self.life.ended_s is None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.env['BATON_HTTP_PORT']}"

    async def start(self):
        """Sit down, and from now on come back after each end."""
        end = await self._begin()
        self._keeping = asyncio.create_task(self._keep(end), name=f"keep {self.name}")

    async def leave(self):
        """Nobody comes back any more; whoever sits there goes on."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

    def end(self, signal_number):
        """By SIGKILL or SIGTERM."""
        self.life.wanted_end = signal_number
        os.kill(self.life.pid, signal_number)
        if signal_number is signal.SIGTERM and self.life.is_stopped:
            self.wake()

    def stop(self):
        self.life.is_stopped = True
        os.kill(self.life.pid, signal.SIGSTOP)

    def wake(self):
        self.life.is_stopped = False
        os.kill(self.life.pid, signal.SIGCONT)

    async def _begin(self):
        number = len(self.lives)
        log = self._folder / f"{self.name}.{number}.log"
        pid, end = await self._template.fork(Spec(f"{self.name}.{number}", self.role, self.env, str(log)))
        self.lives.append(Life(number, pid, log, time.time()))
        return end

    async def _keep(self, end):
        while True:
            self.life.status = await end
            self.life.ended_s = time.time()
            wait_s, self.held_back_s = self.held_back_s, RESTART_DELAY_S
            await asyncio.sleep(wait_s)
            end = await self._begin()

    def __str__(self):
        return self.name


def describe_end(life):
    """For people."""
    return f"{life.log.stem} {describe_exit(life.status)} {life.last_error()}"
