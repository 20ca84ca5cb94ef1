import asyncio
import json
from contextlib import suppress
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.blocks import NAME_BYTES, token_ids
from shared.transfer.control import (
    MAX_CONTROL_BYTES,
    TO_PULLER_DECODER,
    TO_SOURCE_DECODER,
    Confirm,
    Fetch,
    Found,
    GiveUp,
    Hello,
    Knock,
    OversizedMessage,
    Part,
    Probe,
    Pull,
    Ready,
    Refused,
    Released,
    Speed,
    ToPuller,
    ToSource,
    read_frame,
    to_frame,
)
from shared.transfer.host_facts import HostFacts
from shared.transfer.port import MAX_FETCH_BLOCKS, Refusal
from shared.transfer.proof import PROOF_BYTES
from shared.wire.codec import UndecodableMessage, type_name
from shared.wire.wire_format import WireFormat

HELLO = Hello(
    protocol=2,
    layout_fingerprint="ab",
    incarnation="i",
    max_part_bytes=5,
    ucx_address=b"\x00\xff",
    host=HostFacts("boot", "host", "pid", "ipc", "net", "cuda", gpu_uuid="GPU-1", rdma_devices=("mlx5_0",)),
)


async def frames(*chunks):
    reader = asyncio.StreamReader()
    for chunk in chunks:
        reader.feed_data(chunk)
    reader.feed_eof()
    return reader


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (TO_SOURCE_DECODER, HELLO),
        (TO_SOURCE_DECODER, Pull(pull=1, key="k", proof=b"\x00" * 32, want=token_ids((4, 1)))),
        (TO_SOURCE_DECODER, Ready(pull=1, index=0, tag=2**64 - 1)),
        (TO_SOURCE_DECODER, Fetch(pull=1, names=b"\x00" * 32, proofs=b"\xff" * 32)),
        (TO_PULLER_DECODER, Found(pull=1, num_pages=2)),
        (TO_SOURCE_DECODER, Confirm(pull=1)),
        (TO_SOURCE_DECODER, GiveUp(pull=1)),
        (TO_PULLER_DECODER, HELLO),
        (TO_SOURCE_DECODER, Knock(source="i")),
        (TO_SOURCE_DECODER, Probe(pull=3, num_bytes=4096)),
        (TO_SOURCE_DECODER, Speed(bytes_per_s=2.5e11, latency_s=5e-5)),
        (
            TO_PULLER_DECODER,
            Part(pull=1, index=2, start=3, end=4, first_layer=0, end_layer=8, format=WireFormat.INT4, num_bytes=9),
        ),
        (TO_PULLER_DECODER, Refused(pull=1, reason=Refusal.EXPIRED)),
        (TO_PULLER_DECODER, Released(pull=1)),
    ],
    ids=repr,
)
async def test_a_message_arrives_as_it_was_sent(decoder, message):
    reader = await frames(to_frame(message), to_frame(message))
    for _ in range(2):
        assert decoder.decode(await read_frame(reader)) == message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"[]",
        b'{"type": "released", "pull": 1}',
        b'{"type": "confirm", "pull": -1}',
        b'{"type": "pull", "pull": 1}',
        b'{"type": "ready", "pull": 1, "index": 0, "tag": -1}',
        b'{"type": "ready", "pull": 1, "index": 0, "tag": 18446744073709551616}',
        b'{"type": "pull", "pull": 1, "key": "k", "proof": "\xff", "want": ""}',
        b'{"type": "pull", "pull": 1, "key": "k", "proof": "", "want": [0]}',
        b'{"type": "pull", "pull": 1, "key": "k", "proof": "", "want": "AAA="}',
        b'{"type": "probe", "pull": 1, "num_bytes": 0}',
        b'{"type": "speed", "bytes_per_s": 0, "latency_s": 0}',
        b'{"type": "speed", "bytes_per_s": 1e999, "latency_s": 0}',
    ],
)
def test_what_no_puller_sends_is_named(body):
    with pytest.raises(UndecodableMessage):
        TO_SOURCE_DECODER.decode(body)


async def test_a_frame_over_the_limit_is_refused_before_it_is_read():
    with pytest.raises(OversizedMessage, match="over the limit"):
        await read_frame(await frames((MAX_CONTROL_BYTES + 1).to_bytes(4, "big")))
    with pytest.raises(ValueError, match="over the limit"):
        to_frame(Pull(pull=1, key="k" * MAX_CONTROL_BYTES, proof=b"", want=token_ids(())))


async def test_a_stream_that_ends_in_a_frame_says_so():
    with pytest.raises(asyncio.IncompleteReadError):
        await read_frame(await frames(to_frame(HELLO)[:-1]))


@given(st.binary(max_size=200))
def test_bytes_of_a_stranger_are_a_message_or_are_named(body):
    for decoder in (TO_SOURCE_DECODER, TO_PULLER_DECODER):
        with suppress(UndecodableMessage):
            decoder.decode(body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = sorted(
    {name for message in (*get_args(ToSource), *get_args(ToPuller)) for name in message.__dataclass_fields__}
)
TYPES = sorted({type_name(message) for message in (*get_args(ToSource), *get_args(ToPuller))})


@given(st.sampled_from(TYPES), st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_fields_of_a_stranger_are_a_message_or_are_named(kind, fields):
    body = json.dumps({"v": 1, "type": kind, **fields}).encode()
    for decoder in (TO_SOURCE_DECODER, TO_PULLER_DECODER):
        with suppress(UndecodableMessage):
            decoder.decode(body)


def test_as_many_blocks_as_one_fetch_may_have_fit_a_message():
    names, proofs = bytes(NAME_BYTES * MAX_FETCH_BLOCKS), bytes(PROOF_BYTES * MAX_FETCH_BLOCKS)
    assert len(to_frame(Fetch(2**63 - 1, names, proofs))) < MAX_CONTROL_BYTES
