"""`python -m benchmarks.handover`: the whole stack on one or two GPUs, held against one engine alone, as JSON.

1. Prompts one after the other: each is prefilled on one worker and pulled by the other meanwhile. What of that a client
   waits for is told by the stamps: until the first token has reached decode, and from there to the second. How fast a
   pull alone is, `benchmarks.kv_transfer` tells.
2. Prompts of many lengths at once through the edge, greedy: their tokens are compared with the lone engine's
   (`benchmarks.lone_engine`), up to ties in bf16.
3. Afterwards all KV pages must be free, no prompt may have been computed twice, and between GPUs the link must go by
   `cuda_ipc`.

Exit status 1 if something of that does not hold; `problems` in the output says what.
"""

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import torch
import typer
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.lone_engine import Task
from infra.local.composition import HAND_OVER_ALWAYS, Composition
from infra.local.model import smollm2_folder
from infra.local.stack import Stack, local_stack
from shared.observe.metrics import LocalPrefill
from shared.request import Event
from shared.state.keys import BEAT_INTERVAL_S
from shared.text.tokeniser import Tokeniser

ROOT = Path(__file__).parents[1]
TEXTS = ("docs/architecture.md", "docs/request_life.md", "README.md", "docs/glossary.md")
COUNTS = {"ingest": 1, "prefill": 1, "decode": 1, "edge": 1}
REQUEST_TIMEOUT_S = 120.0
FREE_WITHIN_S = 20.0
WORKERS = ("prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run.

    Attributes:
        gpus: of `Composition`.
        lengths: prompt lengths in tokens, those of the second part.
        new_tokens: length of each answer.
        pulls: prompts of the first part, `pull_tokens` long.
        margin: see `Task`.
    """

    model: Path
    device: str
    gpus: Mapping[str, str]
    num_pages: int
    lengths: Sequence[int]
    new_tokens: int
    pulls: int
    pull_tokens: int
    margin: float


def cut_prompts(ids: Sequence[int], lengths: Iterable[int]) -> list[list[int]]:
    """A prompt of each length; no two begin alike, so none finds another's pages."""
    prompts: list[list[int]] = []
    for begin, length in enumerate(lengths):
        repeated = -(-(begin + length) // len(ids))
        prompts.append((list(ids) * repeated)[begin : begin + length])
    return prompts


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy answer.

    Attributes:
        tokens: their texts.
        timings: unix seconds by event, of the workers' clocks.
    """

    tokens: list[str]
    timings: Mapping[str, float]


async def ask(http: httpx.AsyncClient, edge: str, model: str, prompt: Sequence[int], new_tokens: int) -> Answer:
    """Raises RuntimeError for an error."""
    body = {"model": model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    answer = await http.post(f"{edge}/v1/completions", json=body | {"logprobs": 0})
    if answer.status_code != httpx.codes.OK:
        raise RuntimeError(f"the edge answered {answer.status_code}: {answer.text[:500]}")
    told = answer.json()
    return Answer(told["choices"][0]["logprobs"]["tokens"], told["baton"]["timings"])


async def metrics(http: httpx.AsyncClient, address: str) -> dict[str, float]:
    """A worker's metrics by name; of prompts computed on the decode worker those whose pull failed."""
    answer = await http.get(f"{address}/metrics")
    answer.raise_for_status()
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
        and sample.labels.get("cause", LocalPrefill.PULL_FAILED) == LocalPrefill.PULL_FAILED
    }


async def links_of(http: httpx.AsyncClient, address: str) -> list[dict[str, Any]]:
    """What a worker says of its links, see docs/links.md."""
    answer = await http.get(f"{address}/health")
    answer.raise_for_status()
    return answer.json()["links"]


async def single_pulls(http: httpx.AsyncClient, stack: Stack, model: str, plan: Plan, ids: Sequence[int]) -> list[Any]:
    """One pull after the other, the first of all being the slow one that opens the connection."""
    (edge,), (decode,) = stack.addresses("edge"), stack.addresses("decode")
    prompts = cut_prompts(ids[::-1], [plan.pull_tokens] * plan.pulls)
    pulls: list[Any] = []
    for prompt in prompts:
        before = await metrics(http, decode)
        asked_s = time.monotonic()
        answer = await ask(http, edge, model, prompt, 2)
        took_s = time.monotonic() - asked_s
        after = await metrics(http, decode)
        num_bytes = after["baton_kv_pull_bytes_total"] - before["baton_kv_pull_bytes_total"]
        pulls.append(
            {
                "mib": round(num_bytes / 2**20, 1),
                **visible_ms(answer.timings),
                "request_ms": round(1000 * took_s, 1),
            }
        )
    return pulls


def visible_ms(timings: Mapping[str, float]) -> dict[str, float]:
    """What lies between the first token and the second: the way of the first to decode, and what is left from there."""
    made_s, handed_on_s, decoding_s = (
        timings[event] for event in (Event.FIRST_TOKEN, Event.TRANSFERRING, Event.DECODING)
    )
    return {
        "handing_on_ms": round(1000 * (handed_on_s - made_s), 2),
        "rest_ms": round(1000 * (decoding_s - handed_on_s), 2),
    }


async def workers_at_rest(http: httpx.AsyncClient, stack: Stack) -> dict[str, dict[str, int]]:
    """Pages and counts of each worker once all is free, or after a while."""
    deadline_s = time.monotonic() + FREE_WITHIN_S
    while True:
        await asyncio.sleep(2 * BEAT_INTERVAL_S)  # gauges are as of the last beat
        read = {name: await metrics(http, stack.addresses(name)[0]) for name in WORKERS}
        at_rest = all(
            each["baton_kv_pages_free"] == each["baton_kv_pages"] and each["baton_kv_held_requests"] == 0
            for each in read.values()
        )
        if at_rest or time.monotonic() > deadline_s:
            names = ("baton_kv_pages", "baton_kv_pages_free", "baton_kv_held_requests", "baton_local_prefills_total")
            return {worker: {name: int(each[name]) for name in names} for worker, each in read.items()}


async def serve(plan: Plan, run_dir: Path, prompts: Sequence[Sequence[int]], ids: Sequence[int]) -> dict[str, Any]:
    """All that needs the running stack."""
    composition = Composition(
        counts=COUNTS,
        model=str(plan.model),
        device=plan.device,
        gpus=plan.gpus,
        num_pages=plan.num_pages,
        max_restarts=0,
        env=HAND_OVER_ALWAYS,
        kafka_port=None,
        redis_port=None,
    )
    began_s = time.monotonic()
    model = plan.model.name
    async with (
        local_stack(composition, run_dir, report=_say) as stack,
        httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S) as http,
    ):
        ready_s = time.monotonic() - began_s
        pulls = await single_pulls(http, stack, model, plan, ids)
        (edge,) = stack.addresses("edge")
        asked_s = time.monotonic()
        answers = await asyncio.gather(*(ask(http, edge, model, prompt, plan.new_tokens) for prompt in prompts))
        answered_s = time.monotonic() - asked_s
        workers = await workers_at_rest(http, stack)
        links = await links_of(http, stack.addresses("decode")[0])
    return {
        "ready_s": round(ready_s, 1),
        "first_pull": pulls[0],
        "pulls": pulls[1:],
        "answered_s": round(answered_s, 2),
        "workers": workers,
        "links": links,
        "answers": [answer.tokens for answer in answers],
    }


async def lone_engine(plan: Plan, prompts: Sequence[Sequence[int]], answers: list[list[str]]) -> dict[str, Any]:
    """What `benchmarks.lone_engine` says of the answers, on the GPU of the prefill worker."""
    task = Task(
        model=str(plan.model),
        device=plan.device,
        dtype="bfloat16",
        num_pages=plan.num_pages,
        prompts=[list(prompt) for prompt in prompts],
        answers=answers,
        margin=plan.margin,
    )
    gpu = {"CUDA_VISIBLE_DEVICES": plan.gpus["prefill"]} if plan.gpus else {}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.lone_engine"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | gpu,
        cwd=ROOT,
    )
    out, _ = await process.communicate(json.dumps(asdict(task)).encode())
    if process.returncode != 0:
        raise RuntimeError(f"the lone engine ended with exit status {process.returncode}")
    return json.loads(out.splitlines()[-1])  # the lines before it are the engine's log


def problems(plan: Plan, served: Mapping[str, Any], compared: Mapping[str, Any]) -> list[str]:
    """What does not hold, in words."""
    found = [f"wrong token: {wrong}" for wrong in compared["wrong"]]
    wanted = len(plan.lengths) * plan.new_tokens
    if compared["tokens"] != wanted:  # what an answer lacks, nobody compares
        found.append(f"the answers have {compared['tokens']} tokens in all, not {wanted}")
    for worker, counts in served["workers"].items():
        if counts["baton_kv_pages_free"] != counts["baton_kv_pages"] or counts["baton_kv_held_requests"]:
            found.append(f"{worker} holds pages still: {counts}")
        if counts["baton_local_prefills_total"]:
            found.append(f"{worker} computed {counts['baton_local_prefills_total']} prompts because a pull failed")
    transports = [link.get("transport") for link in served["links"]]
    if plan.device == "cuda" and transports != ["cuda_ipc"]:
        found.append(f"the decode worker's links go by {transports}, not by one cuda_ipc")
    return found


def medians(pulls: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of what `visible_ms` says of each pull; nothing of none."""
    names = ("handing_on_ms", "rest_ms") if pulls else ()
    return {f"median_{name}": round(statistics.median(pull[name] for pull in pulls), 2) for name in names}


async def run(plan: Plan, run_dir: Path) -> dict[str, Any]:
    """Everything, as one report."""
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in TEXTS)
    ids = list(Tokeniser.load(plan.model).encode(text))
    prompts = cut_prompts(ids, plan.lengths)
    began_s = time.monotonic()
    served = await serve(plan, run_dir, prompts, ids)
    _say(f"served after {time.monotonic() - began_s:.0f} s; now the lone engine")
    compared = await lone_engine(plan, prompts, served.pop("answers"))
    return {
        "problems": problems(plan, served, compared),
        **medians(served["pulls"]),
        "lone_engine": compared,
        **served,
        "plan": {name: value if isinstance(value, int | float | str) else str(value) for name, value in _of(plan)},
        "machine": machine(plan.device),
        "date": time.strftime("%Y-%m-%d"),
        "took_s": round(time.monotonic() - began_s, 1),
    }


def _of(plan: Plan) -> Iterable[tuple[str, object]]:
    return asdict(plan).items()


def machine(device: str) -> str:
    """What it ran on."""
    if device == "cpu":
        return f"{os.cpu_count()} cores"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{', '.join(names)}; {os.cpu_count()} cores; torch {torch.__version__}"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def main(
    *,
    model: Annotated[str, typer.Option(help="Folder of a model; by default SmolLM2-135M-Instruct.")] = "",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    prefill_gpu: Annotated[str, typer.Option(help="GPU of the prefill worker.")] = "0",
    decode_gpu: Annotated[str, typer.Option(help="GPU of the decode worker; the same one is allowed.")] = "1",
    num_pages: Annotated[int, typer.Option(help="KV pages of each worker.")] = 512,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "1,63,64,65,128,1000,4096",
    rounds: Annotated[int, typer.Option(help="Prompts of each length.")] = 3,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 16,
    pulls: Annotated[int, typer.Option(help="Prompts that are pulled one by one, the first as a warm-up.")] = 9,
    pull_tokens: Annotated[int, typer.Option(help="Their length.")] = 4096,
    margin: Annotated[
        float, typer.Option(help="Logits this close are a tie; bf16 logits of 16 to 32 are multiples of 0.125.")
    ] = 0.5,
    out: Annotated[str, typer.Option(help="Write the report to this file too.")] = "",
) -> None:
    """Run the stack on GPUs and compare it with one engine alone."""
    plan = Plan(
        model=Path(model).resolve() if model else smollm2_folder(),
        device=device,
        gpus={"prefill": prefill_gpu, "decode": decode_gpu} if device == "cuda" else {},
        num_pages=num_pages,
        lengths=[int(length) for length in lengths.split(",")] * rounds,
        new_tokens=new_tokens,
        pulls=pulls,
        pull_tokens=pull_tokens,
        margin=margin,
    )
    with tempfile.TemporaryDirectory() as run_dir:
        report = json.dumps(asyncio.run(run(plan, Path(run_dir))), indent=1)
    sys.stdout.write(report + "\n")
    if out:
        Path(out).write_text(report + "\n")
    sys.exit(1 if json.loads(report)["problems"] else 0)


if __name__ == "__main__":
    typer.run(main)
