"""`python -m infra.demo` (`make demo`): the whole of Baton once, on this machine's CPU, in about a minute.

Starts Kafka, Redis, 1 ingest, 1 prefill worker, 2 decode workers and 1 edge with SmolLM2-135M-Instruct; streams a chat
answer through the official `openai` client; replays a slice of the Mooncake conversation trace; shows what the workers
did and that all their KV pages are free again; stops everything. Exit status 0 means that all of it went well, 1 that
something did not, 128 + N that signal N stopped it.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families
from rich import box
from rich.console import Console
from rich.table import Table

from infra.local.composition import HAND_OVER_ALWAYS, Composition
from infra.local.kafka import kafka_jars
from infra.local.model import MODEL_NAME, smollm2_folder
from infra.local.process import kill_group
from infra.local.stack import Stack, local_stack
from infra.local.state_file import StateFile
from shared.errors import StartupError
from shared.observe.metrics import LocalPrefill
from shared.state.keys import BEAT_INTERVAL_S

RUN_DIR = Path(".run/demo")
REPORT = RUN_DIR / "report.html"
COUNTS = {"ingest": 1, "prefill": 1, "decode": 2, "edge": 1}
NUM_PAGES = 128
CHUNK_TOKENS = 128  # what one core prefills in a quarter of a second; other requests wait for the end of a step
DRAIN_S = 2  # after Ctrl-C nobody waits for what still runs

QUESTION = "What is the capital of France, and what is it known for?"
ANSWER_TOKENS = 80

TRACE = "loadgen/data/mooncake_conversation_60.jsonl"
# At an eighth of its lengths and 0.4 of its speed the slice keeps a prefill worker on one core busy and not hopelessly
# late. The trace's unit of sharing, 512 tokens, becomes 64: one page, so that what prompts share can be reused.
REPLAY_ARGUMENTS = (
    *("--trace", TRACE, "--rows", "26:50", "--speed", "0.4", "--jitter-ticks"),
    *("--length-scale", "0.125", "--max-input", "384", "--max-output", "32"),
)

REPORT_COLUMNS = 110
FREE_WITHIN_S = 15.0
REPLAY_STOPS_WITHIN_S = 10.0
REQUEST_TIMEOUT_S = 120.0

console = Console(highlight=False, width=None if sys.stdout.isatty() else REPORT_COLUMNS)


@dataclass(frozen=True, slots=True)
class WorkerReading:
    """What a worker's /metrics said: tokens and bytes since its start, pages now."""

    name: str
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    pulled_bytes: int
    local_prefills: int
    pages: int
    free_pages: int
    held_requests: int

    @property
    def is_empty(self) -> bool:
        """Whether no request has pages here."""
        return self.free_pages == self.pages > 0 and self.held_requests == 0


async def demo(model: Path) -> list[str]:
    """Runs all parts; what did not go well, in words."""
    composition = Composition(
        counts=COUNTS,
        model=str(model),
        model_name=MODEL_NAME,
        num_pages=NUM_PAGES,
        kafka_port=None,
        redis_port=None,
        max_restarts=0,
        env={"BATON_MAX_BATCH_TOKENS": str(CHUNK_TOKENS), "BATON_DRAIN_S": str(DRAIN_S), **HAND_OVER_ALWAYS},
    )
    began_s = time.monotonic()
    _head("1. Start the stack")
    async with local_stack(composition, RUN_DIR, report=lambda line: console.print(f"  {line}", markup=False)) as stack:
        console.print(f"  ready after {time.monotonic() - began_s:.1f} s; logs are in {RUN_DIR / 'logs'}")
        (edge,) = stack.addresses("edge")
        _head("2. Ask it something, through the openai client")
        problems = await chat(edge)
        _head("3. Replay a slice of a real trace, its lengths scaled to this CPU")
        problems += await replay(edge)
        _head("4. What the workers did, and whether they hold anything still")
        problems += await look_at_workers(stack)
        problems += [f"{process.name} is {process.phase}" for process in stack.record().processes if process.restarts]
        _head("5. Stop everything")
    return problems


async def chat(edge: str) -> list[str]:
    """Streams one answer to the screen as it comes."""
    console.print(f"  [bold]{QUESTION}[/bold]\n")
    asked_s = time.monotonic()
    first_s = finish_reason = usage = None
    console.out("  ", end="")
    async with AsyncOpenAI(base_url=f"{edge}/v1", api_key="unused", timeout=REQUEST_TIMEOUT_S, max_retries=0) as client:
        stream = await client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=ANSWER_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            for choice in chunk.choices:
                if choice.delta.content:
                    first_s = first_s or time.monotonic() - asked_s
                    console.out(choice.delta.content.replace("\n", "\n  "), end="")
                finish_reason = choice.finish_reason or finish_reason
            usage = chunk.usage or usage
    took_s = time.monotonic() - asked_s
    console.print("\n")
    if first_s is None or usage is None or finish_reason not in ("stop", "length"):
        return [f"the chat answer ended with {finish_reason}"]
    console.print(
        f"  {usage.completion_tokens} tokens (end: {finish_reason}) to a prompt of {usage.prompt_tokens}: "
        f"the first after {first_s:.2f} s, all after {took_s:.2f} s"
    )
    return []


async def replay(edge: str) -> list[str]:
    """Replays the slice by the load generator, which reports to this screen."""
    arguments = ("-m", "loadgen", "replay", "--base-url", edge, *REPLAY_ARGUMENTS)
    console.print(f"  $ python {' '.join(arguments)}\n", markup=False, soft_wrap=True)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *arguments, "--tokenizer", str(smollm2_folder()), "--html", str(REPORT)),
        env=os.environ | _columns(),
        start_new_session=True,  # Ctrl-C reaches this process only, which then asks that one once
    )
    try:
        status = await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), REPLAY_STOPS_WITHIN_S)
            kill_group(process.pid)
    if status in (0, 1):  # all rows completed, or some failed: either way it has reported
        console.print(f"  the same as a page, with charts: {REPORT}")
    return [] if status == 0 else [f"the replay ended with exit status {status}"]


def _columns() -> dict[str, str]:
    return {} if sys.stdout.isatty() else {"COLUMNS": str(REPORT_COLUMNS)}


async def look_at_workers(stack: Stack) -> list[str]:
    """Prints what each worker did, once none holds a page or after a while; what is wrong with that."""
    deadline_s = time.monotonic() + FREE_WITHIN_S
    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S) as http:
        while True:
            await asyncio.sleep(2 * BEAT_INTERVAL_S)  # metrics are as of the last beat
            readings = [
                await read_worker(http, f"{service}-{index}", address)
                for service in ("prefill", "decode")
                for index, address in enumerate(stack.addresses(service))
            ]
            if all(reading.is_empty for reading in readings) or time.monotonic() > deadline_s:
                break
    console.print(_worker_table(readings))
    return worker_problems(readings)


async def read_worker(http: httpx.AsyncClient, name: str, address: str) -> WorkerReading:
    """Asks one worker for its metrics."""
    answer = await http.get(f"{address}/metrics")
    answer.raise_for_status()
    families = text_string_to_metric_families(answer.text)
    samples = {
        sample.name: int(sample.value)
        for family in families
        for sample in family.samples
        if sample.labels.get("cause", LocalPrefill.PULL_FAILED) == LocalPrefill.PULL_FAILED
    }
    return WorkerReading(
        name=name,
        prompt_tokens=samples["vllm:prompt_tokens_total"],
        cached_tokens=samples["vllm:prefix_cache_hits_total"],
        generated_tokens=samples["vllm:generation_tokens_total"],
        pulled_bytes=samples["baton_kv_pull_bytes_total"],
        local_prefills=samples["baton_local_prefills_total"],
        pages=samples["baton_kv_pages"],
        free_pages=samples["baton_kv_pages_free"],
        held_requests=samples["baton_kv_held_requests"],
    )


def worker_problems(readings: Sequence[WorkerReading]) -> list[str]:
    """What did not go as it should, in words."""
    problems = [f"{reading.name} holds pages still" for reading in readings if not reading.is_empty]
    problems += [f"{reading.name} generated nothing" for reading in readings if not reading.generated_tokens]
    problems += [
        f"{reading.name} computed {reading.local_prefills} prompts itself because their KV could not be pulled"
        for reading in readings
        if reading.local_prefills
    ]
    return problems


def _worker_table(readings: Sequence[WorkerReading]) -> Table:
    table = Table(box=box.ROUNDED)
    table.add_column("worker")
    headings = ("prompt\ntokens", "tokens in its\nprefix cache", "KV pulled\nby UCX, MiB", "tokens\ngenerated")
    for heading in (*headings, "KV pages\nfree now"):
        table.add_column(heading, justify="right")
    for reading in readings:
        table.add_row(
            reading.name,
            str(reading.prompt_tokens),
            str(reading.cached_tokens),
            f"{reading.pulled_bytes / 2**20:.0f}",
            str(reading.generated_tokens),
            f"{reading.free_pages} of {reading.pages}",
        )
    return table


def _head(text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


def _start_afresh() -> None:
    """Removes what an earlier demo left, unless it still runs."""
    record = StateFile(RUN_DIR).read()
    if record is not None and record.lives():
        raise StartupError(f"another demo runs in {RUN_DIR}")
    shutil.rmtree(RUN_DIR, ignore_errors=True)


def _fetch() -> Path:
    with console.status("fetching Kafka's jars (once)"):
        kafka_jars()
    with console.status("fetching and converting the model (once, about a minute)"):
        return smollm2_folder()


async def _until_stopped(model: Path) -> int:
    """Runs the demo; a signal ends it early, and everything is stopped all the same."""
    task = asyncio.current_task()
    assert task is not None
    asked_by: list[signal.Signals] = []

    def ask(signal_number: signal.Signals) -> None:
        asked_by.append(signal_number)
        if len(asked_by) == 1:  # while it stops, more signals change nothing: each wait has its limit
            console.print(f"\n{signal_number.name}: stopping everything")
            task.cancel()

    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(signal_number, ask, signal_number)
    try:
        problems = await demo(model)
    except asyncio.CancelledError:
        if not asked_by:
            raise
        return 128 + asked_by[0]
    for problem in problems:
        console.print(f"  [red]not well:[/red] {problem}")
    return 1 if problems else 0


def main() -> int:
    """Command line."""
    began_s = time.monotonic()
    console.print(
        "Baton demo: SmolLM2-135M-Instruct on this machine's CPU, prefill and decode in processes of their own"
    )
    try:
        model = _fetch()
        _start_afresh()
        status = asyncio.run(_until_stopped(model))
    except StartupError as error:
        console.print(f"baton: {error}", markup=False)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    outcome = {0: "all went well", 1: "[red]not all went well[/red]"}.get(status, "stopped")
    console.print(f"  {outcome}; {time.monotonic() - began_s:.0f} s in all")
    return status


if __name__ == "__main__":
    sys.exit(main())
