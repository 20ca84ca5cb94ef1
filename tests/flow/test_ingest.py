"""Ingest among the other services: what it must survive, and what it must not lose."""

import asyncio

import httpx

from shared.bus.memory import MemoryBus
from shared.bus.port import Committed
from shared.engine.fake import fake_engine
from shared.request import NUM_REQUEST_PARTITIONS, Event, FinishReason, Incarnation, RequestId, partition_of
from shared.state import keys
from shared.state.memory import Answer, MemoryState
from shared.state.port import Role
from shared.wire.codec import encode
from shared.wire.to_ingest import LogPosition
from shared.wire.to_stream_out import STREAM_OUT_DECODER, Cut, Open, View
from shared.wire.topics import MAX_RECORD_BYTES, STREAM_OUT
from tests.flow.test_whole import PROMPT, a_body, a_system, answer, expected


async def append(system, topic, request_id, message):
    async with MemoryBus(system.log, client_id="test").producer() as producer:
        await producer.send(topic, partition_of(request_id), encode(message))


async def test_jobs_that_wait_for_an_ingest_are_served_when_it_comes():
    async with a_system(ingests=0) as system:
        jobs = [await system.submit(a_body(PROMPT[:n], 8)) for n in range(70, 90)]
        await system.start_ingest()
        for job in jobs:
            assert (await system.result(job)).status == "completed"


async def test_a_job_that_is_read_again_long_after_its_result_is_not_placed_again(monkeypatch):
    async def nothing(_):
        pass

    monkeypatch.setattr("services.ingest.partitions.Partitions.commit", nothing)
    monkeypatch.setattr("services.ingest.ended.OLD_AFTER_S", 0.0)
    async with a_system() as system:
        job = await system.submit(a_body())
        await system.result(job)
        await system.ingests[0].leave()
        successor = await system.start_ingest()
        later = await system.submit(a_body())
        await system.result(later)
        records = system.log.records(STREAM_OUT.name, partition_of(job))
        messages = [STREAM_OUT_DECODER.decode(record.value) for record in records]
        assert sum(isinstance(message, Open) and message.request_id == job for message in messages) == 1
        assert successor.service._metrics.jobs_ended_before._value.get() == 1


async def test_a_chat_that_names_no_length_waits_for_the_workers_that_bound_it():
    async with a_system(make_engine=lambda: fake_engine(num_pages=8), prefills=0, decodes=0) as system:
        job = await system.submit({"model": "fake", "messages": [{"role": "user", "content": "hi"}], "temperature": 0})
        await asyncio.sleep(0.2)
        assert system.folded(job) is None
        await system.start_worker(Role.PREFILL)
        await system.start_worker(Role.DECODE)
        state = await system.ended(job)
        assert state.choice(0).end.finish in (FinishReason.STOP, FinishReason.LENGTH)
        assert state.view.num_prompt_tokens + state.view.sampling.max_tokens == 8 * 64


async def test_a_job_as_large_as_a_record_ends_and_its_beginning_is_kept():
    async with a_system() as system:
        body = b"x" * (MAX_RECORD_BYTES - 200)
        job = await system.submit(body, request_id="large")
        assert (await system.result(job)).error.code == "request_too_large"
        (letter,) = [r for p in range(16) for r in system.log.records("dead-letter", p)]
        assert body.startswith(letter.value)
        assert dict(letter.headers)["source-bytes"] == str(len(body)).encode()
        assert answer(await system.ended(await system.submit(a_body()))) == expected(PROMPT, 20)


async def test_a_job_that_meets_a_defect_ends_and_the_next_is_served():
    async with a_system() as system:
        admission = system.ingests[0].service._admission
        admit = admission.admit

        def fail_once(job, capacity):
            admission.admit = admit
            raise ZeroDivisionError

        admission.admit = fail_once
        unlucky = await system.submit(a_body())
        assert (await system.result(unlucky)).error.http_status == 500
        assert answer(await system.ended(await system.submit(a_body()))) == expected(PROMPT, 20)


async def test_a_choice_whose_job_is_gone_ends_and_holds_up_no_other():
    async with a_system() as system:
        gone = RequestId("gone")
        view = View("t", "fake", "h", False, 1, 3, system.clock_s() + 60, LogPosition(partition_of(gone), 77))
        worker = (await system.workers[0].service._parts.state.workers(num_slots=1))[0].ref
        await append(system, STREAM_OUT.name, gone, Open(gone, 0, 1, "p", worker, worker, view))
        await append(system, STREAM_OUT.name, gone, Cut(gone, 0, 2, "drain"))
        assert (await system.result(gone)).status == "failed"


async def test_a_choice_that_is_placed_again_keeps_its_max_tokens():
    """Nobody named them: they were what the workers that are there at first could hold."""
    async with a_system(drain_s=0.0, decodes=1, make_engine=lambda: fake_engine(num_pages=32)) as system:
        body = {**a_body(), "messages": [{"role": "user", "content": "hello"}]}
        del body["prompt"], body["max_tokens"]
        job = await system.submit(body)
        while (state := system.folded(job)) is None or len(state.choice(0).ids) < 5:
            await asyncio.sleep(0.001)
        max_tokens = state.view.sampling.max_tokens
        leaving = system.workers[1]
        system.make_engine = lambda: fake_engine(num_pages=64)
        await system.start_worker(Role.PREFILL)
        await system.start_worker(Role.DECODE)
        while len(system.ingests[0].service._cluster.view.decode) < 2:
            await asyncio.sleep(0.001)
        await leaving.leave()
        state = await system.ended(job)
        assert (state.choice(0).epoch, state.choice(0).end.finish) == (2, FinishReason.LENGTH)
        assert len(state.choice(0).ids) == max_tokens


async def test_ingest_leaves_in_bounds_while_the_log_is_away(monkeypatch):
    monkeypatch.setattr("services.ingest.service.LEAVE_TIMEOUT_S", 0.1)
    monkeypatch.setattr("shared.bus.memory.FLUSH_TIMEOUT_S", 0.1)
    async with a_system() as system:
        ingest = system.ingests[0]
        ingest.bus.can_send = False
        await system.submit(a_body())
        while not ingest.service._metrics.placed._value.get():
            await asyncio.sleep(0.001)
        async with asyncio.timeout(5):
            await ingest.leave()


async def test_a_placement_whose_answer_was_lost_is_found_again_though_it_fills_its_workers():
    async with a_system(make_engine=lambda: fake_engine(num_pages=8), decodes=1) as system:
        asked = []

        def lose_the_answer_once(name):
            asked.append(name)
            return Answer.LOST if name == "place" and asked.count("place") == 1 else Answer.GIVEN

        system.store.answer = lose_the_answer_once
        job = await system.submit(a_body())
        assert answer(await system.ended(job)) == expected(PROMPT, 20)
        assert asked.count("place") == 1
        await system.quiet()


async def test_who_waited_too_long_leaves_the_line_from_anywhere():
    async with a_system(make_engine=lambda: fake_engine(num_pages=64), prefills=0) as system:
        patient = await system.submit(a_body())
        deadline = ("deadline-unix-ms", str(int((system.clock_s() + 0.2) * 1000)).encode())
        hasty = await system.submit(a_body(), headers=[deadline])
        assert (await system.result(hasty)).status == "expired"
        await system.start_worker(Role.PREFILL)
        assert answer(await system.ended(patient)) == expected(PROMPT, 20)


async def until(condition, timeout_s=20.0):
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)


def ids_of_one_partition(partition, count):
    """Request ids that live there."""
    names = (RequestId(f"job{number}") for number in range(10_000))
    return [name for name in names if partition_of(name) == partition][:count]


async def test_what_was_read_under_a_lease_that_ended_is_no_word_on_the_next_one(monkeypatch):
    """Its hands are full when a partition is lost and comes back, and it dies after a commit."""
    monkeypatch.setattr("services.ingest.service.MAX_IN_HAND", 2)
    last = NUM_REQUEST_PARTITIONS - 1  # the first that is given up
    patient, hasty, waiting = ids_of_one_partition(last, 3)
    async with a_system(prefills=0, decodes=0) as system:
        owned = lambda: system.ingests[0].service._partitions.owned  # noqa: E731
        await until(lambda: last in owned())
        deadline = ("deadline-unix-ms", str(int((system.clock_s() + 0.8) * 1000)).encode())
        await system.submit(a_body(), request_id=patient)
        await system.submit(a_body(), request_id=hasty, headers=[deadline])
        await system.submit(a_body(), request_id=waiting)
        state, rival = MemoryState(system.store), Incarnation("rival")
        while last in owned():
            await state.lease_partitions("ingest", rival, num_partitions=NUM_REQUEST_PARTITIONS, lease_ms=keys.LEASE_MS)
            await asyncio.sleep(0.01)
        await state.leave_group("ingest", rival)
        await until(lambda: last in owned())
        assert (await system.result(hasty)).status == "expired"
        await asyncio.sleep(2.5)  # a commit
        await system.ingests[0].kill()
        await system.start_ingest()
        await system.start_worker(Role.PREFILL)
        await system.start_worker(Role.DECODE)
        for job in (patient, waiting):
            assert (await system.result(job, timeout_s=30)).status == "completed"


async def test_who_lost_its_workers_does_not_wait_behind_jobs_that_fill_all_hands(monkeypatch):
    monkeypatch.setattr("services.ingest.service.MAX_IN_HAND", 2)
    async with a_system(make_engine=lambda: fake_engine(num_pages=16), decodes=1, drain_s=0.0) as system:
        running = await system.submit(a_body(num_new=600))
        await until(lambda: (state := system.folded(running)) is not None and len(state.choice(0).ids) > 5)
        service = system.ingests[0].service
        others = [await system.submit(a_body(num_new=600)) for _ in range(4)]
        await until(lambda: len(service._backlog._line) >= 1 and service._hands["ingest"].full)
        await system.workers[-1].leave()
        await until(lambda: service._backlog._line.first().item.is_resumed)
        await system.start_worker(Role.DECODE)
        for job in (running, *others):
            assert answer(await system.ended(job)) == expected(PROMPT, 600)


BATCH = ("priority", b"batch")


async def test_batch_waits_in_the_log_and_in_nobodys_way(monkeypatch):
    """More of it than are kept at hand, and no worker yet: who comes behind is served before."""
    monkeypatch.setattr("services.ingest.service.MAX_BATCH_IN_HAND", 2)
    monkeypatch.setattr("services.ingest.service.MAX_IN_HAND", 4)
    async with a_system(prefills=0, decodes=0) as system:
        service = system.ingests[0].service
        batch = [await system.submit(a_body(), headers=[BATCH]) for _ in range(12)]
        await until(lambda: len(service._parked) == 10)
        hasty = ("deadline-unix-ms", str(int((system.clock_s() + 0.2) * 1000)).encode())
        late = await system.submit(a_body(), headers=[BATCH, hasty])
        urgent = [await system.submit(a_body()) for _ in range(3)]
        assert (await system.result(late)).status == "expired"
        await system.start_worker(Role.PREFILL)
        await system.start_worker(Role.DECODE)
        for job in (*urgent, *batch):
            assert answer(await system.ended(job)) == expected(PROMPT, 20)
        placed_s = {job: system.folded(job).choice(0).stamps[Event.PLACED] for job in (*urgent, *batch)}
        in_turn = sorted((*urgent, *batch), key=lambda job: placed_s[job])
        assert set(urgent) <= set(in_turn[:6]), "their records are written at about the same time"


async def test_batch_jobs_of_a_partition_that_is_lost_and_comes_back_are_parked_once(monkeypatch):
    monkeypatch.setattr("services.ingest.service.MAX_BATCH_IN_HAND", 1)
    last = NUM_REQUEST_PARTITIONS - 1  # the first that is given up
    async with a_system(prefills=0, decodes=0) as system:
        service = system.ingests[0].service
        owned = lambda: service._partitions.owned  # noqa: E731
        await until(lambda: last in owned())
        here, *batch = ids_of_one_partition(0, 1) + ids_of_one_partition(last, 6)
        for job in (here, *batch):
            await system.submit(a_body(), request_id=job, headers=[BATCH])
        await until(lambda: len(service._parked) == 6)
        state, rival = MemoryState(system.store), Incarnation("rival")
        for _ in range(3):
            while last in owned():
                await state.lease_partitions(
                    "ingest", rival, num_partitions=NUM_REQUEST_PARTITIONS, lease_ms=keys.LEASE_MS
                )
                await asyncio.sleep(0.01)
            assert len(service._parked) == 0
            assert len(service._ended._held) == 1
            await state.leave_group("ingest", rival)
            await until(lambda: len(service._parked) == 6)
        await system.start_worker(Role.PREFILL)
        await system.start_worker(Role.DECODE)
        for job in batch:
            assert answer(await system.ended(job)) == expected(PROMPT, 20)
        await until(lambda: not service._ended._held)


async def test_who_takes_over_does_not_run_again_what_ended_behind_one_that_waits(monkeypatch):
    """A batch job waits for longer than ends are remembered, and is what the successor takes up, and nothing else."""
    monkeypatch.setattr("services.ingest.low_water.NAMED_AFTER_S", 0.1)
    async with a_system(drain_s=0.0) as system:
        service = system.ingests[0].service
        monkeypatch.setattr("services.ingest.placer.leaves_others_alone", lambda *_, **__: False)
        partition = 3
        first, *others, last = ids_of_one_partition(partition, 6)
        await system.submit(a_body(), request_id=first, headers=[BATCH])
        for job in others:
            await system.submit(a_body(), request_id=job)
            await system.ended(job)
        commits = lambda: system.log.committed("ingest", "ingest", partition)  # noqa: E731
        await until(lambda: commits() is not None and commits().note.startswith("5:0@"))
        assert service._backlog._line.num_batch == 1
        await system.ingests[0].leave()
        monkeypatch.undo()
        successor = await system.start_ingest()
        await system.submit(a_body(), request_id=last)
        for job in (first, last):
            assert answer(await system.ended(job)) == expected(PROMPT, 20)
        assert successor.service._metrics.jobs._value.get() == 1
        await until(lambda: commits() == Committed(6))


async def test_a_job_that_was_left_expires_though_those_before_it_wait_for_workers(monkeypatch):
    """How long an answer may get that names no length only workers tell."""
    monkeypatch.setattr("services.ingest.low_water.NAMED_AFTER_S", 0.1)
    monkeypatch.setattr("services.ingest.service.NUM_LOOKED_UP", 1)
    partition = 3
    unnamed, hasty = ids_of_one_partition(partition, 2)
    async with a_system(prefills=0, decodes=0) as system:
        body = {name: value for name, value in a_body().items() if name != "max_tokens"}
        await system.submit(body, request_id=unnamed)
        deadline = ("deadline-unix-ms", str(int((system.clock_s() + 1.0) * 1000)).encode())
        await system.submit(a_body(), request_id=hasty, headers=[deadline])
        commits = lambda: system.log.committed("ingest", "ingest", partition)  # noqa: E731
        await until(lambda: commits() is not None and commits().note.startswith("2:0,1@"))
        await system.ingests[0].kill()
        await system.start_ingest()
        assert (await system.result(hasty)).status == "expired"


async def test_what_was_cancelled_while_it_waited_is_not_run_hours_later(monkeypatch):
    """When nobody who owns its story remembers that it ended."""
    monkeypatch.setattr("services.ingest.placer.leaves_others_alone", lambda *_, **__: False)
    async with a_system() as system, httpx.AsyncClient(timeout=20) as client:
        url, service = system.edges[0].url, system.ingests[0].service
        urgency = {"x-baton-priority": "batch"}
        asking = asyncio.create_task(client.post(f"{url}/v1/completions", json=a_body(), headers=urgency))
        await until(lambda: service._backlog._line.num_batch == 1)
        job = service._backlog._line.first().item.admitted.job.request_id
        await client.delete(f"{url}/v1/requests/{job}")
        assert (await asking).json()["error"]["code"] == "request_cancelled"
        await until(lambda: not len(service._backlog._line))
        assert service._metrics.jobs_ended_before._value.get() == 1
        assert not any(
            isinstance(STREAM_OUT_DECODER.decode(record.value), Open)
            for record in system.log.records(STREAM_OUT.name, partition_of(job))
        )


async def test_large_batch_jobs_that_come_at_once_take_no_more_hands_than_they_may(monkeypatch):
    """Their prompts are read in threads: none is in line yet when the next one is looked at."""
    monkeypatch.setattr("services.ingest.service.MAX_BATCH_IN_HAND", 3)
    monkeypatch.setattr("services.ingest.service.MAX_ADMITTED_HERE_BYTES", 0)
    async with a_system(ingests=0, prefills=0, decodes=0) as system:
        batch = [await system.submit(a_body(), headers=[BATCH]) for _ in range(30)]
        await system.start_ingest()
        service = system.ingests[0].service
        await until(lambda: len(service._parked) == 27)
        assert service._hands["batch"].full
        await system.start_worker(Role.PREFILL)
        await system.start_worker(Role.DECODE)
        for job in batch:
            assert answer(await system.ended(job)) == expected(PROMPT, 20)
