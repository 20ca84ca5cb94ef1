"""`python -m benchmarks.simulation`: the simulator beside the real stack, as JSON.

1. The stack serves a few requests one at a time: what their stamps say are the hops of the path here.
2. A trace is replayed against it, once for each rate; the schedule of each replay is kept. On CPUs, which measure next
   to nothing of themselves before they serve, a replay of which nothing is kept comes before these.
3. Each schedule is simulated, with those hops and the speeds and links that the workers published of themselves in the
   later half of the replay. Its times to the first token, from the send on, and to each later one are set beside what
   the replay's client saw; so is what of the first token's time went by at the workers, of which hops are no part.

Exit status 1 if some percentile is further off than `--within`, or a request failed; 2 if it could not run.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.handover import machine
from infra.local.composition import Composition
from infra.local.model import smollm2_folder
from infra.local.stack import Stack, local_stack
from loadgen.__main__ import EXIT_OK, EXIT_SOME_FAILED
from loadgen.measure import Record, percentile
from loadgen.saved import SavedResult, read_saved
from loadgen.simulator.hardware import Hardware, Hops, WorkerKind
from loadgen.simulator.policies import OURS, Goals, contender
from loadgen.simulator.sent import read_schedule
from loadgen.simulator.simulation import Setup, simulate
from loadgen.traces import read_trace
from shared.errors import StartupError
from shared.policy.profile import LinkRate, SpeedProfile
from shared.request import Event
from shared.state.port import LiveWorker, Role
from shared.state.redis import redis_state
from shared.wire.topics import NUM_SLOTS

ROOT = Path(__file__).parents[1]
NUM_QUIET = 12
LOOK_EVERY_S = 1.0
FEED_S = 0.25
"""Workers announce blocks so often, and ingest reads of them as often: half of each on average."""

PERCENTILES = (50, 90, 99)
JUDGED = (50, 90)
TIMES = ("ttft_ms", "tpot_ms", "prompt_ms")
JUDGED_TIMES = ("ttft_ms", "tpot_ms")
GOALS = Goals(ttft_s=2.0, tpot_s=0.1)
NO_HOST_LINK = LinkRate(0.0, 1e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run.

    Attributes:
        rates_per_s: of Poisson arrivals, one replay each.
        quiet_rate_per_s: of the requests that the hops are read from.
        replay: further options of `loadgen replay`.
    """

    composition: Composition
    trace: Path
    rates_per_s: Sequence[float]
    seconds: float
    quiet_rate_per_s: float
    replay: Sequence[str]

    def num_at(self, rate_per_s: float) -> int:
        """Requests of a replay."""
        return max(1, round(rate_per_s * self.seconds))


async def replay(plan: Plan, edge: str, folder: Path, name: str, rate_per_s: float, num: int, *how: str) -> SavedResult:
    """One run of the load generator; its schedule stands beside its result. Raises StartupError if it could not run."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loadgen", "replay", "--trace", str(plan.trace), "--base-url", edge),
        *("--tokenizer", plan.composition.model, "--request-rate", str(rate_per_s), "--num-prompts", str(num)),
        *("--save-result", "--save-detailed", "--result-dir", str(folder), "--result-filename", f"{name}.json"),
        *("--save-schedule", str(folder / f"{name}.schedule"), *plan.replay, *how),
        cwd=ROOT,
        stdout=asyncio.subprocess.DEVNULL,
    )
    status = await process.wait()
    if status not in (EXIT_OK, EXIT_SOME_FAILED):
        raise StartupError(f"loadgen replay {' '.join(plan.replay)}: it ended with {status}")
    return read_saved(folder / f"{name}.json")


@asynccontextmanager
async def watched(stack: Stack) -> AsyncGenerator[list[Sequence[LiveWorker]]]:
    """What the workers say of themselves, again and again while the context is open."""
    seen: list[Sequence[LiveWorker]] = []

    async def watch() -> None:
        async with redis_state(stack.redis_url) as state:
            while True:
                seen.append(await state.workers(num_slots=NUM_SLOTS))
                await asyncio.sleep(LOOK_EVERY_S)

    watching = asyncio.create_task(watch())
    try:
        yield seen
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


def later_half(seen: Sequence[Sequence[LiveWorker]]) -> list[LiveWorker]:
    """A worker tells the speeds of its newest steps. Behind a replay these are those of its last answers, when all
    others had ended and left the machine to them; in its first half sizes of steps are missing that come later."""
    return [worker for workers in seen[len(seen) // 2 :] for worker in workers]


def hops_of(saved: SavedResult) -> Hops:
    """What the path took where nothing waited: the middle of all requests."""
    took: dict[str, list[float]] = {name: [] for name in ("placed_s", "work_s", "token_s", "frame_s")}
    for record in saved.records():
        if not record.completed or record.sent_s is None or record.first_token_s is None:
            continue
        stamps = record.stamps
        took["placed_s"].append(stamps[Event.PLACED] - saved.started_unix - record.sent_s)
        took["work_s"].append(stamps[Event.PREFILLING] - stamps[Event.PLACED])
        took["frame_s"].append(saved.started_unix + record.first_token_s - stamps[Event.FIRST_TOKEN])
        if Event.TRANSFERRING in stamps:  # and not where the decode worker computed the prompt itself
            took["token_s"].append(stamps[Event.TRANSFERRING] - stamps[Event.FIRST_TOKEN])
    middle = {name: max(0.0, median(times)) if times else 0.0 for name, times in took.items()}
    return Hops(feed_s=FEED_S, **middle)


def hardware_of(live: Sequence[LiveWorker], hops: Hops) -> Hardware:
    """What the workers say of themselves, each once or more often, as a profile of the simulator."""
    kinds = {role: [worker for worker in live if worker.card.role is role] for role in Role}
    links = [rate for worker in kinds[Role.DECODE] for rate in worker.load.links.values()]
    return Hardware(
        name="as published",
        source="the workers of the stack that was measured",
        max_context=min(worker.card.max_context for worker in live),
        page_bytes=live[0].card.page_bytes,
        prefill=kind_of(kinds[Role.PREFILL]),
        decode=kind_of(kinds[Role.DECODE]),
        peer_link=LinkRate(fmean(rate.latency_s for rate in links), fmean(rate.bytes_per_s for rate in links)),
        host_link=NO_HOST_LINK,
        hops=hops,
    )


def kind_of(role: Sequence[LiveWorker]) -> WorkerKind:
    """The mean worker of a role. Raises RuntimeError if one has published no speeds."""
    profiles = [worker.load.profile for worker in role]
    if None in profiles:
        raise RuntimeError("a worker has published no speeds")
    first = role[0].card
    speeds = {
        name: fmean(asdict(profile)[name] for profile in profiles if profile is not None)
        for name in asdict(SpeedProfile(0, 0, 0, 0, 0))
    }
    return WorkerKind(
        speeds=SpeedProfile(**speeds),
        num_pages=first.num_pages,
        max_running=first.max_running,
        max_batch_tokens=first.max_batch_tokens,
    )


def percentiles_ms(times_s: Iterable[float | None]) -> dict[str, float]:
    """Of all that are not None."""
    ascending = sorted(time_s for time_s in times_s if time_s is not None)
    return {f"p{percent}": round(1000 * percentile(ascending, percent), 3) for percent in PERCENTILES}


def times_seen(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """By the replay's client and by stamps, of complete answers."""
    done = [record for record in records if record.completed]
    return {
        "ttft_ms": percentiles_ms([record.ttft_from_send_s for record in done]),
        "tpot_ms": percentiles_ms([record.tpot_s for record in done]),
        "prompt_ms": percentiles_ms(
            [record.stamps[Event.FIRST_TOKEN] - record.stamps[Event.PLACED] for record in done]
        ),
    }


def simulated(schedule: Path, hardware: Hardware, counts: Mapping[str, int]) -> dict[str, Any]:
    """The same by the simulator, and `local_prefills`."""
    ours = contender(OURS, GOALS, 0)
    setup = Setup(hardware, counts["prefill"], counts["decode"])
    jobs = simulate(read_schedule(schedule), ours.policy, ours.lengths, setup).jobs
    return {
        "ttft_ms": percentiles_ms([job.ttft_s for job in jobs]),
        "tpot_ms": percentiles_ms([job.tpot_s for job in jobs]),
        "prompt_ms": percentiles_ms([_since(job.placed_s, job.prefill_ended_s) for job in jobs]),
        "local": sum(job.is_local for job in jobs if job.row.num_output > 1),
    }


def _since(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else end_s - start_s


def local_prefills(records: Sequence[Record]) -> int:
    """Prompts that a decode worker computed, but for those of one-token answers: no stamp tells of these."""
    return sum(Event.TRANSFERRING not in record.stamps for record in records if (record.output_tokens or 0) > 1)


async def run(plan: Plan, folder: Path) -> dict[str, Any]:
    """Everything, as one report."""
    composition = plan.composition
    async with local_stack(composition, folder / "stack", report=_say) as stack:
        edge = stack.addresses("edge")[0]
        quiet = await replay(
            plan, edge, folder, "quiet", plan.quiet_rate_per_s, NUM_QUIET, "--arrivals", "constant", "--seed", "1"
        )
        hops = hops_of(quiet)
        if composition.device == "cpu":
            _say("so that the workers know their speeds")
            rate_per_s = plan.rates_per_s[0]
            await replay(plan, edge, folder, "first", rate_per_s, plan.num_at(rate_per_s), "--seed", "0")
        points: list[dict[str, Any]] = []
        for number, rate_per_s in enumerate(plan.rates_per_s):
            _say(f"{rate_per_s:g} requests/s")
            num, name = plan.num_at(rate_per_s), f"rate-{number}"
            async with watched(stack) as told:
                saved = await replay(plan, edge, folder, name, rate_per_s, num, "--seed", str(number + 2))
            records = saved.records()
            hardware = hardware_of(later_half(told), hops)
            real = times_seen(records)
            sim = simulated(folder / f"{name}.schedule", hardware, composition.counts)
            points.append(
                {
                    "rate_per_s": rate_per_s,
                    "requests": len(records),
                    "failed": sum(not record.completed for record in records),
                    "late_ms": percentiles_ms([record.lateness_s or 0.0 for record in records]),
                    "real": real | {"local": local_prefills(records)},
                    "simulated": sim,
                    "off": {
                        f"{what}_{p}": round(sim[what][p] / real[what][p] - 1, 3) for what in TIMES for p in real[what]
                    },
                    "hardware": hardware.model_dump(mode="json"),
                }
            )
    return {
        "measure": "the simulator beside the real stack",
        "machine": machine(composition.device),
        "date": time.strftime("%Y-%m-%d"),
        "model": Path(composition.model).name,
        "counts": composition.counts,
        "trace": plan.trace.name,
        "replay": list(plan.replay),
        "points": points,
    }


def furthest_off(report: Mapping[str, Any]) -> float:
    """Of all percentiles that are judged."""
    judged = [f"{what}_p{percent}" for what in JUDGED_TIMES for percent in JUDGED]
    return max(abs(point["off"][name]) for point in report["points"] for name in judged)


def table_of(report: Mapping[str, Any]) -> Table:
    table = Table("requests/s", "", "real", "simulated", "off")
    for point in report["points"]:
        for what in TIMES:
            for name, real in point["real"][what].items():
                shown = (
                    f"{real:.1f}",
                    f"{point['simulated'][what][name]:.1f}",
                    f"{point['off'][f'{what}_{name}']:+.1%}",
                )
                table.add_row(f"{point['rate_per_s']:g}", f"{what} {name}", *shown)
        local = (str(point["real"]["local"]), str(point["simulated"]["local"]), "")
        table.add_row(f"{point['rate_per_s']:g}", "prompts computed by decode workers", *local)
    return table


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def main(
    *,
    trace: Annotated[Path, typer.Option(help="Mooncake .jsonl or Azure .csv")],
    rates: Annotated[str, typer.Option(help="Requests a second, one replay each.")] = "1",
    seconds: Annotated[float, typer.Option(help="Length of each replay.")] = 60.0,
    quiet_rate: Annotated[float, typer.Option(help="Requests a second of those that the hops are read from.")] = 0.5,
    replay_options: Annotated[str, typer.Option("--replay", help="More options of loadgen replay.")] = "",
    model: Annotated[str, typer.Option(help="Folder of a model; by default SmolLM2-135M-Instruct.")] = "",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cpu",
    prefill: Annotated[int, typer.Option(help="Prefill workers.")] = 1,
    decode: Annotated[int, typer.Option(help="Decode workers.")] = 1,
    prefill_gpus: Annotated[str, typer.Option(help="GPUs of the prefill workers, in turn.")] = "0",
    decode_gpus: Annotated[str, typer.Option(help="GPUs of the decode workers, in turn.")] = "1",
    num_pages: Annotated[int | None, typer.Option(help="KV pages of each worker; on GPUs all that fit.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="K=V", help="A setting of all services.")
    ] = None,
    within: Annotated[float, typer.Option(help="How far off p50 and p90 may be, as a share.")] = 0.15,
    out: Annotated[Path | None, typer.Option(help="Write the report to this file.")] = None,
) -> None:
    """Replay a trace against the stack, simulate the same, and compare."""
    on_gpus = {"prefill": prefill_gpus, "decode": decode_gpus} if device == "cuda" else {}
    composition = Composition(
        counts={"ingest": 1, "prefill": prefill, "decode": decode, "edge": 1},
        model=str(Path(model).resolve() if model else smollm2_folder()),
        device=device,
        gpus=on_gpus,
        dtype="bfloat16" if device == "cuda" else "float32",
        num_pages=num_pages,
        max_restarts=0,
        env=dict(pair.split("=", 1) for pair in settings or ()),
        kafka_port=None,
        redis_port=None,
    )
    plan = Plan(
        composition=composition,
        trace=trace.resolve(),
        rates_per_s=[float(rate) for rate in rates.split(",")],
        seconds=seconds,
        quiet_rate_per_s=quiet_rate,
        replay=replay_options.split(),
    )
    try:
        read_trace(trace)  # before a stack is started for it
        with tempfile.TemporaryDirectory() as folder:
            report = asyncio.run(run(plan, Path(folder)))
    except StartupError as error:
        _say(str(error))
        sys.exit(2)
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    Console().print(table_of(report))
    failed = sum(point["failed"] for point in report["points"])
    sys.exit(1 if failed or furthest_off(report) > within else 0)


if __name__ == "__main__":
    typer.run(main)
