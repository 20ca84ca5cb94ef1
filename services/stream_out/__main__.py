"""Wire an edge and run it: `python -m services.stream_out`."""

import asyncio
import uuid

from services.stream_out.app import Api, not_found_route
from services.stream_out.metrics import EdgeMetrics
from services.stream_out.requests import Requests
from services.stream_out.service import StreamOut
from services.stream_out.settings import Settings
from shared.bus.kafka import KafkaBus
from shared.bus.metrics import BusMetrics
from shared.observe import log
from shared.observe.metrics import process_registry
from shared.request import Incarnation
from shared.runtime.run import health_routes, run, serve_http, settle_memory, unix_clock_s
from shared.state.redis import redis_state
from shared.text.tokeniser import Tokeniser

SERVICE = "stream_out"


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Run an edge on the real log and store until `stop` is set."""
    registry = process_registry()
    incarnation = Incarnation(f"edge-{uuid.uuid4().hex}")
    logger = log.logger(SERVICE)
    bus = KafkaBus(settings.kafka, client_id=incarnation, access=settings.kafka_access())
    await bus.check_access()
    registry.register(BusMetrics(bus))
    async with redis_state(settings.redis, settings.redis_access()) as state:
        await state.check_access()
        edge = StreamOut(
            bus,
            state,
            Tokeniser.load(settings.model),
            settings=settings,
            incarnation=incarnation,
            clock_s=unix_clock_s,
            logger=logger,
            metrics=EdgeMetrics(registry),
        )
        requests = Requests(edge, draw_name=lambda: uuid.uuid4().hex)
        routes = [*health_routes(registry, edge.ready), *Api(edge, requests).routes(), not_found_route(edge)]
        settle_memory()
        async with (
            edge.running(),
            serve_http(
                routes, host=settings.http_host, port=settings.http_port, certificate=settings.certificate
            ) as port,
        ):
            logger.info("serving", host=settings.http_host, port=port)
            await stop.wait()


def main() -> None:
    run(SERVICE, Settings.read, serve)


if __name__ == "__main__":
    main()
