import asyncio
import sys

import pytest

from shared.errors import StartupError
from shared.state.port import Role
from shared.worker.process import serve_worker
from shared.worker.settings import WorkerSettings


@pytest.fixture
def _interval_restored():
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_interval_restored")
async def test_the_event_loop_keeps_the_engine_waiting_a_tenth_of_a_millisecond_at_most(tmp_path):
    with pytest.raises(StartupError, match=r"config\.json"):
        await serve_worker(
            Role.DECODE, lambda _: pytest.fail("no role"), WorkerSettings(model=tmp_path), asyncio.Event()
        )
    assert sys.getswitchinterval() == pytest.approx(1e-4)
