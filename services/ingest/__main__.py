"""Wire ingest and run it: `python -m services.ingest`."""

import asyncio
import uuid

from services.ingest.admission import Admission, ModelFacts
from services.ingest.cache_salt import CacheSalt
from services.ingest.service import IngestService
from services.ingest.settings import IngestProcessSettings
from shared.bus.kafka import KafkaBus
from shared.bus.metrics import BusMetrics
from shared.observe import log
from shared.observe.metrics import IngestMetrics, process_registry
from shared.request import Incarnation, PlacementId
from shared.runtime.run import health_routes, run, serve_http, settle_memory, unix_clock_s
from shared.state.redis import redis_state
from shared.text.tokeniser import Tokeniser


async def serve(settings: IngestProcessSettings, stop: asyncio.Event) -> None:
    """Run ingest on the real log and store until `stop` is set."""
    registry = process_registry()
    incarnation = Incarnation(f"ingest-{uuid.uuid4().hex}")
    logger = log.logger("ingest")
    bus = KafkaBus(settings.kafka, client_id=incarnation, access=settings.kafka_access())
    await bus.check_access()
    registry.register(BusMetrics(bus))
    async with redis_state(settings.redis, settings.redis_access()) as state:
        await state.check_access()
        service = IngestService(
            bus=bus,
            state=state,
            admission=Admission(
                Tokeniser.load(settings.model),
                ModelFacts.load(settings.model, settings.served_model),
                CacheSalt.read(settings.cache_salt_file),
            ),
            incarnation=incarnation,
            default_deadline_s=settings.default_deadline_s,
            wire_loss=settings.wire_loss,
            metrics=IngestMetrics(registry),
            log=logger,
            clock_s=unix_clock_s,
            new_placement_id=lambda: PlacementId(uuid.uuid4().hex),
        )
        routes = health_routes(registry, service.ready)
        settle_memory()
        async with serve_http(routes, host=settings.http_host, port=settings.http_port):
            await service.run(stop)


def main() -> None:
    run("ingest", IngestProcessSettings.read, serve)


if __name__ == "__main__":
    main()
