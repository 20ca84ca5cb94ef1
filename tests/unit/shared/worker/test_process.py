import asyncio
import sys

import pytest
from prometheus_client import CollectorRegistry

from shared.engine.late_work import LateWork
from shared.errors import StartupError
from shared.observe.metrics import WorkerMetrics
from shared.state.port import Role
from shared.worker.process import ReadingLog, export_late_work, serve_worker, start
from shared.worker.settings import WorkerSettings
from tests.tiny_checkpoints import TinyCheckpoint, TinyCheckpoints


@pytest.fixture
def tiny_checkpoints(tmp_path):
    return TinyCheckpoints(tmp_path)


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


class Told:
    def __init__(self):
        self.lines = []

    def info(self, event, **fields):
        self.lines.append((event, fields))


def test_the_reading_of_weights_is_told_once_a_second_and_at_its_end():
    told, now_s = Told(), 10.0
    reading = ReadingLog(told, lambda: now_s)
    for now_s, num_read in [(10.5, 2e9), (11.0, 4e9), (11.9, 8e9), (12.1, 9e9), (12.5, 10e9)]:  # noqa: B007
        reading(int(num_read), int(10e9))
    assert [(event, fields["percent"], fields["gb_per_s"]) for event, fields in told.lines] == [
        ("reading weights", 40, 4.0),
        ("reading weights", 90, 4.29),
        ("weights read", 100, 4.0),
    ]


def test_an_engine_that_is_ready_says_what_runs(tiny_checkpoints):
    told = Told()
    folder = tiny_checkpoints.get(TinyCheckpoint())
    settings = WorkerSettings(model=folder, model_name="m", dtype="float32", num_pages=8, host_cache_gb=0.02)
    engine = start(settings, told).engine
    event, fields = told.lines[-1]
    assert event == "engine ready"
    assert (fields["model"], fields["device"], fields["runs"], fields["pages"]) == ("m", "cpu", "PyTorch alone", 8)
    assert engine.limits.num_host_pages == int(0.02e9) // engine.model.layout.page_bytes
    assert fields["host_cache_gb"] == 0.02


def test_a_missing_gpu_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(StartupError, match="BATON_DEVICE is cuda"):
        start(WorkerSettings(model=tmp_path, device="cuda"), Told())


def test_late_work_is_what_came_after_the_start():
    registry, done = CollectorRegistry(), [LateWork(5, 6, 7)]
    export_late_work(WorkerMetrics(registry, "m"), lambda: done[-1])

    def shown():
        names = ("baton_late_compiles", "baton_late_captures", "baton_late_allocations")
        return [registry.get_sample_value(name, {"model_name": "m"}) for name in names]

    assert shown() == [0, 0, 0]
    done.append(LateWork(6, 6, 9))
    assert shown() == [1, 0, 2]
