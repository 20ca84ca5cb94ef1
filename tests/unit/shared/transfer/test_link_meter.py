import pytest

from shared.transfer.link_meter import SHARE, STALL_S, LinkMeter
from shared.transfer.plan import LinkSpeed


class Sender:
    def __init__(self, speed=None):
        self.now_s = 100.0
        self.meter = LinkMeter(lambda: self.now_s)
        self.meter.speed = speed

    def send(self, num_bytes, took_s):
        self.meter.begin(num_bytes)
        self.now_s += took_s
        self.meter.end(num_bytes)
        self.meter.learn()


def test_what_was_sent_moves_the_speed_towards_what_the_link_does():
    sender = Sender(LinkSpeed(1000.0, 0.5))
    speeds = []
    for _ in range(30):
        sender.send(1000, 0.5)
        speeds.append(sender.meter.speed.bytes_per_s)
    assert speeds == sorted(speeds)
    assert 1900 < speeds[-1] < 2000
    assert sender.meter.speed.latency_s == 0.5


def test_short_sends_say_nothing():
    sender = Sender(LinkSpeed(1000.0, 0.5))
    sender.send(100, 0.001)
    assert sender.meter.speed == LinkSpeed(1000.0, 0.5)


def test_a_fast_link_stays_fast_though_the_process_stands_still_now_and_then():
    sender = Sender(LinkSpeed(1e11, 0.0))
    for _ in range(50):
        sender.send(2**23, 0.025)
        for _ in range(100):
            sender.send(2**26, 2**26 / 1e11)
    assert sender.meter.speed.bytes_per_s > 0.7e11


def test_a_speed_that_was_measured_too_low_is_mended_by_large_short_sends():
    sender = Sender(LinkSpeed(1e9, 0.0))
    for _ in range(2000):
        sender.send(2**27, 2**27 / 1e11)
    assert sender.meter.speed.bytes_per_s > 0.7e11


def test_a_send_too_short_for_the_clock_counts_too():
    sender = Sender(LinkSpeed(1000.0, 0.0))
    sender.send(2**24, 0.0)
    assert sender.meter.speed.bytes_per_s == 1000.0 + 0.25 * 2**24 / 0.5


def test_a_link_that_was_not_tested_stays_without_a_speed():
    sender = Sender()
    sender.send(100, 1.0)
    assert sender.meter.speed is None


def test_sends_that_share_the_link_count_together():
    sender = Sender(LinkSpeed(1000.0, 0.0))
    meter = sender.meter
    for _ in range(2):
        meter.begin(500)
    sender.now_s += 0.4
    meter.end(500)
    meter.learn()
    assert meter.speed.bytes_per_s == 1000.0
    sender.now_s += 0.1
    meter.end(500)
    meter.learn()
    assert meter.speed.bytes_per_s == 1250.0  # 1000 bytes in half a second, a quarter of the way from 1000 to 2000


def test_a_link_that_is_never_idle_is_measured_all_the_same():
    sender = Sender(LinkSpeed(1000.0, 0.0))
    meter = sender.meter
    meter.begin(200)
    for _ in range(40):
        meter.begin(200)
        sender.now_s += 0.1
        meter.end(200)
        meter.learn()
    assert meter.speed.bytes_per_s == pytest.approx(2000.0, rel=0.15)


def test_patience_grows_with_what_is_on_the_wire():
    sender = Sender(LinkSpeed(1000.0, 0.0))
    assert sender.meter.patience_s() == STALL_S
    sender.meter.begin(500)
    assert sender.meter.patience_s(500) == STALL_S + SHARE
    assert Sender().meter.patience_s(10**6) > STALL_S


def test_a_link_that_was_not_measured_is_trusted_to_do_again_what_it_did():
    sender = Sender()
    sender.send(2**20, 0.001)
    assert sender.meter.patience_s(2**28) == Sender().meter.patience_s(2**28), "that may lie in buffers"
    sender.send(2**24, 0.1)
    assert sender.meter.patience_s(2**28) == pytest.approx(STALL_S + SHARE * 1.6)
    sender.send(2**24, 1.0)
    assert sender.meter.patience_s(2**28) == pytest.approx(STALL_S + SHARE * 1.6)
