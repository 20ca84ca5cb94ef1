"""`python -m benchmarks.overload`: what becomes of a stack that is asked for three times what it can do, as JSON.

Real Kafka, Redis and services; the workers' engine is the fake one with a fixed time a step, so that the capacity is
the engines' and not this machine's. Clients stream; a refused one is gone.

1. The ramp: closed loop, more and more clients, each asks again when it has its answer. The most requests a second that
   had their whole answer within the deadline are the peak.
2. The overload: open loop, random moments, at a multiple of the peak.

What was accepted must have its whole answer within its deadline, or be refused at once with 429 or 503; goodput must
stay near the peak, and no process may grow. Exit status 1 if that is not so.
"""

import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer

from benchmarks.control_plane.machine import commit, cpu_shares, cpu_times, machine
from infra.local.composition import SERVICES, Composition, Service
from infra.local.stack import Stack, local_stack
from services.ingest.admission import ModelFacts
from shared.bus.kafka import KafkaBus
from shared.text.tokeniser import Tokeniser
from tests.fake_tokeniser import write_fake_model
from tests.faults.capture import Capture, Outcome
from tests.faults.clients import Clients, Mix, Want, draw_wants
from tests.faults.history import Rules, check
from tests.faults.topics import read_history, until_all_ended

MODEL = "fake"
COUNTS = {"ingest": 1, "prefill": 1, "decode": 2, "edge": 2}
GRACE_S = 5.0
NUM_PAGES = 256

PROMPT_TOKENS = (20, 100)
ANSWER_TOKENS = (10, 30)

RAMP = (0.5, 1.0, 1.5, 2.0)
"""Clients of each stage, of what the decode workers run at once."""

SETTLE_S = 3.0
"""The begin of a stage of the ramp is not measured."""

SAMPLE_S = 2.0
BUCKET_S = 10.0

MEMORY_SETTLES_S = 75.0
"""Requests are kept for a minute after their end: before that memory grows, as it must."""

MIN_GOODPUT = 0.9
MAX_REFUSAL_S = 1.0
MAX_GROWTH_MIB = 8.0
QUEUES = ("baton_backlog_requests", "baton_streams_open", "vllm:num_requests_running", "vllm:num_requests_waiting")
REFUSALS = (429, 503)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do.

    Attributes:
        step_s: of the engines.
        max_running: requests that a worker runs at once.
        multiple: of the peak, offered in the overload.
        deadline_s: of every request.
    """

    minutes: float
    stage_s: float
    step_s: float
    max_running: int
    multiple: float
    deadline_s: float
    seed: int


@dataclass(slots=True)
class Samples:
    """What the processes had at moments of unix time.

    Attributes:
        rss_mib: by process.
        queues: sums over all processes, by metric.
    """

    at_s: list[float] = field(default_factory=list[float])
    rss_mib: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    queues: dict[str, list[float]] = field(default_factory=dict[str, list[float]])


def is_good(capture: Capture) -> bool:
    """Whether the whole answer was there within the deadline."""
    return (
        capture.outcome is Outcome.DONE
        and capture.ended_s is not None
        and capture.ended_s <= capture.sent_s + capture.timeout_s
    )


def goodput(captures: Sequence[Capture], from_s: float, to_s: float) -> float:
    """Requests a second that came to a good end from `from_s` to `to_s`."""
    good = sum(is_good(capture) and from_s <= (capture.ended_s or 0.0) < to_s for capture in captures)
    return round(good / (to_s - from_s), 3)


def refusal_s(capture: Capture) -> float | None:
    """How long the client waited for its 429 or 503; None if it was not refused."""
    if capture.outcome not in {Outcome.REFUSED, Outcome.ERROR} or capture.status not in REFUSALS:
        return None
    assert capture.ended_s is not None
    return capture.ended_s - capture.sent_s


def fate(capture: Capture) -> str:
    """What became of a request, in a word."""
    if is_good(capture):
        return "in time"
    if capture.outcome is Outcome.DONE:
        return "late"
    if refusal_s(capture) is not None:
        return f"refused {capture.status}"
    return str(capture.outcome)


def summary(captures: Sequence[Capture], from_s: float, to_s: float, peak: float) -> dict[str, Any]:
    """The overload as the clients saw it."""
    fates = Counter(fate(capture) for capture in captures)
    refused = sorted(time_s for capture in captures if (time_s := refusal_s(capture)) is not None)
    firsts = sorted(capture.events[0].at_s - capture.sent_s for capture in captures if is_good(capture))
    num_buckets = int((to_s - from_s) // BUCKET_S)
    buckets = [goodput(captures, from_s + k * BUCKET_S, from_s + (k + 1) * BUCKET_S) for k in range(num_buckets)]
    return {
        "offered": len(captures),
        "offered_per_s": round(len(captures) / (to_s - from_s), 2),
        "fates": dict(fates),
        "num_not_refused": sum(count for name, count in fates.items() if not name.startswith("refused")),
        "refusal_s": spread(refused),
        "first_event_s": spread(firsts),
        "goodput_per_s": goodput(captures, from_s, to_s),
        "share_of_peak": round(goodput(captures, from_s, to_s) / peak, 3),
        "share_of_peak_by_10_s": [round(bucket / peak, 3) for bucket in buckets],
    }


def spread(ordered: Sequence[float]) -> dict[str, float] | None:
    """Of seconds in ascending order; None of nothing."""
    if not ordered:
        return None

    def share(part: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(part * len(ordered)))], 4)

    return {"p50": share(0.5), "p99": share(0.99), "max": round(ordered[-1], 4)}


def growth(at_s: Sequence[float], rss_mib: Sequence[float]) -> dict[str, float]:
    """How a process's memory went, `per_minute` by the straight line nearest to the samples."""
    mean_s, mean_mib = sum(at_s) / len(at_s), sum(rss_mib) / len(rss_mib)
    spread_s = sum((t - mean_s) ** 2 for t in at_s) or 1.0
    slope = sum((t - mean_s) * (m - mean_mib) for t, m in zip(at_s, rss_mib, strict=True)) / spread_s
    return {
        "first_mib": round(rss_mib[0], 1),
        "last_mib": round(rss_mib[-1], 1),
        "max_mib": round(max(rss_mib), 1),
        "mib_per_minute": round(60 * slope, 3),
    }


def memory(samples: Samples, from_s: float) -> dict[str, dict[str, float]]:
    """Of each process, from `from_s` on."""
    first = next((k for k, at_s in enumerate(samples.at_s) if at_s >= from_s), 0)
    return {name: growth(samples.at_s[first:], values[first:]) for name, values in sorted(samples.rss_mib.items())}


def told(samples: Samples) -> dict[str, Any]:
    """For the report: seconds from the first sample on, tenths of a MiB."""
    return {
        "at_s": [round(at_s - samples.at_s[0], 1) for at_s in samples.at_s],
        "rss_mib": {name: [round(mib, 1) for mib in values] for name, values in samples.rss_mib.items()},
        "queues": samples.queues,
    }


def problems(
    overload: Mapping[str, Any], grown: Mapping[str, Mapping[str, float]], findings: Sequence[str]
) -> list[str]:
    """What is not as it should be."""
    found = list(findings)
    bad = {name: n for name, n in overload["fates"].items() if name != "in time" and not name.startswith("refused")}
    if bad:
        found.append(f"neither answered in time nor refused: {bad}")
    if overload["share_of_peak"] < MIN_GOODPUT:
        found.append(f"goodput was {overload['share_of_peak']:.0%} of the peak")
    if overload["refusal_s"] is not None and overload["refusal_s"]["p99"] > MAX_REFUSAL_S:
        found.append(f"refusals took up to {overload['refusal_s']['p99']} s (p99)")
    for name, rss in grown.items():
        if name != "kafka" and rss["last_mib"] - rss["first_mib"] > MAX_GROWTH_MIB:  # a Java heap has its own limit
            found.append(f"{name} grew from {rss['first_mib']} to {rss['last_mib']} MiB")
    return found


def services() -> list[Service]:
    """The stack's, with the fake engine in its workers."""

    def command(name: str) -> tuple[str, ...]:
        return (sys.executable, "-m", "tests.faults.salted_worker", name)

    return [
        replace(service, command=command(service.name)) if service.name in ("prefill", "decode") else service
        for service in SERVICES
    ]


def mix(plan: Plan, rate_per_s: float) -> Mix:
    """Plain streams, all alike but for their lengths."""
    return Mix(
        MODEL,
        rate_per_s,
        max_tokens=ANSWER_TOKENS,
        prompt_tokens=PROMPT_TOKENS,
        timeout_s=plan.deadline_s,
        **dict.fromkeys(
            ("whole", "jobs", "keyed", "deletes", "leaves", "tight", "two_choices", "logprobs", "stops", "drawn"), 0.0
        ),
        chats=0.0,
    )


class Run:
    """Loads against one running stack."""

    def __init__(self, plan: Plan, stack: Stack) -> None:
        self._plan = plan
        self._stack = stack
        self._captures: list[Capture] = []
        self.samples = Samples()

    async def ramp(self) -> list[dict[str, Any]]:
        """Stages of a closed loop."""
        seats = self._plan.max_running * COUNTS["decode"]
        stages: list[dict[str, Any]] = []
        for share in RAMP:
            stages.append(await self._stage(round(share * seats)))
            say(f"ramp: {stages[-1]}")
        return stages

    async def _stage(self, num_clients: int) -> dict[str, Any]:
        clients = self._clients(waits_out_refusals=True)
        wants = draw_wants(mix(self._plan, 1.0), self._plan.seed, run=f"ramp{num_clients}-")
        ends_s = time.time() + SETTLE_S + self._plan.stage_s

        async def again_and_again() -> None:
            while time.time() < ends_s:
                await clients.run(next(wants))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(num_clients):
                tasks.create_task(again_and_again())
        self._captures += clients.captures
        return {
            "clients": num_clients,
            "goodput_per_s": goodput(clients.captures, ends_s - self._plan.stage_s, ends_s),
            "fates": dict(Counter(fate(capture) for capture in clients.captures)),
        }

    async def overload(self, peak: float) -> dict[str, Any]:
        """The open loop."""
        clients = self._clients(waits_out_refusals=False)
        seconds = 60 * self._plan.minutes
        began_s = time.time()
        pids = {process.name: process.pid for process in self._stack.record().processes}
        before = cpu_times(pids)
        wants = draw_wants(mix(self._plan, self._plan.multiple * peak), self._plan.seed + 1)
        async with self._sampling(pids):
            await clients.run_all(self._told(wants, clients, seconds), seconds)
        took_s = time.time() - began_s
        self._captures += clients.captures
        seen = summary(clients.captures, began_s, began_s + seconds, peak)
        settled_s = began_s + min(MEMORY_SETTLES_S, seconds / 3)
        return seen | {
            "cpu_percent": {
                name: share["total"] for name, share in cpu_shares(before, cpu_times(pids), took_s).items()
            },
            "memory": memory(self.samples, settled_s),
        }

    def _told(self, wants: Iterator[Want], clients: Clients, seconds: float) -> Iterator[Want]:
        """The wants, and a line about every half minute."""
        said_s = 0.0
        for want in wants:
            if want.at_s - said_s > 30:
                said_s = want.at_s
                fates = Counter(fate(capture) for capture in clients.captures)
                say(f"overload: {want.at_s:.0f} of {seconds:.0f} s, {dict(fates)}")
            yield want

    async def judge(self, folder: Path) -> list[str]:
        """What is wrong with all that stands on the topics."""
        bus = KafkaBus(self._stack.kafka_address, client_id="history")
        await until_all_ended(bus, self._plan.deadline_s + 30.0)
        history = await read_history(bus, self._captures)
        rules = Rules(Tokeniser.load(folder), ModelFacts.load(folder, MODEL), salted=True, grace_s=GRACE_S)
        return (await asyncio.to_thread(check, history, rules)).findings

    def _clients(self, *, waits_out_refusals: bool) -> Clients:
        rng = random.Random(self._plan.seed)
        return Clients(self._stack.addresses("edge"), None, rng, silence_s=20.0, waits_out_refusals=waits_out_refusals)

    @asynccontextmanager
    async def _sampling(self, pids: Mapping[str, int]) -> AsyncGenerator[None]:
        task = asyncio.create_task(self._sample_for_ever(pids))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _sample_for_ever(self, pids: Mapping[str, int]) -> None:
        processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        addresses = [address for name in COUNTS for address in self._stack.addresses(name)]
        async with httpx.AsyncClient(trust_env=False) as http:
            while True:
                self.samples.at_s.append(time.time())
                for name, process in processes.items():
                    self.samples.rss_mib.setdefault(name, []).append(process.memory_info().rss / 2**20)
                queues: Counter[str] = Counter(dict.fromkeys(QUEUES, 0))
                for address in addresses:
                    queues.update(read_queues((await http.get(f"{address}/metrics")).text))
                for name, length in queues.items():
                    self.samples.queues.setdefault(name, []).append(length)
                await asyncio.sleep(SAMPLE_S)


def read_queues(page: str) -> dict[str, int]:
    """The lengths of queues that a page of metrics tells."""
    found: Counter[str] = Counter()
    for line in page.splitlines():
        if line.startswith(QUEUES):
            name, _, value = line.rpartition(" ")
            found[name.partition("{")[0]] += int(float(value))
    return dict(found)


async def measure(plan: Plan, folder: Path) -> dict[str, Any]:
    """The whole report."""
    model = write_fake_model(folder / MODEL)
    composition = Composition(
        counts=COUNTS,
        model=str(model),
        num_pages=NUM_PAGES,
        dtype="float32",
        max_restarts=0,
        kafka_port=None,
        redis_port=None,
        env={
            "BATON_MAX_RUNNING": str(plan.max_running),
            "BATON_FAKE_STEP_S": str(plan.step_s),
            "BATON_GRACE_S": str(GRACE_S),
        },
    )
    async with local_stack(composition, folder / "run", services=services(), report=say) as stack:
        run = Run(plan, stack)
        stages = await run.ramp()
        peak = max(stage["goodput_per_s"] for stage in stages)
        overload = await run.overload(peak)
        findings = await run.judge(model)
    return {
        "problems": problems(overload, overload["memory"], findings),
        "plan": asdict(plan),
        "ramp": stages,
        "peak_per_s": peak,
        "overload": overload,
        "samples": told(run.samples),
        "machine": machine(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def main(
    *,
    minutes: Annotated[float, typer.Option(min=0.2, help="Length of the overload.")] = 5.0,
    stage: Annotated[float, typer.Option(min=5, help="Seconds of each stage of the ramp.")] = 20.0,
    step_ms: Annotated[float, typer.Option(min=1, help="Time of an engine's step.")] = 60.0,
    max_running: Annotated[int, typer.Option(min=1, help="Requests that a worker runs at once.")] = 4,
    multiple: Annotated[float, typer.Option(min=0.1, help="Of the peak, offered.")] = 3.0,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds in which a request must have its answer.")] = 20.0,
    seed: Annotated[int, typer.Option(help="Of times and prompts.")] = 0,
    out: Annotated[str, typer.Option(help="Write the report to this file too.")] = "",
) -> None:
    """Measure the peak, then offer a multiple of it."""
    plan = Plan(
        minutes=minutes,
        stage_s=stage,
        step_s=step_ms / 1000,
        max_running=max_running,
        multiple=multiple,
        deadline_s=deadline,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(measure(plan, Path(folder)))
    if out:
        Path(out).write_text(json.dumps(report, indent=1) + "\n")
    shown = {name: value for name, value in report.items() if name not in {"samples", "machine"}}
    sys.stdout.write(json.dumps(shown, indent=1) + "\n")
    sys.exit(1 if report["problems"] else 0)


if __name__ == "__main__":
    typer.run(main)
