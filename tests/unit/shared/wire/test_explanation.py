"""Why a choice was placed where it was: small on the wire, and not missed in records that do not tell."""

from dataclasses import replace

import orjson
import pytest

from shared.request import Incarnation, PlacementId, RequestId, WorkerRef
from shared.wire.codec import UndecodableMessage, encode
from shared.wire.explanation import MAX_CANDIDATES, Candidate, Explanation
from shared.wire.to_stream_out import STREAM_OUT_DECODER, Open

WORKER = WorkerRef(3, Incarnation("w"))
A_CANDIDATE = Candidate(
    prefill=0,
    decode=63,
    ttft_s=0.123456,
    tpot_s=0.0056789,
    cost_s=12345.6,
    cached_pages=5,
    fetched_pages=0,
    queue_s=0.0,
    transfer_s=1e-12,
    is_local=False,
)
EXPLANATION = Explanation("least time lost", 70, (A_CANDIDATE,))
OPEN = Open(RequestId("r"), 0, 2, PlacementId("p"), WORKER, WORKER, explanation=EXPLANATION)


def test_it_comes_back_as_it_was_written():
    assert STREAM_OUT_DECODER.decode(encode(OPEN)) == OPEN


def test_an_open_of_an_older_ingest_tells_no_reason():
    old = b"""{"v": 1, "type": "open", "request_id": "r", "choice": 0, "epoch": 2, "placement": "p",
        "prefill": {"slot": 3, "incarnation": "w"}, "decode": {"slot": 3, "incarnation": "w"}}"""
    assert STREAM_OUT_DECODER.decode(old) == replace(OPEN, explanation=None)
    assert orjson.loads(encode(replace(OPEN, explanation=None))) == orjson.loads(old)


@pytest.mark.parametrize(("name", "value"), [("decode", 64), ("cached_pages", -1), ("ttft_s", None)])
def test_no_reader_gets_numbers_out_of_bounds(name, value):
    record = orjson.loads(encode(OPEN))
    record["explanation"]["candidates"][0][Candidate._fields.index(name)] = value
    with pytest.raises(UndecodableMessage):
        STREAM_OUT_DECODER.decode(orjson.dumps(record))


def test_it_is_written_in_brief():
    many = replace(EXPLANATION, candidates=tuple(A_CANDIDATE._replace(decode=slot) for slot in range(20))).brief()
    assert [each.decode for each in many.candidates] == list(range(MAX_CANDIDATES))
    first = many.candidates[0]
    assert (first.ttft_s, first.tpot_s, first.cost_s, first.queue_s, first.transfer_s) == (
        0.123,
        0.00568,
        12300,
        0,
        1e-12,
    )
    assert many.brief() == many
    assert len(encode(replace(OPEN, explanation=many))) < 600


def test_no_name_of_a_candidate_travels():
    (candidate,) = orjson.loads(encode(OPEN))["explanation"]["candidates"]
    assert candidate == [0, 63, 0.123456, 0.0056789, 12345.6, 5, 0, 0.0, 1e-12, False]


@pytest.mark.parametrize("candidate", [[0, 63], [0] * 11, "0", {"decode": 3}])
def test_no_reader_gets_half_a_candidate(candidate):
    record = orjson.loads(encode(OPEN))
    record["explanation"]["candidates"] = [candidate]
    with pytest.raises(UndecodableMessage):
        STREAM_OUT_DECODER.decode(orjson.dumps(record))


def test_people_see_all_of_it():
    seen = EXPLANATION.members()
    assert {name: value for name, value in seen.items() if name != "candidates"} == {
        "reason": "least time lost",
        "num_considered": 70,
    }
    assert [Candidate(**each) for each in seen["candidates"]] == [A_CANDIDATE]
