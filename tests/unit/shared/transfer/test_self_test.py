import pytest

from shared.transfer.self_test import LATENCY_BYTES, LONG_ENOUGH_S, SIZES, measure


class Wire:
    """A link whose first message of each size costs more."""

    def __init__(self, bytes_per_s, latency_s, first_s=0.1):
        self.sent = []
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._first_s = first_s

    async def exchange(self, num_bytes):
        first_s = 0.0 if num_bytes in self.sent else self._first_s
        self.sent.append(num_bytes)
        return self._latency_s + num_bytes / self._bytes_per_s + first_s


async def test_a_slow_link_is_not_kept_busy():
    wire = Wire(2.5e6, 1e-3, first_s=0.0)
    speed = await measure(wire.exchange, 2**30)
    assert speed.bytes_per_s == pytest.approx(2.5e6, rel=0.01)
    assert [size for size in wire.sent if size > LATENCY_BYTES] == [SIZES[0], SIZES[0]]


@pytest.mark.parametrize("max_bytes", [2**30, 300 * 2**20, 256 * 2**20])
async def test_a_fast_link_is_measured_by_the_largest_message(max_bytes):
    wire = Wire(350e9, 50e-6, first_s=0.0)
    speed = await measure(wire.exchange, max_bytes)
    assert speed.bytes_per_s == pytest.approx(350e9, rel=0.01)
    assert speed.latency_s == pytest.approx(50e-6, rel=0.01)
    assert [size for size in wire.sent if size > LATENCY_BYTES] == [size for size in SIZES for _ in range(2)]


async def test_what_happens_once_is_not_counted():
    wire = Wire(350e9, 50e-6, first_s=0.09)
    speed = await measure(wire.exchange, 2**30)
    assert speed.latency_s == pytest.approx(50e-6, rel=0.01)
    assert speed.bytes_per_s == pytest.approx(350e9, rel=0.01)


@pytest.mark.parametrize("max_bytes", [1, 2000, LATENCY_BYTES, 2**20 - 1])
async def test_small_arenas_are_not_asked_for_more(max_bytes):
    wire = Wire(1e9, 1e-4, first_s=0.0)
    speed = await measure(wire.exchange, max_bytes)
    assert max(wire.sent) == max_bytes
    assert 0 < speed.bytes_per_s < float("inf")
    assert LONG_ENOUGH_S > 1e-4
