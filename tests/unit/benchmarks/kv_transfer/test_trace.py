import asyncio
import inspect
from types import SimpleNamespace

import pytest

from benchmarks.kv_transfer import trace
from benchmarks.kv_transfer.trace import Event, Trace, phases_ms, summary, timeline
from shared.transfer.control import Confirm
from shared.transfer.link import Link
from shared.transfer.staging import Staging

PULL = [
    Event("puller", "post pull", 10.0, 10.0),
    Event("puller", "read part", 9.0, 10.2),
    Event("source", "pack", 10.1, 10.3),
    Event("puller", "receive", 10.2, 10.6),
    Event("source", "send", 10.3, 10.6),
    Event("puller", "receive", 10.3, 10.9),
    Event("puller", "unpack", 10.6, 10.7),
    Event("puller", "unpack", 10.9, 11.2),
    Event("puller", "post confirm", 10.9, 10.9),
    Event("puller", "read released", 10.2, 11.0),
]
OTHER = [Event("puller", "receive", 8.0, 9.0), Event("source", "pack", 20.0, 21.0)]


def test_the_phases_of_a_pull():
    assert phases_ms([*OTHER, *PULL], 10.0, 11.2) == pytest.approx(
        {
            "pull": 1200,
            "to first part": 200,
            "wire": 700,
            "receives": 1000,
            "tail": 300,
            "packs": 200,
            "sends": 300,
            "unpacks": 400,
            "confirm": 100,
            "parts": 2,
        }
    )


def test_a_pull_of_nothing_has_no_wire():
    assert "wire" not in phases_ms(OTHER, 10.0, 11.0)


def test_a_summary_takes_the_median_of_each_phase():
    assert summary([{"pull": 1.0, "wire": 4.0}, {"pull": 3.0}, {"pull": 2.0}]) == {"pull": 2.0, "wire": 4.0}


def test_a_timeline_is_in_order_and_of_one_pull():
    lines = timeline([*OTHER, *reversed(PULL)], 10.0, 11.2)
    assert len(lines) == len(PULL)
    assert lines[0].split() == ["0", "puller", "post", "pull"]
    assert lines[-1].split() == ["900000", "1200000", "puller", "unpack"]


def test_what_is_watched_is_there():
    for method in (Staging.pack, Staging.unpack, Link.send, Link.receive, Link.read):
        assert inspect.iscoroutinefunction(method)
    assert not inspect.iscoroutinefunction(Link.post)


class FakeStaging:
    async def pack(self, what):
        await asyncio.sleep(0)
        return what

    async def unpack(self):
        raise ValueError("no")


class FakeLink:
    def post(self, message):
        self.posted = message

    async def read(self):
        return b'{"type": "part"}'

    async def send(self):
        pass

    async def receive(self):
        pass


async def test_methods_are_watched_and_left_as_they_were(monkeypatch):
    monkeypatch.setattr(trace, "Staging", FakeStaging)
    monkeypatch.setattr(trace, "Link", FakeLink)
    methods = dict(vars(FakeStaging)) | dict(vars(FakeLink))
    clock = SimpleNamespace(now_s=0.0)

    def tick():
        clock.now_s += 1.0
        return clock.now_s

    watching = Trace("source", tick)
    staging, link = FakeStaging(), FakeLink()
    with watching.watch():
        assert await staging.pack(7) == 7
        with pytest.raises(ValueError, match="no"):
            await staging.unpack()
        link.post(Confirm(pull=1))
        assert await link.read() == b'{"type": "part"}'
        await link.receive()
    await staging.pack(7)
    assert link.posted == Confirm(pull=1)
    assert [event.name for event in watching.events] == ["pack", "unpack", "post confirm", "read part", "receive"]
    assert watching.events[0] == Event("source", "pack", 1.0, 2.0)
    assert watching.as_json()[0] == {"end": "source", "name": "pack", "began_s": 1.0, "ended_s": 2.0}
    assert methods == dict(vars(FakeStaging)) | dict(vars(FakeLink))
