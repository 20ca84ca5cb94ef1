"""Free TCP ports on the loopback interface."""

import random
import socket
from collections.abc import Iterator

# Below the range from which the kernel takes ports for outgoing connections, so that none of these can slip in between.
PORTS = range(20_000, 32_000)


class PortPicker:
    """Gives out ports that nobody listens on, each one once."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._given: set[int] = set()

    def pick(self, default: int | None = None) -> int:
        """`default` where it is free, else any free port."""
        for port in self._candidates(default):
            if port not in self._given and is_free(port):
                self._given.add(port)
                return port
        raise OSError(f"no free port between {PORTS.start} and {PORTS.stop - 1}")

    def _candidates(self, default: int | None) -> Iterator[int]:
        if default is not None:
            yield default
        yield from self._rng.sample(PORTS, 1000)


def is_free(port: int) -> bool:
    """Whether a server could listen on `port` of 127.0.0.1 now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a port in TIME_WAIT is free
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return False
    return True
