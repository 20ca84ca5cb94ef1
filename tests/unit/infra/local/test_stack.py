import asyncio
import random
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from infra.local import stack as stack_module
from infra.local.composition import Composition, Service
from infra.local.probes import http_ready
from infra.local.process import start_ticks
from infra.local.stack import Stack
from infra.local.state_file import ProcessPhase, StateFile
from shared.errors import StartupError

STAND_IN = Service("stand-in", (sys.executable, str(Path(__file__).with_name("stand_in.py"))), 21_000)


class Reports:
    """What the stack reported; can be awaited."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._news = asyncio.Event()

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        self._news.set()

    async def until(self, text: str) -> None:
        async with asyncio.timeout(20):
            while not any(text in line for line in self.lines):
                self._news.clear()
                await self._news.wait()


@pytest.fixture
def reports() -> Reports:
    return Reports()


@pytest.fixture
def death_wish(tmp_path) -> Path:
    return tmp_path / "die"


@pytest.fixture
async def services_only(tmp_path, reports, death_wish, monkeypatch):
    """A stack of stand-ins, without Kafka and Redis."""
    monkeypatch.setattr(stack_module, "RESTART_DELAY_S", 0.01)

    @asynccontextmanager
    async def make(max_restarts: int = 2):
        composition = Composition(
            counts={}, model="", max_restarts=max_restarts, env={"DIE_IF_EXISTS": str(death_wish)}
        )
        stack = Stack(composition, tmp_path, [STAND_IN], reports, random.Random(1))
        try:
            yield stack
        finally:
            await stack.stop()

    return make


def phases(run_dir: Path) -> dict[str, ProcessPhase]:
    return {process.name: process.phase for process in StateFile(run_dir).read().processes}


async def test_processes_of_a_service_are_numbered_and_answer(services_only, tmp_path):
    async with services_only() as stack:
        assert [await stack.add("stand-in"), await stack.add("stand-in")] == ["stand-in-0", "stand-in-1"]
        first, second = (int(address.rpartition(":")[2]) for address in stack.addresses("stand-in"))
        assert first != second
        assert await http_ready("127.0.0.1", first)
        assert await http_ready("127.0.0.1", second)
        assert set(phases(tmp_path).values()) == {ProcessPhase.READY}
        pids = [stack.pid("stand-in-0"), stack.pid("stand-in-1")]
        await stack.remove("stand-in-0")
        assert list(phases(tmp_path)) == ["stand-in-1"]
        assert await stack.add("stand-in") == "stand-in-0"
    assert [start_ticks(pid) for pid in pids] == [None, None]


async def test_a_killed_process_is_reported_and_comes_back_at_its_address(services_only, reports):
    async with services_only() as stack:
        name = await stack.add("stand-in")
        before = stack.pid(name)
        stack.send_signal(name, signal.SIGKILL)
        await reports.until("stand-in-0 is ready again")
        assert stack.pid(name) != before
        (address,) = stack.addresses("stand-in")
        assert await http_ready("127.0.0.1", int(address.rpartition(":")[2]))
    (death,) = [line for line in reports.lines if "ended with" in line]
    assert "stand-in-0 ended with signal SIGKILL" in death
    assert "the stand-in listens" in death


async def test_a_process_that_keeps_dying_is_left_dead(services_only, reports, death_wish, tmp_path):
    async with services_only(max_restarts=2) as stack:
        name = await stack.add("stand-in")
        other = await stack.add("stand-in")
        death_wish.touch()
        stack.send_signal(name, signal.SIGKILL)
        await reports.until("stand-in-0 stays dead after 2 restarts")
        assert phases(tmp_path) == {name: ProcessPhase.DEAD, other: ProcessPhase.READY}
    assert sum("the stand-in was told to die" in line for line in reports.lines) == 2


async def test_a_process_that_cannot_start_is_told_and_forgotten(services_only, death_wish):
    death_wish.touch()
    async with services_only() as stack:
        with pytest.raises(StartupError, match=r"(?s)stand-in-0 ended with exit status 1.*told to die"):
            await stack.add("stand-in")
        assert stack.addresses("stand-in") == []
