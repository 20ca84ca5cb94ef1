"""What may stand on the public topic, and what is said of the rest."""

import pytest

from services.ingest.jobs import read_job, request_id_of
from shared.bus.port import Record
from shared.errors import InvalidRequest
from shared.request import Priority
from shared.wire.topics import MAX_DEADLINE_S


def a_record(key=b"job-1", headers=(), value=b"{}"):
    return Record("ingest", 3, 17, key, value, tuple(headers), 1000.0)


def test_defaults():
    job = read_job(a_record(), default_deadline_s=60)
    assert (job.request_id, job.tenant, job.deadline_s, job.edge) == ("job-1", "default", 1060.0, None)
    assert (job.position.partition, job.position.offset) == (3, 17)


def test_headers():
    headers = [
        ("tenant", b"acme"),
        ("deadline-unix-ms", b"1005500"),
        ("edge-incarnation", b"edge-1"),
        ("traceparent", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"),
    ]
    job = read_job(a_record(headers=headers), default_deadline_s=60)
    assert (job.tenant, job.deadline_s, job.edge) == ("acme", 1005.5, "edge-1")
    assert job.traceparent.startswith("00-aaaa")


def test_a_job_is_standard_if_it_does_not_say_otherwise():
    assert read_job(a_record(), default_deadline_s=60).priority is Priority.STANDARD
    for priority in Priority:
        job = read_job(a_record(headers=[("priority", priority.encode())]), default_deadline_s=60)
        assert job.priority is priority


@pytest.mark.parametrize("key", [None, b"", b"with space", b"x" * 129, b"\xff"])
def test_a_bad_key_is_refused_and_the_job_named_by_its_place(key):
    with pytest.raises(InvalidRequest) as refused:
        read_job(a_record(key=key), default_deadline_s=60)
    assert refused.value.param == "key"
    assert request_id_of(a_record(key=key)) == "unnamed-3-17"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tenant", b"a b"),
        ("tenant", b""),
        ("edge-incarnation", b"e" * 129),
        ("priority", b""),
        ("priority", b"Batch"),
        ("priority", b"\xff"),
        ("deadline-unix-ms", b"soon"),
        ("deadline-unix-ms", b"-5"),
        ("deadline-unix-ms", str(int((1000 + MAX_DEADLINE_S + 1) * 1000)).encode()),
    ],
)
def test_a_bad_header_is_named(name, value):
    with pytest.raises(InvalidRequest) as refused:
        read_job(a_record(headers=[(name, value)]), default_deadline_s=60)
    assert refused.value.param == name
