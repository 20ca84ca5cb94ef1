import random

import orjson
import pytest

from services.ingest.dead_letter import NotReplayed, find, read_letters, replay
from shared.bus.dead_letter import dead_letter
from shared.bus.memory import MemoryBus, MemoryLog
from shared.policy.fold import Loss
from shared.request import Incarnation, RequestId, WorkerRef, partition_of
from shared.wire.to_ingest import LogPosition
from shared.wire.topics import MAX_RECORD_BYTES
from tests.virtual_loop import run_virtually

LOSS = Loss(WorkerRef(3, Incarnation("decode-1")), 2)


def a_letter(body=b'{"prompt": "secret"}', request_id="a", error="three workers were lost", history=(LOSS,)):
    return dead_letter(
        RequestId(request_id),
        body,
        topic="ingest",
        position=LogPosition(5, 77),
        tenant="acme",
        error=error,
        history=history,
    )


def scene(work):
    async def live():
        log = MemoryLog(clock=lambda: 1_700_000_000.0, random=random.Random(1))
        await work(log, MemoryBus(log, client_id="operator"))

    run_virtually(live())


async def write(bus, *letters):
    async with bus.producer() as producer:
        for each in letters:
            await producer.send("dead-letter", each.partition, each.value, key=each.key, headers=each.headers)


def test_a_letter_tells_all_but_the_prompt():
    async def work(log, bus):
        await write(bus, a_letter(), a_letter(request_id="b", history=()))
        first, second = await read_letters(bus)
        assert first.details.splitlines()[:2] == [
            "2023-11-14T22:13:20+00:00  a  acme  20 bytes  three workers were lost",
            "from ingest, partition 5 offset 77",
        ]
        assert "decode-1" in first.details
        assert "secret" not in first.details
        assert "lost:" not in second.details
        assert find([first, second], RequestId("b")) is second
        with pytest.raises(NotReplayed, match="no letter about c"):
            find([first, second], RequestId("c"))

    scene(work)


def test_a_replay_is_the_same_job_as_another_request():
    async def work(log, bus):
        await write(bus, a_letter())
        (letter,) = await read_letters(bus)
        again = RequestId("again")
        await replay(bus, letter, new_id=again, deadline_s=1_700_000_600.0)
        (job,) = log.records("ingest", partition_of(again))
        assert (job.key, job.value) == (b"again", b'{"prompt": "secret"}')
        assert dict(job.headers) == {"deadline-unix-ms": b"1700000600000", "tenant": b"acme"}
        with pytest.raises(NotReplayed, match="request id"):
            await replay(bus, letter, new_id=RequestId("no such id"), deadline_s=0)

    scene(work)


def test_a_letter_that_does_not_hold_its_job_is_not_replayed():
    async def work(log, bus):
        await write(bus, a_letter(b"x" * MAX_RECORD_BYTES, error="e" * 10**6), a_letter(b"", request_id="gone"))
        for letter in await read_letters(bus):
            with pytest.raises(NotReplayed, match="of the job's"):
                await replay(bus, letter, new_id=RequestId("again"), deadline_s=0)
        assert not log.records("ingest", partition_of(RequestId("again")))

    scene(work)


def test_what_strangers_wrote_there_is_shown_as_far_as_it_goes():
    async def work(log, bus):
        async with bus.producer() as producer:
            headers = (("source-bytes", b"many"), ("history", b"\xff"))
            await producer.send("dead-letter", 0, b"?", headers=headers)
        (letter,) = await read_letters(bus)
        assert letter.details
        assert not letter.is_whole

    scene(work)


def test_the_history_is_json():
    (history,) = [value for name, value in a_letter().headers if name == "history"]
    assert orjson.loads(history) == [{"epoch": 2, "slot": 3, "incarnation": "decode-1"}]
