import random
import socket

from infra.local.ports import PORTS, PortPicker, is_free


def test_a_taken_default_gives_another_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        assert not is_free(taken)
        assert PortPicker(random.Random(1)).pick(taken) in PORTS


def test_no_port_is_given_twice():
    picker = PortPicker(random.Random(1))
    first = picker.pick()
    assert picker.pick(first) != first
    assert PortPicker(random.Random(2)).pick(first) == first
