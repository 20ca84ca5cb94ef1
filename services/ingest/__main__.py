"""Wire ingest and run it: `python -m services.ingest`; `... dead-letter list|show|replay` for its letters."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import typer

from services.ingest.admission import Admission, ModelFacts
from services.ingest.cache_salt import CacheSalt
from services.ingest.dead_letter import DeadLetter, find, read_letters, replay
from services.ingest.service import IngestService
from services.ingest.settings import IngestProcessSettings, ToolSettings
from shared.bus.kafka import KafkaBus
from shared.bus.metrics import BusMetrics
from shared.bus.port import Bus
from shared.errors import BatonError
from shared.observe import log
from shared.observe.metrics import IngestMetrics, process_registry
from shared.request import Incarnation, PlacementId, RequestId
from shared.runtime.run import health_routes, run, serve_http, settle_memory, unix_clock_s
from shared.state.redis import redis_state
from shared.text.tokeniser import Tokeniser
from shared.wire.topics import MAX_DEADLINE_S


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
        registry.register(state.unreadable)
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
            rules=settings.rules,
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


T = TypeVar("T")

app = typer.Typer(add_completion=False)
letters = typer.Typer(add_completion=False, no_args_is_help=True, help="Jobs that nobody could serve.")
app.add_typer(letters, name="dead-letter")


@app.callback(invoke_without_command=True)
def serve_for_ever(context: typer.Context) -> None:
    """Run ingest, by the environment's BATON_* settings."""
    if context.invoked_subcommand is None:
        main()


@letters.command("list")
def list_letters() -> None:
    """One line for each letter, the oldest first."""
    for letter in _outcome(read_letters):
        typer.echo(letter.summary)


@letters.command("show")
def show_letter(
    request_id: str, *, body: Annotated[bool, typer.Option(help="Show the job itself, prompt and all.")] = False
) -> None:
    """What is known of a request's end."""

    async def look(bus: Bus) -> DeadLetter:
        return find(await read_letters(bus), RequestId(request_id))

    letter = _outcome(look)
    typer.echo(letter.details)
    if body:
        typer.echo(letter.body)


@letters.command("replay")
def replay_letter(
    request_id: str,
    new_id: Annotated[str, typer.Option(help="Id of the new request; drawn if not given.")] = "",
    deadline_s: Annotated[
        float, typer.Option(min=1, max=MAX_DEADLINE_S, help="Seconds until its answer must be there.")
    ] = 600.0,
) -> None:
    """Hand the job in again as another request, and print its id."""
    again = RequestId(new_id or f"replay-{uuid.uuid4().hex}")

    async def hand_in(bus: Bus) -> None:
        letter = find(await read_letters(bus), RequestId(request_id))
        await replay(bus, letter, new_id=again, deadline_s=unix_clock_s() + deadline_s)

    _outcome(hand_in)
    typer.echo(again)


def _outcome(work: Callable[[Bus], Awaitable[T]]) -> T:
    async def outcome() -> T:
        settings = ToolSettings.read()
        return await work(KafkaBus(settings.kafka, client_id="dead-letter", access=settings.kafka_access()))

    try:
        return asyncio.run(outcome())
    except BatonError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


def main() -> None:
    run("ingest", IngestProcessSettings.read, serve)


if __name__ == "__main__":
    app()
