"""`python -m benchmarks.kv_pull`: how fast one process pulls KV pages from another through `shared/transfer`, as JSON.

A source and a puller in processes of their own, each on its GPU, with the KV layout of an 8B Llama. For each size of
the staging buffers: one pull that also makes the connection, then some that are measured; the pages are compared.
"""

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from pydantic import TypeAdapter

from benchmarks.handover import machine, read_protocols, show_protocols
from shared.kv.layout import KvLayout
from shared.kv.paged_cache import PagedCache
from shared.request import Incarnation
from shared.transfer.staging import Staging
from shared.transfer.ucx import UcxContext, UcxTransfer
from shared.wire.codec import encode
from shared.wire.to_worker import KvTicket

ROOT = Path(__file__).parents[1]
LAYOUT = KvLayout(model_fingerprint="random", num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16")
SECRET = bytes(16)
SEED = 1
TIMEOUT_S = 60.0

Buffers = tuple[int, int]
"""Bytes of a staging buffer, and how many there are each way."""


async def work(role: str, device: str, num_pages: int, buffers: Sequence[Buffers], num_pulls: int) -> None:
    """One of the two processes: `source` says its tickets and waits, `puller` reads them and pulls."""
    loop = asyncio.get_running_loop()
    cache = PagedCache(LAYOUT, num_pages, torch.device(device))
    wanted = torch.empty_like(cache.pages).normal_(generator=torch.Generator(device).manual_seed(SEED))
    if role == "source":
        cache.pages.copy_(wanted)
    _wait_for(device)
    async with AsyncExitStack() as lifetime:
        context = await lifetime.enter_async_context(UcxContext())
        transfers = [
            await lifetime.enter_async_context(
                UcxTransfer(
                    context,
                    Staging(cache, os.environ, message_bytes=num_bytes, num_buffers=number),
                    incarnation=Incarnation(role),
                    clock=loop.time,
                )
            )
            for num_bytes, number in buffers
        ]
        if role == "source":
            tickets = [
                [json.loads(encode(_offer(transfer, f"{index}", num_pages))) for index in range(num_pulls + 1)]
                for transfer in transfers
            ]
            _say(tickets)
            await asyncio.to_thread(sys.stdin.readline)
            return
        given = json.loads(await asyncio.to_thread(sys.stdin.readline))
        for transfer, (num_bytes, number), tickets in zip(transfers, buffers, given, strict=True):
            cache.pages.zero_()
            _wait_for(device)
            seconds = [await _pull(transfer, ticket, num_pages) for ticket in tickets]
            _say(
                {
                    "buffer_mib": num_bytes / 2**20,
                    "buffers": number,
                    "pages_equal": torch.equal(cache.pages, wanted),
                    "first_ms": round(1000 * seconds[0], 1),
                    "pull_ms": [round(1000 * each, 2) for each in seconds[1:]],
                    "median_gb_per_s": round(cache.pages.nbytes / statistics.median(seconds[1:]) / 1e9, 1),
                }
            )


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()  # copies of a transfer run on a stream of their own


def _offer(transfer: UcxTransfer, key: str, num_pages: int) -> KvTicket:
    return transfer.offer(
        key,
        range(num_pages),
        num_tokens=64 * num_pages,
        secret=SECRET,
        puller=Incarnation("puller"),
        hold_s=TIMEOUT_S,
        on_end=lambda _: None,
    )


async def _pull(transfer: UcxTransfer, ticket: Any, num_pages: int) -> float:
    began_s = time.perf_counter()
    parsed = TypeAdapter(KvTicket).validate_python(ticket)
    await transfer.pull(parsed, want=range(num_pages), into=range(num_pages), timeout_s=TIMEOUT_S)
    return time.perf_counter() - began_s


def _say(content: object) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


async def measure(
    device: str, gpus: tuple[str, str], num_pages: int, buffers: Sequence[Buffers], num_pulls: int
) -> Any:
    """Starts both processes and collects what the puller says."""
    with TemporaryDirectory() as logs:
        results = await _measure(device, gpus, num_pages, buffers, num_pulls, Path(logs))
        protocols = read_protocols(Path(logs))
    return {
        "mib": num_pages * LAYOUT.page_bytes / 2**20,
        "results": results,
        "protocols": protocols,
        "gpus": ", ".join(gpus) if device == "cuda" else "",
        "machine": machine(device),
        "date": time.strftime("%Y-%m-%d"),
    }


async def _measure(
    device: str, gpus: tuple[str, str], num_pages: int, buffers: Sequence[Buffers], num_pulls: int, logs: Path
) -> list[Any]:

    async def start(role: str, gpu: str) -> asyncio.subprocess.Process:
        job = {"role": role, "device": device, "num_pages": num_pages, "buffers": buffers, "num_pulls": num_pulls}
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.kv_pull", "--job", json.dumps(job)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | show_protocols(logs) | ({"CUDA_VISIBLE_DEVICES": gpu} if device == "cuda" else {}),
            cwd=ROOT,
            limit=2**24,
        )

    source, puller = [await start(role, gpu) for role, gpu in zip(("source", "puller"), gpus, strict=True)]
    try:
        _tell(puller, await _hear(source))
        results = [await _hear(puller) for _ in buffers]
        _tell(source, "done")
        for process in (source, puller):
            await process.wait()
    finally:
        for process in (source, puller):
            if process.returncode is None:
                process.kill()
                await process.wait()
    return results


def _tell(process: asyncio.subprocess.Process, content: object) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(content).encode() + b"\n")


async def _hear(process: asyncio.subprocess.Process) -> Any:
    assert process.stdout is not None
    async with asyncio.timeout(2 * TIMEOUT_S):
        line = await process.stdout.readline()
    if not line:
        raise RuntimeError("a process of the measurement ended early")
    return json.loads(line)


def main(
    *,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    gpus: Annotated[str, typer.Option(help="GPUs of the source and of the puller; one twice is allowed.")] = "0,1",
    num_pages: Annotated[int, typer.Option(help="Pages of 8 MiB in a pull; 64 are 4096 tokens.")] = 64,
    buffers: Annotated[str, typer.Option(help="MiB of a staging buffer x how many each way.")] = "64x2,128x2,256x2",
    pulls: Annotated[int, typer.Option(help="Measured pulls of each kind.")] = 10,
    out: Annotated[str, typer.Option(help="Write the report to this file too.")] = "",
    job: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure the rate of KV pulls between two processes. Exit status 1: the pages that came were not those sent."""
    if job:
        asyncio.run(work(**json.loads(job)))
        return
    kinds = [tuple(int(number) for number in kind.split("x")) for kind in buffers.split(",")]
    source, puller = gpus.split(",")
    sizes = [(mib * 2**20, number) for mib, number in kinds]
    report = json.dumps(asyncio.run(measure(device, (source, puller), num_pages, sizes, pulls)), indent=1)
    sys.stdout.write(report + "\n")
    if out:
        Path(out).write_text(report + "\n")
    sys.exit(0 if all(result["pages_equal"] for result in json.loads(report)["results"]) else 1)


if __name__ == "__main__":
    typer.run(main)
