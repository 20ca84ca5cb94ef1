"""`python -m loadgen replay`: replays a request trace against a server and reports what its users would have felt.

`simulate` and `plan` do so in virtual time, without a server (`loadgen.simulator`).
"""

import asyncio
import os
import platform
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, cast

import httpx
import typer
from rich.console import Console

from loadgen.arrivals import Arrivals
from loadgen.client import Clock, HttpTransport, Transport, first_model, open_http
from loadgen.jobs import CHAT_COMPLETIONS, COMPLETIONS, JobMaker, RequestShape
from loadgen.kafka_client import KafkaTransport, open_kafka
from loadgen.measure import Results, Slo, measure
from loadgen.page.render import render_page
from loadgen.progress import shown
from loadgen.prompts import IdPrompts, PromptMaker, TextPrompts, load_tokenizer, vocabulary_of, vocabulary_of_size
from loadgen.replay import Progress, Replayed, replay
from loadgen.report import Run, print_report, to_json, to_json_lines
from loadgen.saved import parse_saved, read_saved
from loadgen.schedule import ScheduleSettings, draw_schedule
from loadgen.settings import parse_goodput, parse_pairs, parse_rows, parse_window
from loadgen.simulator.commands import plan_command, simulate_command
from loadgen.traces import read_trace
from shared.errors import StartupError
from shared.runtime.settings import KafkaSettings

EXIT_OK = 0
EXIT_SOME_FAILED = 1
EXIT_CANNOT_START = 2
EXIT_INTERRUPTED = 130

SWITCH_INTERVAL_S = 0.0005
"""How long the thread that makes prompts may keep the one that takes the time of answers waiting."""

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


class Backend(StrEnum):
    OPENAI = "openai"
    KAFKA = "kafka"


class PromptAs(StrEnum):
    IDS = "ids"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """Everything a run depends on."""

    trace: Path
    schedule: ScheduleSettings
    backend: Backend
    base_url: str
    bootstrap_servers: str
    endpoint: Literal["/v1/completions", "/v1/chat/completions"]
    model: str | None
    prompt_as: PromptAs
    tokenizer: Path | None
    vocab_size: int | None
    ignore_eos: bool
    temperature: float
    timeout_s: float
    headers: Mapping[str, str]
    slo: Slo
    metadata: Mapping[str, str]
    save_schedule: Path | None
    save_requests: Path | None
    save_result: Path | None
    save_detailed: bool
    html: Path | None


@app.callback()
def main() -> None:
    """Load generator for OpenAI-compatible servers and for Baton's job topic, and a simulator of Baton's placement."""


app.command("simulate")(simulate_command)
app.command("plan")(plan_command)


@app.command("replay")
def replay_command(
    trace: Annotated[Path, typer.Option("--trace", "--dataset-path", help="Mooncake .jsonl or Azure .csv")],
    backend: Annotated[Backend, typer.Option(help="HTTP, or jobs straight onto Kafka")] = Backend.OPENAI,
    base_url: Annotated[str, typer.Option(help="of the OpenAI server, without /v1")] = "http://127.0.0.1:8000",
    bootstrap_servers: Annotated[str, typer.Option(help="of Kafka")] = "127.0.0.1:9092",
    endpoint: Annotated[str, typer.Option(help=f"{COMPLETIONS} or {CHAT_COMPLETIONS}")] = COMPLETIONS,
    model: Annotated[str | None, typer.Option(help="default: the first that the server lists")] = None,
    rows: Annotated[str | None, typer.Option(metavar="A:B", help="slice of the trace's rows")] = None,
    window: Annotated[str | None, typer.Option(metavar="A:B", help="slice of the trace's own seconds")] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="at most so many rows")] = None,
    speed: Annotated[float, typer.Option(min=0.0001, help="the trace's clock runs so many times faster")] = 1.0,
    jitter_ticks: Annotated[
        bool, typer.Option("--jitter-ticks", help="spread requests that a coarse clock put on one instant")
    ] = False,
    arrivals: Annotated[Arrivals | None, typer.Option(help="default: trace; with --request-rate poisson")] = None,
    request_rate: Annotated[float | None, typer.Option(min=0.0001, help="requests a second")] = None,
    burstiness: Annotated[float, typer.Option(min=0.0001, help="gamma shape; below 1 in bursts")] = 1.0,
    seed: Annotated[int, typer.Option(help="of times and prompts")] = 0,
    length_scale: Annotated[float, typer.Option(min=0.00001, help="factor on all lengths")] = 1.0,
    max_input: Annotated[int | None, typer.Option(min=1, help="cut longer prompts to this")] = None,
    max_output: Annotated[int | None, typer.Option(min=1, help="cut longer answers to this")] = None,
    prompt_as: Annotated[PromptAs, typer.Option(help="what prompts are sent as")] = PromptAs.IDS,
    tokenizer: Annotated[Path | None, typer.Option(help="model folder with tokenizer.json")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="instead of --tokenizer, for ids")] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos/--no-ignore-eos", help="answers of the trace's length exactly")
    ] = True,
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    timeout: Annotated[float, typer.Option(min=0.001, help="seconds a whole answer may take from its send")] = 600.0,
    header: Annotated[list[str] | None, typer.Option(metavar="K=V", help="HTTP or Kafka header")] = None,
    goodput: Annotated[list[str] | None, typer.Option(help="limits in ms, as 'ttft:500 tpot:50 e2el:5000'")] = None,
    metadata: Annotated[list[str] | None, typer.Option(metavar="K=V", help="kept in the result")] = None,
    save_result: Annotated[bool, typer.Option("--save-result", help="write the JSON result")] = False,
    save_detailed: Annotated[bool, typer.Option("--save-detailed", help="with lists by request")] = False,
    result_dir: Annotated[Path, typer.Option()] = Path(),
    result_filename: Annotated[str | None, typer.Option()] = None,
    save_requests: Annotated[Path | None, typer.Option(help="one JSON line a request")] = None,
    save_schedule: Annotated[Path | None, typer.Option(help="what is sent when, as JSON lines")] = None,
    html: Annotated[Path | None, typer.Option(help="write the report as one HTML page")] = None,
) -> None:
    """Replay a trace, open loop: requests leave at their times, whatever became of those before.

    Exit status: 0 all rows completed, 1 some failed, 2 the run could not start, 130 interrupted.
    """
    out, err = Console(), Console(stderr=True)
    try:
        if endpoint not in (COMPLETIONS, CHAT_COMPLETIONS):
            raise StartupError(f"--endpoint {endpoint}: it is {COMPLETIONS} or {CHAT_COMPLETIONS}")
        if save_detailed and not (save_result or result_filename):
            raise StartupError("--save-detailed goes with --save-result")
        name = result_filename or f"{backend}-replay-{_date()}.json"
        settings = ReplaySettings(
            trace=trace,
            schedule=ScheduleSettings(
                seed=seed,
                rows=parse_rows(rows),
                window_s=parse_window(window),
                num_prompts=num_prompts,
                arrivals=arrivals or (Arrivals.TRACE if request_rate is None else Arrivals.POISSON),
                speed=speed,
                jitter_ticks=jitter_ticks,
                request_rate_per_s=request_rate,
                burstiness=burstiness,
                length_scale=length_scale,
                max_input_tokens=max_input,
                max_output_tokens=max_output,
            ),
            backend=backend,
            base_url=base_url,
            bootstrap_servers=bootstrap_servers,
            endpoint=cast('Literal["/v1/completions", "/v1/chat/completions"]', endpoint),
            model=model,
            prompt_as=prompt_as,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            ignore_eos=ignore_eos,
            temperature=temperature,
            timeout_s=timeout,
            headers=parse_pairs("--header", header or ()),
            slo=parse_goodput(goodput or ()),
            metadata=parse_pairs("--metadata", metadata or ()),
            save_schedule=save_schedule,
            save_requests=save_requests,
            save_result=result_dir / name if save_result or result_filename else None,
            save_detailed=save_detailed,
            html=html,
        )
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        status = asyncio.run(_replay(settings, out, err))
    except StartupError as error:
        err.print(f"loadgen: {error}", markup=False, highlight=False, soft_wrap=True)
        status = EXIT_CANNOT_START
    raise typer.Exit(status)


@app.command("report")
def report_command(
    result: Annotated[Path, typer.Argument(help="JSON of --save-result --save-detailed")],
    html: Annotated[Path, typer.Option(help="where to write the page")],
) -> None:
    """Make the HTML page of a run from its saved result."""
    try:
        _write(html, render_page(read_saved(result)))
    except StartupError as error:
        Console(stderr=True).print(f"loadgen: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_CANNOT_START) from error


async def _replay(settings: ReplaySettings, out: Console, err: Console) -> int:
    clock = Clock(asyncio.get_running_loop().time, time.time)
    schedule = draw_schedule(read_trace(settings.trace), settings.schedule)
    prompts = _prompts(settings)
    date, run_id = _date(), secrets.token_hex(6)
    progress = Progress(scheduled=len(schedule.rows))
    async with _transport(settings, clock) as (transport, model):
        shape = RequestShape(
            endpoint=settings.endpoint,
            model=model,
            ignore_eos=settings.ignore_eos,
            temperature=settings.temperature,
            stream=settings.backend is Backend.OPENAI,
        )
        jobs = JobMaker(shape, prompts, run_id, settings.timeout_s)
        head = jobs.schedule_head()
        if settings.save_schedule is not None:
            _write(settings.save_schedule, schedule.to_bytes(head))
        async with shown(progress, err, clock):
            with _stop_on_signal() as stop, ThreadPoolExecutor(1, "prompts") as maker_pool:
                replayed = await replay(
                    schedule.rows,
                    jobs.make,
                    transport,
                    maker_pool=maker_pool,
                    exact_length=settings.ignore_eos,
                    clock=clock,
                    stop=stop,
                    progress=progress,
                )
        repeated = transport.repeated_results if isinstance(transport, KafkaTransport) else 0
    results = measure(replayed.records, settings.slo, replayed.duration_s, replayed.started_unix_s)
    run = Run(
        trace=settings.trace.name,
        backend=settings.backend,
        server=_server(settings),
        endpoint=settings.endpoint,
        client=_client(),
        model=model,
        prompts=prompts.fingerprint,
        date=date,
        started_unix_s=replayed.started_unix_s,
        run_id=run_id,
        settings=settings.schedule,
        schedule=schedule,
        schedule_sha256=schedule.digest(head),
        slo=settings.slo,
        metadata=settings.metadata,
        interrupted=replayed.interrupted,
        repeated_results=repeated,
    )
    _save(settings, run, results, replayed)
    print_report(out, run, results)
    if replayed.interrupted:
        return EXIT_INTERRUPTED
    return EXIT_SOME_FAILED if results.failed else EXIT_OK


def _prompts(settings: ReplaySettings) -> PromptMaker:
    seed = settings.schedule.seed
    if settings.prompt_as is PromptAs.TEXT:
        if settings.tokenizer is None:
            raise StartupError("--prompt-as text needs --tokenizer, a model folder, to count with")
        return TextPrompts(seed, load_tokenizer(settings.tokenizer))
    if settings.endpoint == CHAT_COMPLETIONS:
        raise StartupError(f"{CHAT_COMPLETIONS} takes no token ids: add --prompt-as text and --tokenizer")
    if settings.tokenizer is not None:
        return IdPrompts(seed, vocabulary_of(load_tokenizer(settings.tokenizer)))
    if settings.vocab_size is not None:
        return IdPrompts(seed, vocabulary_of_size(settings.vocab_size))
    raise StartupError("prompts of token ids need --tokenizer (a model folder) or --vocab-size")


@asynccontextmanager
async def _transport(settings: ReplaySettings, clock: Clock) -> AsyncIterator[tuple[Transport, str]]:
    if settings.backend is Backend.KAFKA:
        if settings.model is None:
            raise StartupError("--backend kafka needs --model: a topic lists none")
        access = KafkaSettings.read().kafka_access()
        async with open_kafka(settings.bootstrap_servers, settings.headers, clock, access) as transport:
            yield transport, settings.model
    else:
        async with open_http(settings.base_url) as http:
            model = settings.model or await first_model(http)
            yield HttpTransport(http, settings.endpoint, settings.headers, clock), model


@contextmanager
def _stop_on_signal() -> Iterator[asyncio.Event]:
    """The event is set by Ctrl-C or SIGTERM; a second signal has its usual, immediate effect."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def on_signal() -> None:
        stop.set()
        for number in signals:
            loop.remove_signal_handler(number)

    for number in signals:
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _save(settings: ReplaySettings, run: Run, results: Results, replayed: Replayed) -> None:
    if settings.save_result is not None:
        _write(settings.save_result, to_json(run, results, replayed.records, detailed=settings.save_detailed))
    if settings.save_requests is not None:
        _write(settings.save_requests, to_json_lines(run, replayed.records))
    if settings.html is not None:
        # From the JSON, as `loadgen report` does: a page made later is the same.
        _write(settings.html, render_page(parse_saved(to_json(run, results, replayed.records, detailed=True))))


def _server(settings: ReplaySettings) -> str:
    if settings.backend is Backend.KAFKA:
        return settings.bootstrap_servers
    return str(httpx.URL(settings.base_url).copy_with(userinfo=b"", query=None))


def _client() -> str:
    return f"{platform.node()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise StartupError(f"cannot write {path}: {error}") from error


def _date() -> str:
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S")


if __name__ == "__main__":
    app()
