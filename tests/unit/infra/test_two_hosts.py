import ipaddress
import json
import random

import pytest

from infra import two_hosts
from infra.two_hosts import ADDRESSES, Host, token_bucket, why_unavailable


@pytest.mark.parametrize(
    ("bits_per_s", "rate", "burst"), [(20e6, "20000000bit", "16384"), (1e9, "1000000000bit", "125000")]
)
def test_a_bucket_holds_a_millisecond_and_some_packets_at_the_least(bits_per_s, rate, burst):
    assert token_bucket(bits_per_s) == ("tbf", "rate", rate, "burst", burst, "latency", "20000us")


@pytest.mark.parametrize("bits_per_s", [0.0, -1.0, float("nan")])
def test_a_link_that_carries_nothing_is_refused(bits_per_s):
    with pytest.raises(ValueError):
        token_bucket(bits_per_s)


def test_a_command_in_a_host_runs_in_its_namespace():
    host = Host(namespace="n", address="10.0.0.1", way_address="10.0.1.1")
    assert host.command("sleep", "1") == ("ip", "netns", "exec", "n", "sleep", "1")


def test_what_a_machine_lacks_is_named(monkeypatch):
    monkeypatch.setattr(two_hosts.os, "geteuid", lambda: 1000)
    assert why_unavailable() == "two hosts in one machine need root"
    monkeypatch.setattr(two_hosts.os, "geteuid", lambda: 0)
    monkeypatch.setattr(two_hosts.shutil, "which", lambda name: None if name == "tc" else name)
    assert "need tc (apt-get install iproute2)" in why_unavailable()


class FirstDraws:
    """Draws 0, then 1, ..."""

    def __init__(self):
        self._next = 0

    def randrange(self, _):
        self._next += 1
        return self._next - 1


def test_addresses_that_the_machine_has_are_not_given_again(monkeypatch):
    taken = [{"addr_info": [{"local": str(ADDRESSES[5])}, {"local": "10.0.0.1"}]}, {"addr_info": []}]
    monkeypatch.setattr(two_hosts, "_run", lambda *_: json.dumps(taken))
    assert two_hosts._free_block(FirstDraws()) == ipaddress.IPv4Network((int(ADDRESSES[8]), 29))
    assert two_hosts._free_block(random.Random(1)).subnet_of(ADDRESSES)
