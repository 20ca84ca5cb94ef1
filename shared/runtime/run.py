"""A process's frame: signals, the health and metrics port, ordered start and stop."""

import asyncio
import gc
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

import uvicorn
import uvloop
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from shared.errors import BatonError
from shared.observe import log
from shared.runtime.access import ServerCertificate
from shared.runtime.http_limits import BoundedHttp
from shared.runtime.settings import ServiceSettings

SHUTDOWN_TIMEOUT_S = 5
"""HTTP exchanges in progress at the stop get this long."""

KEEP_ALIVE_S = 75
"""A connection without an exchange is kept for so long: longer than clients (5 s) and proxies (60 s) use one again. A
request that meets the end of its connection fails, and one that is not keyed must not be sent again."""

YOUNGER_FOR_FULL = 1000
"""Collections of the second generation before a full one; Python's own 10 are reached within seconds under load."""

S = TypeVar("S", bound=ServiceSettings)

Readiness = Callable[[], Awaitable[dict[str, bool]]]
"""Tells of each thing the service needs whether it is there now."""

Health = Callable[[], Mapping[str, object]]
"""What a service says of itself beside that it lives; a `status` of "degraded" means that it serves, but not well."""


def run(service: str, read_settings: Callable[[], S], main: Callable[[S, asyncio.Event], Awaitable[None]]) -> None:
    """Read the settings, run `main` to its end and exit with its outcome.

    `main` gets an event that the first SIGTERM or SIGINT sets (drain and leave); a second one cancels it.
    A BatonError or OSError ends the process with status 1 and one line; any other exception with its traceback.
    """
    log.configure("info")
    logger = log.logger(service)
    try:
        settings = read_settings()
        log.configure(settings.log_level)
        _allow_many_files()
        uvloop.run(_run_until_stopped(lambda stop: main(settings, stop)))
    except (BatonError, OSError) as error:
        logger.error("stopped", error=str(error), kind=type(error).__name__)  # noqa: TRY400 - expected: one line is all
        sys.exit(1)
    except BaseExceptionGroup as group:
        expected, unexpected = group.split((BatonError, OSError))
        if expected is None or unexpected is not None:
            raise
        errors = [str(error) for error in _leaves(expected)]
        logger.error("stopped", errors=errors)  # noqa: TRY400 - as above
        sys.exit(1)


def _allow_many_files() -> None:
    """As many as this process may allow itself: each client is a file, and 1024 is a usual limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _leaves(group: BaseExceptionGroup[BatonError | OSError]) -> list[BatonError | OSError]:
    leaves: list[BatonError | OSError] = []
    for error in group.exceptions:
        leaves.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return leaves


async def _run_until_stopped(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(main(stop))

    def on_signal() -> None:
        if stop.is_set():
            task.cancel()
        stop.set()

    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, on_signal)
    try:
        await task
    except asyncio.CancelledError:
        if not stop.is_set():
            raise


def health_routes(registry: CollectorRegistry, readiness: Readiness, report: Health = dict) -> list[BaseRoute]:
    """`/health` (the loop turns, and what `report` says), `/ready` (all that is needed is there; 503 names what is
    not), `/metrics`."""

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok", "pid": os.getpid(), **report()})

    async def ready(_: Request) -> Response:
        parts = await readiness()
        return JSONResponse({"ready": all(parts.values()), **parts}, status_code=200 if all(parts.values()) else 503)

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return [Route("/health", health), Route("/ready", ready), Route("/metrics", metrics)]


@asynccontextmanager
async def serve_http(
    routes: Sequence[BaseRoute], *, host: str, port: int, certificate: ServerCertificate | None = None
) -> AsyncGenerator[int]:
    """Serve `routes` while the context is open; gives the port (a free one for 0). With a certificate over TLS alone.

    Raises OSError if the port is taken, StartupError if the certificate is not as it should be.
    """
    context = None if certificate is None else certificate.context()
    listener = socket.create_server((host, port))
    # asyncio sets this only on sockets that name their protocol; without it each small write waits 40 ms for an ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(
        Starlette(routes=list(routes)),
        http=BoundedHttp,
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
        ssl_context_factory=None if context is None else lambda _config, _default: context,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    except asyncio.CancelledError:
        server.force_exit = True  # told a second time: exchanges in progress are not waited for
        raise
    finally:
        server.should_exit = True
        await task


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: the service decides when to stop."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


def settle_memory() -> None:
    """Call when all that lives as long as the process is there: the garbage collector never looks at it again.

    A full collection over a model's modules and a tokeniser's vocabulary takes tens of milliseconds, in the middle of
    whatever runs then. So does one over ten thousand requests that wait, and as they come and go Python would begin
    one every few seconds: cycles that outlived two younger collections wait longer.
    """
    gc.collect()
    gc.freeze()
    youngest, younger, _ = gc.get_threshold()
    gc.set_threshold(youngest, younger, YOUNGER_FOR_FULL)


def unix_clock_s() -> float:
    """The host's clock in unix seconds."""
    return time.time()
