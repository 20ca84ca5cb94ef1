"""Messages to workers come back as they were sent, and each reader takes only its own."""

import pytest

from shared.blocks import token_ids
from shared.request import Incarnation, PlacementId, RequestId, SamplingParams, WorkerRef
from shared.wire.codec import UndecodableMessage, encode
from shared.wire.to_worker import (
    TO_DECODE_DECODER,
    TO_PREFILL_DECODER,
    Assignment,
    DecodeWork,
    FirstToken,
    KvTicket,
    LocalWork,
    PrefillWork,
    Stop,
)
from shared.wire.wire_format import WireFormat

WORKER = WorkerRef(3, Incarnation("w"))
TICKET = KvTicket("k", "host:1", Incarnation("p"), b"\x00" * 16, 3, "layout", WireFormat.INT8)
ASSIGNMENT = Assignment(
    RequestId("r"), 1, 2, PlacementId("a"), 2, SamplingParams(max_tokens=5), 9.5, max_wire_loss=WireFormat.INT4
)
IDS = token_ids((1, 2, 3))

TO_PREFILL = [PrefillWork(ASSIGNMENT, IDS, WORKER, WORKER), Stop(PlacementId("a"), WORKER)]
TO_DECODE = [
    DecodeWork(ASSIGNMENT, IDS, WORKER, TICKET),
    LocalWork(ASSIGNMENT, IDS, WORKER),
    FirstToken(PlacementId("a"), WORKER, 0),
    Stop(PlacementId("a"), WORKER),
]


@pytest.mark.parametrize(
    ("decoder", "messages"),
    [(TO_PREFILL_DECODER, TO_PREFILL), (TO_DECODE_DECODER, TO_DECODE)],
    ids=["prefill", "decode"],
)
def test_every_message_comes_back_as_it_was(decoder, messages):
    assert [decoder.decode(encode(message)) for message in messages] == messages


def test_a_worker_takes_only_what_is_for_its_role():
    for message in TO_DECODE[:3]:
        with pytest.raises(UndecodableMessage):
            TO_PREFILL_DECODER.decode(encode(message))
    with pytest.raises(UndecodableMessage):
        TO_DECODE_DECODER.decode(encode(TO_PREFILL[0]))


def test_an_assignment_that_says_nothing_of_loss_allows_none():
    plain = PrefillWork(
        Assignment(RequestId("r"), 0, 1, PlacementId("a"), 2, SamplingParams(max_tokens=5), 9.5), IDS, WORKER, WORKER
    )
    assert b"max_wire_loss" not in encode(plain)
    assert TO_PREFILL_DECODER.decode(encode(plain)).assignment.max_wire_loss is WireFormat.NATIVE
