import asyncio
import json

import pytest
from aiokafka.errors import KafkaTimeoutError

from loadgen.client import Clock, ExchangeFailed, Observation
from loadgen.kafka_client import KafkaTransport
from shared.request import Event
from tests.unit.loadgen.builders import job_of, scheduled

UNIX_S = 1_700_000_000.0


class Sent:
    """A producer that keeps what it is given."""

    def __init__(self, error=None):
        self.records = []
        self.error = error

    async def send_and_wait(self, topic, value, key, *, headers):
        if self.error is not None:
            raise self.error
        self.records.append((topic, value, key, dict(headers)))


def transport_of(producer):
    return KafkaTransport(producer, {"tenant": "t"}, Clock(lambda: 100.0, lambda: UNIX_S))


def result(status="completed", **fields):
    usage = {"prompt_tokens": 4, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1}}
    response = {"choices": [{"finish_reason": "length", "text": "abc"}], "usage": usage}
    timings = {"accepted": UNIX_S + 0.5, "first_token": UNIX_S + 1, "finished": UNIX_S + 3}
    message = {"v": 1, "type": "result", "request_id": "replay-test-0", "status": status}
    return json.dumps(message | {"response": response, "timings": timings} | fields).encode()


async def answered(*values, key=b"replay-test-0"):
    transport, seen = transport_of(Sent()), Observation()
    exchange = asyncio.create_task(transport.exchange(job_of(scheduled(0)), seen))
    await asyncio.sleep(0)
    for value in values:
        transport.take(key, value)
    async with asyncio.timeout(5):
        await exchange
    return transport, seen


async def test_a_job_goes_out_under_its_id_with_tenant_and_deadline():
    producer = Sent()
    transport = transport_of(producer)
    exchange = asyncio.create_task(transport.exchange(job_of(scheduled(0), timeout_s=60), Observation()))
    await asyncio.sleep(0)
    transport.take(b"replay-test-0", result())
    await exchange
    ((topic, value, key, headers),) = producer.records
    assert (topic, value, key) == ("ingest", b"{}", b"replay-test-0")
    assert headers == {"tenant": b"t", "deadline-unix-ms": b"1700000060000"}


async def test_times_of_tokens_are_the_servers_stamps_by_the_clients_clock():
    _, seen = await answered(result())
    assert seen.sent_s == seen.answered_s == 100
    assert (seen.first_token_s, seen.last_token_s) == (101, 103)
    assert (seen.prompt_tokens, seen.output_tokens, seen.cached_tokens) == (4, 3, 1)
    assert seen.finish_reason == "length"
    assert seen.stamps[Event.ACCEPTED] == UNIX_S + 0.5


async def test_a_result_without_stamps_or_usage_is_still_an_end():
    _, seen = await answered(b'{"status": "completed", "response": {"choices": 3}}')
    assert (seen.first_token_s, seen.output_tokens, seen.answered_s) == (None, None, 100)


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (b"{", "malformed"),
        (b"3", "malformed"),
        (result("cancelled"), "status_cancelled"),
        (result("rejected", error={"message": "m", "type": "t", "code": "too_long"}), "error_too_long"),
    ],
)
async def test_a_result_that_is_no_answer_fails_by_its_label(value, label):
    with pytest.raises(ExchangeFailed) as failure:
        await answered(value)
    assert failure.value.label == label


async def test_results_of_others_are_left_alone():
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await answered(result(), key=b"another")


async def test_a_copy_is_counted_and_a_contradiction_is_a_duplicate():
    transport, seen = await answered(result(), result())
    assert (transport.repeated_results, seen.duplicated) == (1, False)
    transport.take(b"replay-test-0", result(error={"message": "other"}))
    assert seen.duplicated


async def test_a_record_that_the_broker_refuses_fails():
    with pytest.raises(ExchangeFailed) as failure:
        await transport_of(Sent(KafkaTimeoutError())).exchange(job_of(scheduled(0)), Observation())
    assert failure.value.label == "produce"


async def test_a_lost_consumer_ends_all_waiting_now_and_later():
    transport = transport_of(Sent())
    exchange = asyncio.create_task(transport.exchange(job_of(scheduled(0)), Observation()))
    await asyncio.sleep(0)
    transport.lost_results("gone")
    for waiting in (exchange, transport.exchange(job_of(scheduled(1)), Observation())):
        with pytest.raises(ExchangeFailed) as failure:
            await waiting
        assert failure.value.label == "consumer"
