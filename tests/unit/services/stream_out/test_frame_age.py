"""What the edge observes of a frame that it reads."""

from types import SimpleNamespace

from prometheus_client import CollectorRegistry

from services.stream_out.metrics import EdgeMetrics
from services.stream_out.service import StreamOut
from services.stream_out.streams import PartitionLog
from shared.bus.port import Record
from shared.request import Incarnation, WorkerRef
from shared.wire.codec import encode
from shared.wire.to_stream_out import Frame
from tests.fake_tokeniser import fake_tokeniser

WORKER = WorkerRef(0, Incarnation("w"))


def test_a_frame_is_as_old_as_its_step_and_a_record_that_says_nothing_is_passed_over():
    registry = CollectorRegistry()
    metrics = EdgeMetrics(registry)
    logger = SimpleNamespace(warning=lambda *_, **__: None)
    edge = StreamOut(
        None,
        None,
        fake_tokeniser(),
        settings=None,
        incarnation=Incarnation("e"),
        clock_s=lambda: 100.5,
        logger=logger,
        metrics=metrics,
    )
    log = PartitionLog(0, 0, fake_tokeniser())
    for offset, value in enumerate([encode(Frame(WORKER, (), 100.0)), b"?", encode(Frame(WORKER, (), 101.0))]):
        edge._take(log, Record("stream-out", 0, offset, None, value, (), 100.0))
    assert registry.get_sample_value("baton_frame_age_seconds_count") == 2
    assert registry.get_sample_value("baton_frame_age_seconds_sum") == 0.5, "clocks of two hosts may differ"
    assert log.position == 3
