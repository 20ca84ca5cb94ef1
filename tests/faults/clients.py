"""A load of clients as people would write them, and what each of them saw.

They come by a clock of their own (open loop), whatever the system does. A stream that breaks, or is silent for too
long, is resumed at any edge behind its last event; a request with a key is asked for again; 429 and 503 are waited out.
"""

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shared.bus.port import BusUnavailable, Producer
from shared.request import RequestId, partition_of
from shared.wire.to_ingest import HEADER_DEADLINE, HEADER_TENANT
from shared.wire.topics import INGEST
from tests.faults.capture import Attempt, Capture, Manner, Outcome, Received
from tests.faults.plain_http import Answer, Broken, NotConnected, exchange

MAX_FIRST_WORDS = 8
"""Prompts begin alike in so many ways, so that prefixes are shared."""

RETRY_S = 0.3
"""Between two attempts, about."""

SHOWN_SILENCE_S = 1.0
"""A silence that is longer is put down."""

END_SLACK_S = 30.0
"""A client gives up so long after its deadline: by then everything must have its end."""


@dataclass(frozen=True, slots=True)
class Want:
    """One request that somebody is going to make.

    Attributes:
        at_s: seconds from the load's begin.
        key: an idempotency key, if the client uses one.
        delete_after, leave_after: events after which it asks to cancel, or hangs up for good; None: never.
    """

    name: str
    at_s: float
    manner: Manner
    path: str
    body: Mapping[str, Any]
    timeout_s: float
    tenant: str = "default"
    key: str | None = None
    delete_after: int | None = None
    leave_after: int | None = None


@dataclass(frozen=True, slots=True)
class Mix:
    """How likely what is; the rest are plain streams.

    Attributes:
        rate_per_s: requests a second, at random moments.
        max_tokens: (least, most) of an answer, evenly.
        prompt_tokens: (least, most) of a prompt, evenly.
        timeout_s: of requests without a tight deadline.
        tight_s: (least, most) of a tight one.
    """

    model: str
    rate_per_s: float
    max_tokens: tuple[int, int] = (2, 60)
    prompt_tokens: tuple[int, int] = (3, 200)
    timeout_s: float = 120.0
    tight_s: tuple[float, float] = (0.2, 1.5)
    whole: float = 0.15
    jobs: float = 0.15
    keyed: float = 0.3
    deletes: float = 0.06
    leaves: float = 0.06
    tight: float = 0.05
    two_choices: float = 0.1
    logprobs: float = 0.15
    stops: float = 0.2
    drawn: float = 0.3
    chats: float = 0.3
    tenants: tuple[str, ...] = ("default",)


def draw_wants(mix: Mix, seed: int, *, run: str = "") -> Iterator[Want]:
    """Without end; the same for the same seed. `run` makes the keys and job ids of this run its own."""
    rng = random.Random(f"wants {seed}")
    at_s = 0.0
    number = 0
    while True:
        at_s += rng.expovariate(mix.rate_per_s)
        yield _draw_want(mix, rng, f"{run}c{seed}-{number}", at_s)
        number += 1


def _draw_want(mix: Mix, rng: random.Random, name: str, at_s: float) -> Want:
    draw = rng.random()
    manner = Manner.WHOLE if draw < mix.whole else Manner.JOB if draw < mix.whole + mix.jobs else Manner.STREAM
    chat = rng.random() < mix.chats
    body = {"model": mix.model, "user": name, **_prompt(mix, rng, chat=chat), **_options(mix, rng, chat=chat)}
    if manner is Manner.STREAM:
        body["stream"] = True
        if rng.random() < 0.3:
            body["stream_options"] = {"include_usage": True}
    # A whole answer without a key is lost to its client with the edge: few people would write that.
    keyed = manner is not Manner.JOB and (rng.random() < mix.keyed or (manner is Manner.WHOLE and rng.random() < 0.7))
    ending = rng.random() if manner is Manner.STREAM else 1.0
    after = rng.randrange(1, 12)
    return Want(
        name,
        at_s,
        manner,
        "/v1/chat/completions" if chat else "/v1/completions",
        body,
        rng.uniform(*mix.tight_s) if rng.random() < mix.tight else mix.timeout_s,
        tenant=rng.choice(mix.tenants),
        key=f"key of {name}" if keyed else None,
        delete_after=after if ending < mix.deletes else None,
        leave_after=after if mix.deletes <= ending < mix.deletes + mix.leaves else None,
    )


def _prompt(mix: Mix, rng: random.Random, *, chat: bool) -> dict[str, Any]:
    num_tokens = rng.randint(*mix.prompt_tokens)
    first = rng.randrange(MAX_FIRST_WORDS)
    if not chat and rng.random() < 0.5:
        start = 300 + 10 * first
        return {"prompt": [start + k % 7 for k in range(num_tokens - 1)] + [rng.randrange(300, 990)]}
    text = (f"story {first} " * num_tokens)[:num_tokens] + str(rng.randrange(1000))  # a byte is a token
    return {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}


def _options(mix: Mix, rng: random.Random, *, chat: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"max_tokens": rng.randint(*mix.max_tokens), "temperature": 0, "ignore_eos": True}
    if rng.random() < mix.drawn:
        options |= {"temperature": 0.8, "top_p": 0.9}
        if rng.random() < 0.5:
            options["seed"] = rng.randrange(1000)
    if rng.random() < mix.two_choices:
        options["n"] = 2
    if rng.random() < mix.logprobs:
        num = rng.randrange(3)
        options |= {"logprobs": True, "top_logprobs": num} if chat else {"logprobs": num}
    if rng.random() < mix.stops:
        options |= {"stop": [f" {rng.randrange(30, 99)}", "q"], "ignore_eos": rng.random() < 0.5}
        if rng.random() < 0.3:
            options |= {"stop_token_ids": [rng.randrange(300, 990) for _ in range(8)]}
        if rng.random() < 0.3:
            options["min_tokens"] = rng.randint(0, options["max_tokens"])
    return options


@dataclass(slots=True)
class Clients:
    """What clients share.

    Args:
        edges: addresses, "http://host:port".
        producer: for jobs; None where there are none.
        rng: picks edges and jitter.
        silence_s: a stream that is silent for longer is resumed elsewhere: a few keep-alives.
        whole_patience_s: so long a client with a key waits for a whole answer before it asks again elsewhere.
        headers: of every request, as an API key.
        waits_out_refusals: 429 and 503 are waited out, else the client is gone.
        longest_wait_s: who is told to come back later than this comes back about then.
    """

    edges: Sequence[str]
    producer: Producer | None
    rng: random.Random
    silence_s: float = 5.0
    whole_patience_s: float = 15.0
    headers: Mapping[str, str] = field(default_factory=dict)
    waits_out_refusals: bool = True
    longest_wait_s: float = math.inf
    clock_s: Callable[[], float] = time.time
    captures: list[Capture] = field(default_factory=list)

    async def run_all(self, wants: Iterable[Want], until_s: float) -> None:
        """Make the requests that are wanted within `until_s` seconds, each at its time, and wait for all outcomes."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        async with asyncio.TaskGroup() as tasks:
            for want in wants:
                if want.at_s > until_s:
                    break
                await asyncio.sleep(began_s + want.at_s - loop.time())
                tasks.create_task(self.run(want))

    async def run(self, want: Want) -> Capture:
        """Make one request and stay with it to its end."""
        capture = Capture(want.name, want.manner, self.clock_s(), want.timeout_s, tenant=want.tenant, key=want.key)
        self.captures.append(capture)
        if want.manner is Manner.JOB:
            await self._submit(want, capture)
        else:
            await _Exchanges(self, want, capture).run()
        capture.ended_s = self.clock_s()
        return capture

    async def _submit(self, want: Want, capture: Capture) -> None:
        assert self.producer is not None
        request_id = RequestId(f"job-{want.name}")
        capture.request_id = request_id
        deadline_ms = int((capture.sent_s + want.timeout_s) * 1000)
        headers = ((HEADER_TENANT, want.tenant.encode()), (HEADER_DEADLINE, str(deadline_ms).encode()))
        attempt = Attempt(capture.sent_s, "job", "")
        capture.attempts.append(attempt)
        try:
            await self.producer.send(
                INGEST.name, partition_of(request_id), _bytes_of(want.body), key=request_id.encode(), headers=headers
            )
            capture.outcome = Outcome.SENT
        except BusUnavailable:
            capture.outcome = Outcome.LOST_TRACK
        attempt.until_s = self.clock_s()


class _Over(Exception):
    """The request has its outcome."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class _Exchanges:
    """One request's connections, one after the other."""

    def __init__(self, clients: Clients, want: Want, capture: Capture) -> None:
        self._clients = clients
        self._want = want
        self._capture = capture
        self._body = _bytes_of(want.body)
        self._edge = ""
        self._heard_s = capture.sent_s
        self._deleting: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Go on until there is an outcome."""
        capture, clients = self._capture, self._clients
        give_up_s = capture.sent_s + self._want.timeout_s + END_SLACK_S
        try:
            while clients.clock_s() < give_up_s:
                self._edge = clients.rng.choice([edge for edge in clients.edges if edge != self._edge] or clients.edges)
                try:
                    # A stream that is kept alive and comes to no end has none.
                    async with asyncio.timeout(give_up_s - clients.clock_s()):
                        await self._attempt()
                except TimeoutError:
                    break
                except Broken as broken:
                    if not isinstance(broken, NotConnected):
                        self._may_ask_again()
                    await asyncio.sleep(RETRY_S * (0.5 + clients.rng.random()))
            was_refused = capture.request_id is None and capture.status in (429, 503)
            capture.outcome = Outcome.REFUSED if was_refused else Outcome.NO_END
        except _Over as over:
            capture.outcome = over.outcome
        finally:
            self._hear()
            if self._deleting is not None:
                await self._deleting

    def _may_ask_again(self) -> None:
        """Without an id or a key nobody can ask for what was sent: raises _Over."""
        if self._capture.request_id is None and self._want.key is None:
            raise _Over(Outcome.LOST_TRACK)

    async def _attempt(self) -> None:
        """One connection: it ends in an outcome (_Over), a break (Broken), or a refusal that was waited out."""
        want, capture = self._want, self._capture
        headers = self._headers()
        resumes = want.manner is Manner.STREAM and capture.request_id is not None
        if resumes and capture.events:
            headers["last-event-id"] = capture.events[-1].id
        if resumes and (not capture.events or self._clients.rng.random() < 0.7):
            method, path, body = "GET", f"/v1/requests/{capture.request_id}/events", b""
        else:
            method, path, body = "POST", want.path, self._body
            headers["x-baton-timeout-s"] = f"{want.timeout_s:.3f}"
            if want.key is not None:
                headers["idempotency-key"] = want.key
        waits_s = self._clients.silence_s
        if want.manner is Manner.WHOLE:
            waits_s = self._clients.whole_patience_s if want.key is not None else want.timeout_s + END_SLACK_S
        attempt = Attempt(self._clients.clock_s(), "resume" if resumes else "post", self._edge)
        capture.attempts.append(attempt)
        try:
            async with exchange(self._edge, method, path, headers=headers, body=body, silence_s=waits_s) as answer:
                attempt.status = answer.status
                self._hear()
                await self._take(answer, is_resume=resumes)
        finally:
            attempt.until_s = self._clients.clock_s()

    def _headers(self) -> dict[str, str]:
        tenant = {} if self._want.tenant == "default" else {"x-baton-tenant": self._want.tenant}
        return {**self._clients.headers, **tenant}

    async def _take(self, answer: Answer, *, is_resume: bool) -> None:
        capture = self._capture
        capture.status = answer.status
        if answer.status == 200:
            capture.request_id = answer.headers.get("x-request-id", capture.request_id)
            if self._want.manner is Manner.STREAM:
                capture.num_resumes += is_resume
                await self._take_events(answer)
            else:
                capture.answer = (await answer.body()).decode()
                raise _Over(Outcome.DONE)
            return
        body = await answer.body()
        if answer.status in (429, 503) and "x-request-id" not in answer.headers:
            capture.retry_after_s = float(answer.headers.get("retry-after", "1"))
            if capture.request_id is None and not self._clients.waits_out_refusals:
                raise _Over(Outcome.REFUSED)
            wait_s = min(capture.retry_after_s, self._clients.longest_wait_s)
            await asyncio.sleep(wait_s * (1 + self._clients.rng.random()))
            return
        capture.request_id = answer.headers.get("x-request-id", capture.request_id)
        capture.answer = body.decode("utf-8", "replace")
        raise _Over(Outcome.UNKNOWN if answer.status == 404 else Outcome.ERROR)

    async def _take_events(self, answer: Answer) -> None:
        """Returns (as Broken) only where the stream breaks off."""
        async for event_id, data in events_of(answer, self._hear):
            if data == "[DONE]":
                raise _Over(Outcome.DONE)
            self._capture.events.append(Received(self._clients.clock_s(), event_id, data))
            self._act_on_event(data)
        raise Broken("the stream has no end")

    def _act_on_event(self, data: str) -> None:
        capture, want, num_events = self._capture, self._want, len(self._capture.events)
        if data.startswith('{"error":'):
            raise _Over(Outcome.ERROR)
        if want.leave_after is not None and num_events >= want.leave_after:
            capture.left_s = self._clients.clock_s()
            raise _Over(Outcome.LEFT)
        if want.delete_after is not None and num_events >= want.delete_after and self._deleting is None:
            self._deleting = asyncio.create_task(self._delete())

    async def _delete(self) -> None:
        """Ask to cancel until some edge says what became of it."""
        capture, clients = self._capture, self._clients
        capture.delete_asked_s = clients.clock_s()
        give_up_s = capture.sent_s + self._want.timeout_s + END_SLACK_S
        while clients.clock_s() < give_up_s:
            attempt = Attempt(clients.clock_s(), "delete", clients.rng.choice(clients.edges))
            capture.attempts.append(attempt)
            try:
                async with exchange(
                    attempt.edge,
                    "DELETE",
                    f"/v1/requests/{capture.request_id}",
                    headers=self._headers(),
                    silence_s=clients.whole_patience_s,
                ) as answer:
                    attempt.status = answer.status
                    await answer.body()
                if attempt.status not in (429, 503):
                    return
            except Broken:
                pass
            finally:
                attempt.until_s = clients.clock_s()
            await asyncio.sleep(RETRY_S)

    def _hear(self) -> None:
        now_s = self._clients.clock_s()
        if now_s - self._heard_s > SHOWN_SILENCE_S:
            self._capture.silences.append((self._heard_s, now_s))
        self._heard_s = now_s


async def events_of(answer: Answer, heard: Callable[[], None]) -> AsyncIterator[tuple[str, str]]:
    """(id, data) of each event of a stream; `heard` is told of every piece, comments included. Raises Broken."""
    rest = b""
    async for piece in answer.pieces():
        heard()
        *whole, rest = (rest + piece).split(b"\n\n")
        for event in whole:
            event_id, data = "", ""
            for line in event.decode().split("\n"):
                name, _, value = line.partition(": ")
                if name == "id":
                    event_id = value
                elif name == "data":
                    data = value
            if data:
                yield event_id, data


def _bytes_of(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body).encode()
