"""Command line; `--help` says the rest, `benchmarks/README.md` how to read the result."""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.engine.machine import commit, machine, process_age_s
from benchmarks.kv_transfer.pair import Child, children
from benchmarks.kv_transfer.plan import FULL, TRIAL, Plan
from benchmarks.kv_transfer.report import lines, pull_row, slowdown
from benchmarks.kv_transfer.trace import AFTERWARDS_S, Event, phases_ms, summary, timeline

PARTS = ("pulls", "idle", "formats", "interference")
ENDS = ("source", "puller")
MODULE = "benchmarks.kv_transfer.ends"


class Transfers:
    """Measures pulls between two processes without engines."""

    def __init__(self, plan: Plan, source: Child, puller: Child) -> None:
        self._plan = plan
        self._source = source
        self._puller = puller

    async def link(self) -> dict[str, Any]:
        """Connects: the self-test's findings."""
        return await self._puller.ask("connect", address=await self._source.ask("where"))

    async def pulls(self) -> list[dict[str, Any]]:
        return [await self._pulls_of(num_tokens) for num_tokens in self._plan.tokens]

    async def _pulls_of(self, num_tokens: int) -> dict[str, Any]:
        plan, num_pages = self._plan, num_tokens // 64
        tickets = await self._offer(num_pages, plan.num_warm + plan.num_pulls)
        spans = await self._puller.ask("pull", tickets=tickets)
        times_ms = [1e3 * (ended_s - began_s) for began_s, ended_s in spans[plan.num_warm :]]
        num_bytes = num_pages * await self._puller.ask("page_bytes")
        traced = await self._traced(num_pages)
        tickets = await self._offer(num_pages, 1)
        equal = await self._puller.ask("pull_and_compare", tickets=tickets, seeds=[0])
        return pull_row(num_tokens, num_bytes, times_ms) | {"equal": equal} | traced

    async def _traced(self, num_pages: int) -> dict[str, Any]:
        """Phases of some more pulls, and all that happened in the one of median length."""
        # One more: at the first, whoever waits for a message does so in a method that is not watched yet.
        tickets = await self._offer(num_pages, 1 + self._plan.num_traced)
        for child in (self._source, self._puller):
            await child.ask("watch")
        _, *spans = await self._puller.ask("pull", tickets=tickets, pause_s=2 * AFTERWARDS_S)
        events = [Event(**event) for child in (self._source, self._puller) for event in await child.ask("watched")]
        phases = [phases_ms(events, *span) for span in spans]
        middle = sorted(spans, key=lambda span: span[1] - span[0])[len(spans) // 2]
        return {"phases_ms": summary(phases), "timeline": timeline(events, *middle)}

    async def together(self) -> dict[str, Any]:
        """Several short pulls that begin at once."""
        plan, num_tokens = self._plan, self._plan.tokens[0]
        tickets = await self._offer(num_tokens // 64, plan.at_once * (plan.num_warm + plan.num_pulls))
        times_ms = (await self._puller.ask("pull_together", tickets=tickets, at_once=plan.at_once))[plan.num_warm :]
        num_bytes = plan.at_once * num_tokens // 64 * await self._puller.ask("page_bytes")
        return pull_row(num_tokens, num_bytes, times_ms) | {"at_once": plan.at_once}

    async def idle(self) -> dict[str, float]:
        shares = await asyncio.gather(
            *(child.ask("idle", seconds=self._plan.idle_s) for child in (self._source, self._puller))
        )
        return dict(zip(ENDS, shares, strict=True))

    async def formats(self) -> list[dict[str, Any]]:
        num_pages = self._plan.format_tokens // 64
        return await self._puller.ask("formats", num_pages=num_pages, repeats=self._plan.num_pulls)

    async def _offer(self, num_pages: int, number: int) -> list[Any]:
        return await self._source.ask("offer", num_pages=num_pages, seeds=list(range(number)))


class Interference:
    """Measures engines while pulls take their memory's time; phases with and without pulls take turns."""

    def __init__(self, plan: Plan, source: Child, puller: Child) -> None:
        self._plan = plan
        self._source = source
        self._puller = puller

    async def rows(self) -> list[dict[str, Any]]:
        plan = self._plan
        decode = ("decode", {"batch": plan.batch, "context": plan.context, "steps": plan.steps})
        prefill = ("prefill", {"num_tokens": plan.prompt_tokens, "number": plan.prompts})
        return [
            *await self._compared(self._puller, *decode, ("paced", "full")),
            *await self._compared(self._source, *prefill, ("paced",)),
        ]

    async def _compared(
        self, child: Child, work: str, arguments: dict[str, int], streams: Sequence[str]
    ) -> list[dict[str, Any]]:
        await child.ask(work, **arguments)  # the first of its kind
        without_ms: dict[str, list[float]] = {stream: [] for stream in streams}
        with_ms: dict[str, list[float]] = {stream: [] for stream in streams}
        rates: dict[str, list[float]] = {stream: [] for stream in streams}
        for _ in range(self._plan.rounds):
            for stream in streams:
                without_ms[stream] += await child.ask(work, **arguments)
                await self._start(stream)
                with_ms[stream] += await child.ask(work, **arguments)
                rates[stream].append(await self._stop())
        all_without_ms = [each for stream in streams for each in without_ms[stream]]
        rows = [{"work": work, "stream": "none", "gb_per_s": 0.0} | slowdown(all_without_ms, all_without_ms)]
        for stream in streams:
            rate = sum(rates[stream]) / len(rates[stream])
            rows.append(
                {"work": work, "stream": stream, "gb_per_s": rate} | slowdown(with_ms[stream], without_ms[stream])
            )
        return rows

    async def _start(self, stream: str) -> None:
        plan = self._plan
        tickets = await self._source.ask(
            "offer", num_pages=plan.stream_tokens // 64, seeds=list(range(plan.max_stream_pulls))
        )
        pace = {"gb_per_s": plan.paced_gb_per_s, "at_once": 1}
        if stream == "full":
            pace = {"gb_per_s": None, "at_once": plan.stream_at_once}
        await self._puller.ask("start_stream", tickets=tickets, **pace)

    async def _stop(self) -> float:
        """GB/s of the stream. Raises RuntimeError if it ended before the engine's work did."""
        streamed = await self._puller.ask("stop_stream")
        if streamed["ran_out"]:
            raise RuntimeError(f"{self._plan.max_stream_pulls} tickets did not last for a phase")
        await self._source.ask("withdraw")
        return streamed["gb_per_s"]


async def measure(plan: Plan, parts: Sequence[str], gpus: Sequence[str]) -> dict[str, Any]:
    """The parts asked for, each under its name."""
    result: dict[str, Any] = {}
    masks = gpus if plan.device == "cuda" else None
    if set(parts) - {"interference"}:
        jobs = [{"end": end, "device": plan.device, "num_pages": plan.num_pages} for end in ENDS]
        async with children(MODULE, jobs, masks) as (source, puller):
            transfers = Transfers(plan, source, puller)
            result["link"] = await transfers.link()
            if "pulls" in parts:
                result["pulls"] = await transfers.pulls()
                result["together"] = await transfers.together()
            if "idle" in parts:
                result["idle"] = await transfers.idle()
            if "formats" in parts:
                result["formats"] = await transfers.formats()
            _say("pulls, idle, formats")
    if "interference" in parts:
        job = {
            "device": plan.device,
            "num_pages": plan.stream_tokens // 64 * 4,
            "shape": plan.shape,
            "batch_tokens": plan.prompt_tokens,
        }
        jobs = [{"end": end, **job} for end in ENDS]
        async with children(MODULE, jobs, masks) as (source, puller):
            await Transfers(plan, source, puller).link()
            _say("engines are ready")
            result["engines"] = await puller.ask("describe")
            result["interference"] = await Interference(plan, source, puller).rows()
    return result


def _say(text: str) -> None:
    sys.stderr.write(f"{process_age_s():.1f} s: {text}\n")
    sys.stderr.flush()


def main(
    *,
    device: Annotated[str, typer.Option(help="cuda, or cpu: a small trial.")] = "cuda",
    gpus: Annotated[str, typer.Option(help="GPUs of the source and of the puller.")] = "0,1",
    only: Annotated[str, typer.Option(help=f"Some of {','.join(PARTS)}.")] = ",".join(PARTS),
    pulls: Annotated[int, typer.Option(help="Measured pulls of each length; 0 takes the usual number.")] = 0,
    stream_at_once: Annotated[int, typer.Option(help="Pulls at a time at full rate; 0 takes the usual number.")] = 0,
    revision: Annotated[str, typer.Option(help="Commit to name in the result where git cannot tell.")] = "",
    out: Annotated[str, typer.Option(help="Write the result as JSON to this file.")] = "",
) -> None:
    """Measure KV pulls between two processes. Exit status 1: the pages that came were not those sent."""
    parts = only.split(",")
    if set(parts) - set(PARTS) or device not in {"cuda", "cpu"}:
        raise typer.BadParameter(f"--only is some of {','.join(PARTS)}, --device cuda or cpu")
    plan = FULL if device == "cuda" else TRIAL
    plan = replace(plan, num_pulls=pulls or plan.num_pulls, stream_at_once=stream_at_once or plan.stream_at_once)
    result = asyncio.run(measure(plan, parts, gpus.split(","))) | {
        "plan": asdict(plan),
        "gpus": gpus if device == "cuda" else None,
        "machine": machine(device),
        "date": time.strftime("%Y-%m-%d"),
        "commit": revision or commit(),
        "took_s": round(process_age_s(), 1),
    }
    sys.stdout.write("\n".join(lines(result)) + f"\n\n{result['took_s']} s in all\n")
    if out:
        Path(out).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    sys.exit(0 if all(row["equal"] for row in result.get("pulls", [])) else 1)


if __name__ == "__main__":
    typer.run(main)
