"""Whether the Baton process of this container can serve: exit status 0 if GET /ready answers 200, else 1.

An edge with BATON_TLS_CERT is asked over TLS; its certificate, which does not name this address, is not looked at.
Runs every few seconds in every container, hence without anything that takes long to import.
"""

import os
import socket
import sys

TIMEOUT_S = 3.0
QUESTION = b"GET /ready HTTP/1.0\r\nHost: localhost\r\n\r\n"


def is_ready(port: int, *, tls: bool = False) -> bool:
    """Whether the process that listens on `port` of this container says that it is ready."""
    try:
        with _connection(port, tls) as connection:
            connection.sendall(QUESTION)
            with connection.makefile("rb") as answer:
                return answer.readline().split()[1:2] == [b"200"]
    except OSError:
        return False


def _connection(port: int, tls: bool) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
    if not tls:
        return connection
    import ssl  # noqa: PLC0415 - not needed by most, and every few seconds

    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(connection)


if __name__ == "__main__":
    sys.exit(not is_ready(int(os.environ["BATON_HTTP_PORT"]), tls=bool(os.environ.get("BATON_TLS_CERT"))))
