"""`python -m benchmarks.slow_link`: what a slow link between two hosts adds to the second token, as JSON.

The whole stack with SmolLM2 on the CPU: Kafka, Redis, ingest and the edge on this machine, the prefill and the decode
worker in two hosts (`infra.two_hosts`) whose link alone carries KV. Prompts come one after the other, all different.

1. The link is unlimited: what lies between the first and the second token is then a decode step and messages.
2. Then, for INT8 and for INT4: some prompts of which one token is wanted say how long a prefill takes. The link is
   limited so that native KV would take 1.5 or 3 times that, and the decode worker is started anew, as workers measure
   the link when they meet. Now requests of three kinds take turns: one token (no KV travels), native, and the lossy
   form allowed. The bound is the first token of those of one token and the gap of the unlimited link.

What crossed the link is counted by its device. Exit status 1 if a lossy form is over 1.25 times the bound, or was not
always used.
"""

import asyncio
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.handover import ROOT, TEXTS, cut_prompts, machine
from infra.kafka.create_topics import create_topics
from infra.local.composition import HAND_OVER_ALWAYS, HOST, SERVICES, Composition, service_spec
from infra.local.kafka import kafka_ready, kafka_spec
from infra.local.model import smollm2_folder
from infra.local.ports import PortPicker
from infra.local.probes import http_ready, redis_ready
from infra.local.process import ProcessSpec, running
from infra.local.redis import redis_spec
from infra.two_hosts import LINK_DEVICE, UCX_ENV, Host, TwoHosts, two_hosts, why_unavailable
from shared.blocks import PAGE_TOKENS
from shared.kv.layout import KvLayout
from shared.text.tokeniser import Tokeniser

MAX_RATIO = 1.25
"""Of the bound: "within 25%"."""

FRAME_BYTES, FRAME_PAYLOAD_BYTES = 1514, 1448
"""Of a full TCP segment on Ethernet; the link's limit counts the first."""

NATIVE = "native"
TENANTS = (NATIVE, "int8", "int4")
"""The edge's tenants are named after the most lossy form that ingest allows them."""

TENANT_HEADER = "x-baton-tenant"
NUM_PAGES = 512
REQUEST_TIMEOUT_S = 120.0
SERVICE = {service.name: service for service in SERVICES}
KV_METRICS = ("baton_kv_pull", "baton_kv_transfers", "baton_kv_wire", "baton_local_prefills")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run.

    Attributes:
        prompt_tokens: length of each prompt.
        requests: measured ones of each kind over each link; one more of each goes before them.
        factors: native KV's time on the link over the prefill's, by the lossy form that is allowed there.
    """

    model: Path
    dtype: str
    prompt_tokens: int
    requests: int
    factors: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request took.

    Attributes:
        first_s, last_s: from its sending to its first and last token.
        wire_bytes: what the prefill worker's host put on the link meanwhile, headers included.
        wire_format: in which its KV came, as the answer's usage says.
    """

    first_s: float
    last_s: float
    wire_bytes: int
    wire_format: str


def kv_bytes(config: Mapping[str, Any], dtype: str, num_tokens: int) -> int:
    """Native bytes of the pages of a prompt, by the model's config.json."""
    heads = config["num_attention_heads"]
    layout = KvLayout(
        model_fingerprint="",
        num_layers=config["num_hidden_layers"],
        num_kv_heads=config.get("num_key_value_heads", heads),
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        dtype=dtype,
    )
    return math.ceil(num_tokens / PAGE_TOKENS) * layout.page_bytes


def link_rate(num_bytes: int, seconds: float) -> float:
    """Bits per second of a link on which a TCP stream of so many bytes takes so long."""
    return num_bytes * 8 / seconds * FRAME_BYTES / FRAME_PAYLOAD_BYTES


def median_of(answers: Sequence[Answer], value: Callable[[Answer], float]) -> float:
    """Of all but the first, which brings what happens once; rounded to milliseconds."""
    return round(statistics.median(value(answer) for answer in answers[1:]), 3)


def times_of(answers: Sequence[Answer], native_bytes: int, bound_s: float) -> dict[str, Any]:
    """What a report says of requests of two tokens of one kind."""
    second_s = median_of(answers, lambda answer: answer.last_s)
    wire_bytes = median_of(answers, lambda answer: answer.wire_bytes)
    return {
        "ratio_to_bound": round(second_s / bound_s, 3),
        "second_token_s": second_s,
        "first_token_s": median_of(answers, lambda answer: answer.first_s),
        "first_to_second_s": median_of(answers, lambda answer: answer.last_s - answer.first_s),
        "second_token_each_s": [round(answer.last_s, 3) for answer in answers[1:]],
        "wire_bytes": round(wire_bytes),
        "wire_share_of_native": round(wire_bytes / native_bytes, 3),
        "wire_formats": [answer.wire_format for answer in answers[1:]],
        "first_request_second_token_s": round(answers[0].last_s, 3),
    }


def problems(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """What does not hold, in words."""
    found: list[str] = []
    for case in cases:
        lossy = case["max_loss"]
        if NATIVE in case[lossy]["wire_formats"]:
            found.append(f"{lossy} was allowed at {case['factor']} times the prefill and not always used")
        if case[lossy]["ratio_to_bound"] > MAX_RATIO:
            found.append(f"{lossy}: the second token takes {case[lossy]['ratio_to_bound']} times the bound")
    return found


def listening_on(spec: ProcessSpec, address: str, is_ready: Any, *words: str, **env: str) -> ProcessSpec:
    """The same process, told to listen elsewhere by further words of its command or by its environment."""
    return replace(spec, command=(*spec.command, *words), address=address, is_ready=is_ready, env={**spec.env, **env})


def kafka_on(data_dir: Path, ports: PortPicker, host: str) -> ProcessSpec:
    """Kafka, for clients on other hosts."""
    port, controller_port = ports.pick(), ports.pick()
    listener = f"PLAINTEXT://{host}:{port}"
    return listening_on(
        kafka_spec(data_dir, port, controller_port),
        f"{host}:{port}",
        partial(kafka_ready, host, port),
        *("--override", f"listeners={listener},CONTROLLER://{HOST}:{controller_port}"),
        *("--override", f"advertised.listeners={listener}"),
    )


def redis_on(data_dir: Path, ports: PortPicker, host: str) -> ProcessSpec:
    """Redis, for clients on other hosts; without a password, which is why it listens on `host` alone."""
    port = ports.pick()
    return listening_on(
        redis_spec(data_dir, port),
        f"redis://{host}:{port}/0",
        partial(redis_ready, host, port),
        *("--bind", host, "--protected-mode", "no"),
    )


def worker_in(host: Host, spec: ProcessSpec, http_port: int) -> ProcessSpec:
    """A worker inside `host`, whose KV takes the link and all else the way past it."""
    inside = replace(spec, command=host.command(*spec.command))
    return listening_on(
        inside,
        f"http://{host.way_address}:{http_port}",
        partial(http_ready, host.way_address, http_port),
        BATON_HTTP_HOST=host.way_address,
        BATON_TRANSFER_HOST=host.address,
        BATON_TRANSFER_NET_DEVICES=LINK_DEVICE,
        **UCX_ENV,
    )


class Serving:
    """The stack, whose workers come and go."""

    def __init__(self, plan: Plan, hosts: TwoHosts, run_dir: Path, http: httpx.AsyncClient, rng: random.Random) -> None:
        self.hosts = hosts
        self.edge = ""
        self._plan = plan
        self._prompts = iter(prompts_of(plan))
        self._logs = run_dir / "logs"
        self._data = run_dir / "data"
        self._http = http
        self._ports = PortPicker(rng)
        self._kafka = self._redis = ""
        self._composition = Composition(
            counts={},
            model=str(plan.model),
            dtype=plan.dtype,
            num_pages=NUM_PAGES,
            env={
                "BATON_TENANT_MAX_WIRE_LOSS": json.dumps({name: name for name in TENANTS}),
                "BATON_DRAIN_S": "0.3",
                **HAND_OVER_ALWAYS,
                # Native KV over the slowest link takes longer than a request should.
                "BATON_PULL_TIMEOUT_S": str(REQUEST_TIMEOUT_S),
                "BATON_HOLD_S": str(REQUEST_TIMEOUT_S),
            },
        )

    @asynccontextmanager
    async def standing(self) -> AsyncIterator[None]:
        """All but the workers."""
        async with AsyncExitStack() as stack:
            kafka = kafka_on(self._data / "kafka", self._ports, self.hosts.machine)
            redis = redis_on(self._data / "redis", self._ports, self.hosts.machine)
            for spec in (kafka, redis):
                await stack.enter_async_context(self._running(spec))
            self._kafka, self._redis = kafka.address, redis.address
            await create_topics(kafka.address)
            ingest, edge = (self._spec(name)[0] for name in ("ingest", "edge"))
            for spec in (ingest, edge):
                await stack.enter_async_context(self._running(spec))
            self.edge = edge.address
            yield

    @asynccontextmanager
    async def worker(self, service: str, host: Host) -> AsyncIterator[str]:
        """A worker in `host`; gives its HTTP address."""
        spec = worker_in(host, *self._spec(service))
        async with self._running(spec):
            yield spec.address

    async def ask(self, num_tokens: int, tenant: str = NATIVE) -> Answer:
        """One greedy answer to the next prompt, streamed. Raises RuntimeError where it is not `num_tokens` long."""
        body = {"model": self._plan.model.name, "prompt": next(self._prompts), "max_tokens": num_tokens}
        body |= {"temperature": 0, "ignore_eos": True, "logprobs": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        sent = self.hosts.link.sent_bytes(self.hosts.a)
        began_s = time.monotonic()
        came_s: list[float] = []
        wire_format = NATIVE
        url, headers = f"{self.edge}/v1/completions", {TENANT_HEADER: tenant}
        async with self._http.stream("POST", url, json=body, headers=headers) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                event = event_of(line)
                came_s += [time.monotonic() - began_s] * tokens_in(event)
                wire_format = wire_format_of(event) or wire_format
        if len(came_s) != num_tokens:
            raise RuntimeError(f"an answer had {len(came_s)} tokens, not {num_tokens}")
        wire_bytes = self.hosts.link.sent_bytes(self.hosts.a) - sent
        answer = Answer(came_s[0], came_s[-1], wire_bytes, wire_format)
        _say(f"  {tenant}, {num_tokens} tokens: {answer}")
        return answer

    async def kv_metrics(self, decode: str) -> dict[str, float]:
        """What the decode worker says of its pulls, by name and labels."""
        answer = await self._http.get(f"{decode}/metrics")
        answer.raise_for_status()
        return {
            " ".join((sample.name, *(f"{k}={v}" for k, v in sample.labels.items() if k != "model_name"))): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
            if sample.name.startswith(KV_METRICS) and not sample.name.endswith(("_bucket", "_created"))
        }

    def _spec(self, service: str) -> tuple[ProcessSpec, int]:
        port = self._ports.pick()
        spec = service_spec(
            SERVICE[service], 0, self._composition, kafka_address=self._kafka, redis_url=self._redis, http_port=port
        )
        return spec, port

    def _running(self, spec: ProcessSpec) -> Any:
        return running(spec, self._logs / f"{spec.name}.log")


def event_of(line: str) -> Mapping[str, Any]:
    """The data in one line of an event stream; empty where it has none."""
    name, _, data = line.partition(": ")
    return json.loads(data) if name == "data" and data != "[DONE]" else {}


def tokens_in(event: Mapping[str, Any]) -> int:
    """Tokens in an event of a completion with logprobs."""
    return sum(len(choice["logprobs"]["tokens"]) for choice in event.get("choices", ()) if choice.get("logprobs"))


def wire_format_of(event: Mapping[str, Any]) -> str | None:
    """The lossy form that an event with usage names, if there is one."""
    return ((event.get("usage") or {}).get("prompt_tokens_details") or {}).get("kv_wire_format")


async def measure(plan: Plan, run_dir: Path, rng: random.Random) -> dict[str, Any]:
    """All links, as one report."""
    native_bytes = kv_bytes(json.loads((plan.model / "config.json").read_text()), plan.dtype, plan.prompt_tokens)
    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S) as http:
        with two_hosts(rng) as hosts:
            serving = Serving(plan, hosts, run_dir, http, rng)
            async with serving.standing(), serving.worker("prefill", hosts.a):
                async with serving.worker("decode", hosts.b):
                    unlimited = [await serving.ask(2) for _ in range(1 + plan.requests)]
                    gap_s = median_of(unlimited, lambda answer: answer.last_s - answer.first_s)
                    prefill_s = await prefill_time(serving, plan)
                cases: list[dict[str, Any]] = []
                for lossy, factor in plan.factors.items():
                    bits_per_s = link_rate(native_bytes, factor * prefill_s)
                    _say(f"a link of {bits_per_s / 1e6:.1f} Mb/s")
                    hosts.link.limit(bits_per_s)
                    async with serving.worker("decode", hosts.b) as decode:
                        measured = await over_link(serving, plan, lossy, native_bytes, gap_s)
                        metrics = await serving.kv_metrics(decode)
                        cases.append(
                            {"factor": factor, "max_loss": lossy, "link_mbit_per_s": round(bits_per_s / 1e6, 1)}
                            | {"prefill_s": prefill_s, **measured, "decode_metrics": metrics}
                        )
                        prefill_s = await prefill_time(serving, plan)
    return {
        "problems": problems(cases),
        "prompt_tokens": plan.prompt_tokens,
        "requests": plan.requests,
        "dtype": plan.dtype,
        "native_kv_bytes": native_bytes,
        "unlimited_first_to_second_s": gap_s,
        "cases": cases,
        "machine": machine("cpu"),
        "date": time.strftime("%Y-%m-%d"),
    }


def prompts_of(plan: Plan) -> Iterator[list[int]]:
    """As many as will be asked for, no two of which begin alike."""
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in TEXTS)
    number = (1 + plan.requests) * (2 + 4 * len(plan.factors))
    return iter(cut_prompts(list(Tokeniser.load(plan.model).encode(text)), [plan.prompt_tokens] * number))


async def prefill_time(serving: Serving, plan: Plan) -> float:
    """Seconds to the first token of a prompt whose KV stays where it is."""
    return median_of([await serving.ask(1) for _ in range(1 + plan.requests)], lambda answer: answer.first_s)


async def over_link(serving: Serving, plan: Plan, lossy: str, native_bytes: int, gap_s: float) -> dict[str, Any]:
    """Requests of one token, native and lossy in turns, beside their bound."""
    alone: list[Answer] = []
    answers: dict[str, list[Answer]] = {NATIVE: [], lossy: []}
    for _ in range(1 + plan.requests):
        alone.append(await serving.ask(1))
        for tenant, each in answers.items():
            each.append(await serving.ask(2, tenant))
    bound_s = round(median_of(alone, lambda answer: answer.first_s) + gap_s, 3)
    return {"bound_s": bound_s} | {tenant: times_of(each, native_bytes, bound_s) for tenant, each in answers.items()}


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def main(
    *,
    prompt_tokens: Annotated[int, typer.Option(help="Length of each prompt.")] = 1536,
    requests: Annotated[int, typer.Option(help="Measured requests of each kind.")] = 3,
    dtype: Annotated[str, typer.Option(help="Of weights and KV: bfloat16 or float32.")] = "bfloat16",
    out: Annotated[str, typer.Option(help="Write the report to this file too.")] = "",
) -> None:
    """Measure second tokens over links on which native KV takes 1.5 and 3 times the prefill."""
    if reason := why_unavailable():
        _say(reason)
        sys.exit(2)
    plan = Plan(
        model=smollm2_folder(),
        dtype=dtype,
        prompt_tokens=prompt_tokens,
        requests=requests,
        factors={"int8": 1.5, "int4": 3.0},
    )
    with tempfile.TemporaryDirectory() as run_dir:
        report = json.dumps(asyncio.run(measure(plan, Path(run_dir), random.Random())), indent=1)
    sys.stdout.write(report + "\n")
    if out:
        Path(out).write_text(report + "\n")
    sys.exit(1 if json.loads(report)["problems"] else 0)


if __name__ == "__main__":
    typer.run(main)
