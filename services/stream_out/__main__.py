"""Wire an edge and run it: `python -m services.stream_out`; `... new-key --tenant acme` makes an API key."""

import asyncio
import ipaddress
import secrets
import uuid
from typing import Annotated

import typer

from services.stream_out.app import Api, not_found_route
from services.stream_out.metrics import EdgeMetrics
from services.stream_out.requests import Requests
from services.stream_out.service import StreamOut
from services.stream_out.settings import Settings
from services.stream_out.tenants import KEY_PREFIX, Tenants, key_hash
from shared.bus.kafka import KafkaBus
from shared.bus.metrics import BusMetrics
from shared.errors import StartupError
from shared.observe import log
from shared.observe.metrics import process_registry
from shared.request import Incarnation
from shared.runtime.run import health_routes, run, serve_http, settle_memory, unix_clock_s
from shared.state.redis import redis_state
from shared.text.tokeniser import Tokeniser
from shared.wire.to_ingest import TENANT_PATTERN

SERVICE = "stream_out"


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Run an edge on the real log and store until `stop` is set."""
    tenants = read_tenants(settings)
    registry = process_registry()
    incarnation = Incarnation(f"edge-{uuid.uuid4().hex}")
    logger = log.logger(SERVICE)
    bus = KafkaBus(settings.kafka, client_id=incarnation, access=settings.kafka_access())
    await bus.check_access()
    registry.register(BusMetrics(bus))
    async with redis_state(settings.redis, settings.redis_access()) as state:
        await state.check_access()
        registry.register(state.unreadable)
        edge = StreamOut(
            bus,
            state,
            Tokeniser.load(settings.model),
            settings=settings,
            incarnation=incarnation,
            clock_s=unix_clock_s,
            logger=logger,
            metrics=EdgeMetrics(registry),
            tenants=tenants,
        )
        requests = Requests(edge, draw_name=lambda: uuid.uuid4().hex)
        routes = [
            *health_routes(registry, edge.ready, edge.health),
            *Api(edge, requests).routes(),
            not_found_route(edge),
        ]
        settle_memory()
        async with (
            edge.running(),
            serve_http(
                routes, host=settings.http_host, port=settings.http_port, certificate=settings.certificate
            ) as port,
        ):
            logger.info("serving", host=settings.http_host, port=port)
            await stop.wait()
            await edge.admission.drain(settings.drain_s)


def read_tenants(settings: Settings) -> Tenants | None:
    """Who may call. Raises StartupError, also where nobody would need a key though strangers could come."""
    if settings.tenants is not None:
        return Tenants(settings.tenants)
    if not (settings.allow_anonymous or _is_loopback(settings.http_host)):
        raise StartupError(
            f"BATON_HTTP_HOST {settings.http_host} can be reached by others, and nobody needs a key: name a file of "
            "tenants in BATON_TENANTS, or set BATON_ALLOW_ANONYMOUS=true where strangers are kept out otherwise"
        )
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


app = typer.Typer(add_completion=False)


@app.callback(invoke_without_command=True)
def serve_for_ever(context: typer.Context) -> None:
    """Run an edge, by the environment's BATON_* settings."""
    if context.invoked_subcommand is None:
        main()


@app.command()
def new_key(tenant: Annotated[str, typer.Option(help="Whose key it is.")]) -> None:
    """Make an API key. It is shown here only; BATON_TENANTS names the file for its hash."""
    if not TENANT_PATTERN.fullmatch(tenant):
        raise typer.BadParameter(f"must match {TENANT_PATTERN.pattern}", param_hint="--tenant")
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    typer.echo(f"key of tenant {tenant}, for its client: {key}")
    typer.echo(f"its hash, for the file of tenants:      {key_hash(key)}")


def main() -> None:
    run(SERVICE, Settings.read, serve)


if __name__ == "__main__":
    app()
