import socket
import threading

import pytest

from infra.docker.healthcheck import is_ready


def serve_once(answer: bytes) -> int:
    listener = socket.create_server(("127.0.0.1", 0))

    def answer_one() -> None:
        with listener, listener.accept()[0] as connection:
            connection.recv(1024)
            connection.sendall(answer)

    threading.Thread(target=answer_one, daemon=True).start()
    return listener.getsockname()[1]


@pytest.mark.parametrize(
    ("answer", "ready"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", True),
        (b"HTTP/1.0 200\r\n\r\n", True),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", False),
        (b"HTTP/1.1 500 200 apologies\r\n\r\n", False),
        (b"", False),
    ],
)
def test_only_200_is_ready(answer: bytes, ready: bool):
    assert is_ready(serve_once(answer)) is ready


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert not is_ready(port)
