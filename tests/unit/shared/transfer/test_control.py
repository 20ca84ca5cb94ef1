import asyncio

import pytest

from shared.transfer.control import (
    MAX_CONTROL_BYTES,
    TO_PULLER_DECODER,
    TO_SOURCE_DECODER,
    Confirm,
    GiveUp,
    Granted,
    Hello,
    Pull,
    Ready,
    Refused,
    Released,
    read_frame,
    to_frame,
)
from shared.transfer.port import Refusal
from shared.wire.codec import UndecodableMessage

HELLO = Hello(protocol=1, layout_fingerprint="ab", incarnation="i", message_bytes=5, ucx_address=b"\x00\xff")


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
        (TO_SOURCE_DECODER, Pull(pull=1, key="k", secret=b"\x00" * 16, want=(4, 1))),
        (TO_SOURCE_DECODER, Ready(pull=1, index=0, tag=2**64 - 1, num_bytes=7)),
        (TO_SOURCE_DECODER, Confirm(pull=1)),
        (TO_SOURCE_DECODER, GiveUp(pull=1)),
        (TO_PULLER_DECODER, HELLO),
        (TO_PULLER_DECODER, Granted(pull=1)),
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
        b'{"type": "granted", "pull": 1}',
        b'{"type": "pull", "pull": 1}',
        b'{"type": "ready", "pull": 1, "index": 0, "tag": -1, "num_bytes": 5}',
        b'{"type": "ready", "pull": 1, "index": 0, "tag": 18446744073709551616, "num_bytes": 5}',
        b'{"type": "pull", "pull": 1, "key": "k", "secret": "\xff", "want": []}',
    ],
)
def test_what_no_puller_sends_is_named(body):
    with pytest.raises(UndecodableMessage):
        TO_SOURCE_DECODER.decode(body)


async def test_a_frame_over_the_limit_is_refused_before_it_is_read():
    with pytest.raises(UndecodableMessage, match="over the limit"):
        await read_frame(await frames((MAX_CONTROL_BYTES + 1).to_bytes(4, "big")))
    with pytest.raises(ValueError, match="over the limit"):
        to_frame(Pull(pull=1, key="k" * MAX_CONTROL_BYTES, secret=b"", want=()))


async def test_a_stream_that_ends_in_a_frame_says_so():
    with pytest.raises(asyncio.IncompleteReadError):
        await read_frame(await frames(to_frame(HELLO)[:-1]))
