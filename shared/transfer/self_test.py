"""How a link is measured: messages of growing size, until one takes long enough to say something."""

from collections.abc import Awaitable, Callable

from shared.transfer.plan import LinkSpeed

LATENCY_BYTES = 4 * 2**10
NUM_LATENCIES = 8
"""The shortest of so many small messages tells the latency: the first ones connect, others meet a busy process."""

SIZES = (2**20, 16 * 2**20, 128 * 2**20, 256 * 2**20)
"""Bytes of the messages that tell the speed."""

LONG_ENOUGH_S = 0.02
"""A message that takes so long needs no larger one after it."""

Exchange = Callable[[int], Awaitable[float]]
"""Brings so many bytes over the link; returns the seconds from being ready for them to having them."""


async def measure(exchange: Exchange, max_bytes: int) -> LinkSpeed:
    """The speed of a link that carries messages of `max_bytes` at the most.

    Each size travels twice: the first time pays for what happens once, such as opening the memory of a peer.
    """
    latency_s = min([await exchange(min(LATENCY_BYTES, max_bytes)) for _ in range(NUM_LATENCIES)])
    num_bytes, took_s = 0, 0.0
    for num_bytes in [size for size in SIZES if size <= max_bytes] or [max_bytes]:
        await exchange(num_bytes)
        took_s = await exchange(num_bytes)
        if took_s >= LONG_ENOUGH_S:
            break
    return LinkSpeed(bytes_per_s=num_bytes / max(took_s - latency_s, took_s / 2), latency_s=latency_s)
