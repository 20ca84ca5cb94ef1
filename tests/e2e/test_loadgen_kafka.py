"""`python -m loadgen replay --backend kafka` through a real Kafka, with a stand-in that answers jobs."""

import asyncio
import json
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from shared.request import NUM_REQUEST_PARTITIONS, Event
from shared.wire.codec import encode
from shared.wire.openai import parse_body
from shared.wire.results import Result
from shared.wire.to_stream_out import ErrorBody
from shared.wire.topics import INGEST, RESULTS

ROOT = Path(__file__).parents[2]
AZURE = ROOT / "loadgen" / "data" / "azure_conv_60.csv"
TIMEOUT_S = 60


def result_of(record) -> Result:
    """An answer of the asked length; job 3 is refused, job 4 cut short."""
    request_id = record.key.decode()
    number = int(request_id.rpartition("-")[2])
    now = time.time()
    timings = {Event.ACCEPTED: now, Event.FIRST_TOKEN: now + 0.01, Event.FINISHED: now + 0.02}
    if number == 3:
        error = ErrorBody("no", "invalid_request_error", 400, code="context_length_exceeded")
        return Result(request_id, "rejected", error=error, timings=timings)
    spec = parse_body(record.value, chat=None).spec
    usage = {"prompt_tokens": len(spec.prompt), "completion_tokens": spec.max_tokens - (number == 4)}
    response = {"choices": [{"index": 0, "finish_reason": "length"}], "usage": usage}
    return Result(request_id, "completed", response=response, timings=timings)


@asynccontextmanager
async def answering(kafka_address, jobs):
    """Answers every job of a replay that comes onto `ingest` from now on, twice; keeps the records in `jobs`."""
    partitions = [TopicPartition(INGEST.name, number) for number in range(NUM_REQUEST_PARTITIONS)]
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka_address, enable_auto_commit=False, fetch_max_wait_ms=50)
    producer = AIOKafkaProducer(bootstrap_servers=kafka_address, acks="all")

    async def answer_all():
        async for record in consumer:
            if record.key and record.key.startswith(b"replay-"):
                jobs.append(record)
                value = encode(result_of(record))
                await producer.send_and_wait(RESULTS.name, value, key=record.key)
                await producer.send_and_wait(RESULTS.name, value, key=record.key)

    async with consumer, producer:
        consumer.assign(partitions)
        await consumer.seek_to_end(*partitions)
        for partition in partitions:
            await consumer.position(partition)
        task = asyncio.create_task(answer_all())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def run(*options):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loadgen", "replay", *map(str, options)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(TIMEOUT_S):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_jobs_go_onto_the_topic_and_results_come_back(kafka_address, tmp_path):
    jobs = []
    async with answering(kafka_address, jobs):
        status, out, err = await run(
            *("--backend", "kafka", "--bootstrap-servers", kafka_address, "--trace", AZURE, "--model", "m"),
            *("--vocab-size", 1000, "--num-prompts", 8, "--length-scale", 0.1, "--header", "tenant=acme"),
            *("--arrivals", "constant", "--request-rate", 20, "--timeout", 20),
            *("--result-dir", tmp_path, "--result-filename", "r.json"),
        )
    assert status == 1, err
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["buckets"] == {"completed": 6, "error_context_length_exceeded": 1, "wrong_length": 1}
    assert result["backend"] == "kafka"
    assert result["median_ttft_ms"] is not None
    assert result["median_tpot_ms"] > 0
    assert result["stages_ms"]["accepted → first_token"]["count"] == 6
    assert "skew" in out

    assert len(jobs) == 8
    headers = dict(jobs[0].headers)
    assert headers["tenant"] == b"acme"
    assert abs(int(headers["deadline-unix-ms"]) - (jobs[0].timestamp + 20_000)) < 15_000
    assert not parse_body(jobs[0].value, chat=None).spec.stream


async def test_a_broker_that_is_not_there_is_named():
    status, _, err = await run(
        *("--backend", "kafka", "--bootstrap-servers", "127.0.0.1:9", "--trace", AZURE, "--model", "m"),
        *("--vocab-size", 1000, "--num-prompts", 1),
    )
    assert status == 2
    assert "Kafka at 127.0.0.1:9" in err
    assert "Traceback" not in err
