"""Each topic's records, as nobody of ours would write them: no service ends, and who is beside them is served."""

import itertools
from collections import Counter
from dataclasses import replace

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.blocks import token_ids
from shared.policy.fold import PartitionFold
from shared.request import (
    Event,
    FinishReason,
    Incarnation,
    PlacementId,
    RequestId,
    SamplingParams,
    TokenLogprob,
    WorkerRef,
    partition_of,
)
from shared.state.port import Role
from shared.wire.codec import UndecodableMessage, encode
from shared.wire.explanation import Candidate, Explanation
from shared.wire.results import Result
from shared.wire.to_ingest import (
    HEADER_DEADLINE,
    HEADER_EDGE,
    HEADER_PRIORITY,
    HEADER_TENANT,
    LogPosition,
    Resume,
)
from shared.wire.to_stream_out import (
    STREAM_OUT_DECODER,
    Attach,
    Cut,
    Detach,
    ErrorBody,
    Frame,
    FrameEntry,
    Open,
    View,
)
from shared.wire.to_worker import (
    Assignment,
    DecodeWork,
    FetchTicket,
    FirstToken,
    KvTicket,
    LocalWork,
    PrefillWork,
    Stop,
)
from shared.wire.topics import DECODE, INGEST, INGEST_RESUME, PREFILL, RESULTS, STREAM_OUT
from tests.flow.system import MODEL
from tests.fuzz.bodies import BODIES, SPECIAL_BODIES
from tests.fuzz.live import live_system, usable
from tests.fuzz.records import FUZZ, HOSTILE_TEXTS, garbage, hostile

SAMPLING = SamplingParams(max_tokens=3, temperature=0.0)


@pytest.fixture(scope="module")
def live():
    """One system for all topics; at the end everything has settled."""
    with live_system() as live:
        live.check_good_request()
        yield live
        live.check_good_request()
        live.check_quiet()


def wire(*messages) -> list[dict]:
    return [orjson.loads(encode(message)) for message in messages]


def fuzz(strategy, try_one) -> None:
    """Give each drawn record to `try_one`."""

    @FUZZ
    @given(strategy)
    def run(record):
        try_one(record)

    run()


# ingest

bodies = hostile(BODIES) | st.sampled_from(SPECIAL_BODIES)
keys = st.none() | st.binary(max_size=6) | st.sampled_from([b"twice", b"a" * 129, b"\xff", b"with space", b""])
header_values = (
    st.binary(max_size=12)
    | st.sampled_from([b"interactive", b"batch", b"Batch", b"batch "])
    | st.sampled_from([b"0", b"1", b"9" * 16, b"9" * 5000, b"-1", b"1e308", b"nan", b"NaN", b"\xd9\xa1", b"\xff"])
    | st.sampled_from(HOSTILE_TEXTS).map(str.encode)
)
HEADERS = [HEADER_TENANT, HEADER_PRIORITY, HEADER_DEADLINE, HEADER_EDGE, "traceparent", "", "x"]
headers = st.lists(st.tuples(st.sampled_from(HEADERS), header_values), max_size=3)


def test_jobs(live):
    numbers = itertools.count()
    sent: set[bytes] = set()

    def try_one(record):
        key, own_key, job_headers, body, partition = record
        key = f"fuzz-{next(numbers)}".encode() if own_key else key
        if usable(key):
            partition = partition_of(RequestId(key.decode()))
            sent.add(key)
        live.send(INGEST.name, partition, body, key=key, headers=job_headers)
        live.check_alive()

    fuzz(st.tuples(keys, st.sampled_from([True, True, False]), headers, bodies, st.integers(0, 15)), try_one)
    live.check_good_request()
    live.check_each_has_one_result(sent)
    live.check_quiet()


# ingest-resume


def resume(**changes) -> Resume:
    fields = {
        "request_id": RequestId("job-of-old"),
        "choice": 0,
        "epoch": 2,
        "job": LogPosition(0, 0),
        "max_tokens": 5,
        "accepted_ids": token_ids([5, 6]),
    }
    return Resume(**(fields | changes))


def test_requests_to_place_again(live):
    body = orjson.dumps(BODIES[0])
    live.send(INGEST.name, partition_of(RequestId("job-of-old")), body, key=b"job-of-old")
    live.check_each_has_one_result({b"job-of-old"})
    partition = partition_of(RequestId("job-of-old"))
    place = next(r.offset for r in live.system.log.records(INGEST.name, partition) if r.key == b"job-of-old")
    bases = wire(
        resume(),
        resume(job=LogPosition(partition, place), epoch=10**6, choice=7),
        resume(job=LogPosition(partition, place), max_tokens=1, accepted_ids=token_ids([5] * 300)),
        resume(job=LogPosition(partition, place), accepted_ids=token_ids([2**31 - 1, -1])),
        resume(job=LogPosition(10**6, -5), choice=-3, epoch=-1),
    )

    def try_one(value):
        live.send(INGEST_RESUME.name, partition, value)
        live.check_alive()

    fuzz(hostile(bases), try_one)
    live.check_good_request()
    live.check_quiet()
    assert live.system.ingests[0].service._metrics.undecodable._value.get() > 0


# prefill and decode


def worker_of(live, role: Role) -> WorkerRef:
    (running,) = [w for w in live.system.workers if w.service._parts.role_name is role]
    return WorkerRef(running.service._slot, running.incarnation)


def assignment(number: int, **changes) -> Assignment:
    fields = {
        "request_id": RequestId(f"forged-{number}"),
        "choice": 0,
        "epoch": 1,
        "placement": PlacementId(f"forged-placement-{number}"),
        "prompt_len": 3,
        "sampling": SAMPLING,
        "deadline_s": live_deadline_s,
    }
    return Assignment(**(fields | changes))


live_deadline_s = 1e9


def to_workers(live) -> tuple[list[dict], list[dict]]:
    prefill, decode = worker_of(live, Role.PREFILL), worker_of(live, Role.DECODE)
    ids = token_ids([5, 6, 7])
    wild = token_ids([2**31 - 1, -1, 5])

    def ticket(**changes):
        fields = {
            "key": "forged-placement-1",
            "address": "nowhere:1",
            "source": prefill.incarnation,
            "secret": b"guess",
            "num_tokens": 3,
            "layout_fingerprint": "other",
        }
        return KvTicket(**(fields | changes))

    stranger = WorkerRef(3, Incarnation("stranger"))
    long = token_ids([5] * 200)

    def long_work(number: int) -> Assignment:
        return assignment(number, prompt_len=200)

    def fetch(source=prefill, address=f"{prefill.incarnation}:1", num_pages=3) -> FetchTicket:
        return FetchTicket(source, address, num_pages)

    return (
        wire(
            PrefillWork(assignment(1), ids, prefill, decode),
            PrefillWork(assignment(2), ids, prefill, stranger),
            PrefillWork(assignment(3), wild, prefill, decode),
            PrefillWork(assignment(4, prompt_len=10**6), ids, prefill, decode),
            PrefillWork(assignment(5, deadline_s=0.0, choice=-1, epoch=-1), token_ids([]), prefill, decode),
            PrefillWork(assignment(6, stop_strings=("", "x"), deadline_s=1e308), ids, prefill, WorkerRef(10**6, "x")),
            PrefillWork(assignment(7, sampling=SamplingParams(max_tokens=-5)), ids, prefill, decode),
            PrefillWork(assignment(8), ids, stranger, decode),
            PrefillWork(long_work(9), long, prefill, decode, fetch(decode, f"{decode.incarnation}:1")),
            PrefillWork(long_work(10), long, prefill, decode, fetch()),
            PrefillWork(long_work(11), long, prefill, decode, fetch(stranger, "", num_pages=10**12)),
            PrefillWork(assignment(12), ids, prefill, decode, fetch(decode, num_pages=-1)),
            Stop(PlacementId(""), prefill),
        ),
        wire(
            DecodeWork(assignment(1), ids, decode, ticket()),
            DecodeWork(assignment(2), ids, decode, ticket(num_tokens=10**9)),
            DecodeWork(assignment(3), wild, decode, ticket(num_tokens=-1, address="")),
            DecodeWork(assignment(4, prompt_len=-1), ids, decode, ticket(source=Incarnation(""))),
            DecodeWork(assignment(5, deadline_s=1e308), token_ids([5] * 3000), decode, ticket()),
            DecodeWork(assignment(6), token_ids([]), decode, ticket(key="")),
            LocalWork(assignment(7), ids, decode),
            LocalWork(assignment(8, prompt_len=-1, stop_strings=("", "x")), wild, decode),
            LocalWork(assignment(9, sampling=SamplingParams(max_tokens=-5)), token_ids([]), decode),
            LocalWork(assignment(10, prompt_len=1, sampling=SamplingParams(max_tokens=2)), ids, decode),
            LocalWork(assignment(11), ids, stranger),
            LocalWork(long_work(12), long, decode, fetch()),
            LocalWork(long_work(13), long, decode, fetch(address="nowhere:99999999", num_pages=0)),
            LocalWork(long_work(14), token_ids([2**31 - 1] * 200), decode, fetch(stranger)),
            FirstToken(PlacementId("forged-placement-1"), decode, -1),
            FirstToken(PlacementId("forged-placement-2"), decode, 2**40),
            FirstToken(PlacementId("forged-placement-3"), decode, 7),
            Stop(PlacementId("forged-placement-1"), decode),
            Stop(PlacementId("forged-placement-1"), stranger),
        ),
    )


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_work(live, role):
    to_prefill, to_decode = to_workers(live)
    own, other = (to_prefill, to_decode) if role is Role.PREFILL else (to_decode, to_prefill)
    me = worker_of(live, role)
    placements = set()
    numbers = itertools.count()

    def try_one(record):
        topic, value = record
        value = value.replace(b"forged", b"forged-%s-%d" % (role.value.encode(), next(numbers) // 3))
        live.send(topic, me.slot, value)
        placements.update(placement_in(value))
        live.check_alive()

    own_topic, other_topic = (PREFILL, DECODE) if role is Role.PREFILL else (DECODE, PREFILL)
    wrong_topic = st.tuples(st.just(other_topic.name), hostile(own))
    wrong_role = st.tuples(st.just(own_topic.name), hostile(other))
    right = st.tuples(st.just(own_topic.name), hostile(own))
    fuzz(st.one_of(right, right, right, wrong_topic, wrong_role), try_one)
    live.check_good_request()
    for placement in placements:  # as the owner of a forged request would
        for target in (worker_of(live, Role.PREFILL), worker_of(live, Role.DECODE)):
            for topic in (PREFILL, DECODE):
                live.send(topic.name, target.slot, encode(Stop(PlacementId(placement), target)))
    live.check_quiet()
    for worker in live.system.workers:
        if worker.service._parts.role_name is role:
            assert worker.service._parts.metrics.ignored.labels(MODEL, "undecodable")._value.get() > 0


def placement_in(value: bytes) -> set[str]:
    try:
        message = orjson.loads(value)
    except orjson.JSONDecodeError:
        return set()
    work = message.get("assignment") if isinstance(message, dict) else None
    placement = work.get("placement") if isinstance(work, dict) else None
    return {placement} if isinstance(placement, str) else set()


# stream-out


def view(**changes) -> View:
    fields = {
        "tenant": "t",
        "model": MODEL,
        "body_hash": "h",
        "chat": True,
        "num_choices": 1,
        "num_prompt_tokens": 3,
        "deadline_s": 1e9,
        "job": LogPosition(0, 0),
        "sampling": SAMPLING,
        "stamps": {Event.ACCEPTED: 1.0},
    }
    return View(**(fields | changes))


PREFILL_REF, DECODE_REF = WorkerRef(60, Incarnation("gone-p")), WorkerRef(61, Incarnation("gone-d"))


CANDIDATE = Candidate(60, 61, 0.1, 0.01, 1.0, 3, 1, 0.0, 1e308, is_local=False)
WHY = Explanation("least of all", 10**9, (CANDIDATE, CANDIDATE._replace(prefill=61, is_local=True)))


def story(name: str, seen: View, *entries: FrameEntry) -> list:
    request_id = RequestId(name)
    return [
        Open(request_id, 0, 1, PlacementId("p"), PREFILL_REF, DECODE_REF, view=seen),
        Frame(DECODE_REF, entries or (entry(name, 0, finish=FinishReason.STOP),), 1.0),
    ]


def entry(name: str, index: int, ids=(5, 6), **changes) -> FrameEntry:
    return FrameEntry(RequestId(name), 0, PlacementId("p"), index, token_ids(ids), **changes)


def stream_out_messages() -> list[dict]:
    logprob = TokenLogprob(-1.0, ((5, -1.0), (10**7, -2.0)))
    return wire(
        *story("forged-1", view()),
        *story("forged-2", view(num_choices=10**9)),
        *story("forged-3", view(chat=False, stop_strings=("",)), entry("forged-3", 0, (10**6,), finish="stop")),
        *story("forged-4", view(sampling=SamplingParams(max_tokens=2, logprobs=2)), entry("forged-4", -5)),
        *story("forged-5", view(), entry("forged-5", 10**12, logprobs=(logprob,) * 9, finish=FinishReason.LENGTH)),
        *story("forged-6", view(stamps={Event.ACCEPTED: 1e308}, deadline_s=1e308)),
        *story("forged-7", view(num_choices=0, num_prompt_tokens=-4)),
        *story("forged-8", view(edge=Incarnation("")), entry("forged-8", 0, finish=FinishReason.REJECTED)),
        *(replace(each, explanation=WHY) if isinstance(each, Open) else each for each in story("forged-9", view())),
        Cut(RequestId("forged-1"), 0, 2, "", FinishReason.CANCELLED, ErrorBody("m", "t", 10**6, retry_after_s=1e308)),
        Cut(RequestId("forged-1"), 0, 10**9, "far ahead"),
        Cut(RequestId("forged-9"), -1, 2, "before any open", FinishReason.EXPIRED),
        Cut(RequestId("forged-10"), 10**9, -1, "drain", view=view(num_choices=3)),
        Cut(RequestId("forged-11"), 0, 2, "odd", FinishReason.STOP, view=view()),
        Cut(RequestId(""), 0, 2, "no id", FinishReason.REJECTED),
        Attach(RequestId("forged-1"), Incarnation("nobody"), "s"),
        Detach(RequestId("forged-1"), Incarnation("nobody"), "s"),
    )


def test_stories(live):
    numbers = itertools.count()

    def try_one(record):
        partition, several = record
        # A story is left alone after a while, so that what was done to it may come to its end.
        name = b"forged-%d" % (next(numbers) // 8)
        for value in several:
            live.send(STREAM_OUT.name, partition, value.replace(b"forged", name))
        live.check_alive()

    fuzz(st.tuples(st.integers(0, 15), st.lists(hostile(stream_out_messages()), min_size=1, max_size=4)), try_one)
    live.check_good_request()
    check_ends_are_told(live)
    check_placements_are_told(live)
    live.check_quiet()
    assert live.system.edges[0].service.metrics.undecodable._value.get() > 0


def test_a_story_of_which_no_answer_can_be_made_ends_all_the_same(live):
    request_id = RequestId("forged-without-view")
    opened, ended = story(request_id, view())
    for message in (replace(opened, view=None), ended):
        live.send(STREAM_OUT.name, partition_of(request_id), encode(message))
    live.check_each_has_one_result({request_id.encode()})
    live.check_good_request()


def check_placements_are_told(live) -> None:
    """Of whatever stands in the log, where it can be asked for."""
    told = RequestId("forged-told")
    for message in story(told, view()):
        said = replace(message, explanation=WHY) if isinstance(message, Open) else message
        live.send(STREAM_OUT.name, partition_of(told), encode(said))
    live.check_each_has_one_result({told.encode()})

    async def ask():
        async with httpx.AsyncClient(base_url=live.system.edges[0].url, trust_env=False) as client:
            names = [told, *(f"forged-{number}-{kind}" for number in range(4) for kind in range(1, 12))]
            return [await client.get(f"/v1/requests/{name}/placement") for name in names]

    answers = live.run(ask())
    assert {answer.status_code for answer in answers} <= {200, 404}
    (placed,) = answers[0].json()["placements"]
    assert placed["explanation"]["candidates"][0]["queue_s"] == CANDIDATE.queue_s


def check_ends_are_told(live) -> None:
    """What ended, as its partition has it, has its result; a story that was put into two has an end in each."""
    ended: Counter[bytes] = Counter()
    for partition in range(STREAM_OUT.num_partitions):
        fold = PartitionFold()
        for record in live.system.log.records(STREAM_OUT.name, partition):
            try:
                fold.apply(record.offset, record.timestamp_s, STREAM_OUT_DECODER.decode(record.value))
            except UndecodableMessage:
                continue
        ended.update(request_id.encode() for request_id, state in fold.requests.items() if state.finished)
    live.check_numbers_of_results(ended)


# results, as a new owner reads them


def test_results_that_a_new_owner_reads():
    strange_keys = st.none() | st.binary(max_size=8) | st.sampled_from([b"\xff", b"", b"a" * 3000])
    bases = wire(Result(RequestId("forged"), "completed", response={"a": 1}), Result(RequestId(""), "no status"))

    with live_system() as live:

        def try_one(record):
            partition, key, value = record
            live.send(RESULTS.name, partition, value, key=key)

        fuzz(st.tuples(st.integers(0, 15), strange_keys, hostile(bases) | garbage), try_one)
        live.run(live.change_edges())
        live.check_good_request()
        live.check_quiet()
