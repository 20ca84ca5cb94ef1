"""Sends jobs and watches their answers: the port for transports, and HTTP with server-sent events."""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx
import orjson

from loadgen.jobs import CHAT_COMPLETIONS, Job
from shared.errors import StartupError
from shared.request import Event

MAX_DETAIL_CHARS = 300
"""What is kept of a server's error text."""

MAX_LABEL_CHARS = 48


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds by two clocks: one that never jumps, and unix time."""

    monotonic: Callable[[], float]
    unix: Callable[[], float]


@dataclass(slots=True)
class Observation:
    """What is seen of one request while it runs; all times are seconds of the monotonic clock.

    Attributes:
        sent_s: just before its first byte left.
        first_token_s, last_token_s: of the first and last piece of the answer that held tokens.
        answered_s: when its last token was here.
        gaps_s: between successive pieces, where the transport sees pieces.
        prompt_tokens, output_tokens, cached_tokens: by the server's count.
        stamps: the server's own, in unix seconds.
        duplicated: tokens, an end or a result came a second time and not as a mere copy.
    """

    sent_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    answered_s: float | None = None
    gaps_s: list[float] = field(default_factory=list[float])
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    stamps: dict[Event, float] = field(default_factory=dict[Event, float])
    duplicated: bool = False

    def heard_tokens(self, now_s: float) -> None:
        """A piece of the answer with tokens in it came at `now_s`."""
        if self.last_token_s is None:
            self.first_token_s = now_s
        else:
            self.gaps_s.append(now_s - self.last_token_s)
        self.last_token_s = self.answered_s = now_s

    def heard_usage(self, usage: Mapping[str, Any]) -> None:
        """Takes the token counts of an OpenAI `usage` object."""
        self.prompt_tokens = _count(usage.get("prompt_tokens"))
        self.output_tokens = _count(usage.get("completion_tokens"))
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict):
            self.cached_tokens = _count(details.get("cached_tokens"))

    def heard_stamps(self, timings: object) -> None:
        """Takes the server's stamps, {event: unix seconds}; names that are no event of ours are left out."""
        if not isinstance(timings, dict):
            return
        for event in Event:
            at = timings.get(event.value)
            if isinstance(at, int | float):
                self.stamps[event] = float(at)


class ExchangeFailed(Exception):
    """The request has no right answer.

    Attributes:
        label: names the kind of failure; failures are counted by it.
        detail: what the server or the library said.
    """

    def __init__(self, label: str, detail: str) -> None:
        super().__init__(f"{label}: {detail}")
        self.label = label
        self.detail = detail[:MAX_DETAIL_CHARS]


class Transport(Protocol):
    """Brings one job to the server and waits for its whole answer."""

    async def exchange(self, job: Job, seen: Observation) -> None:
        """Writes all it sees into `seen` at once, so that a cancelled exchange leaves what was seen before.

        Raises ExchangeFailed if the server refuses, breaks off or answers what cannot be read.
        """
        ...


def error_label(error: Mapping[str, Any]) -> str:
    """`error_<code or type>` of an OpenAI error object, bounded and free of odd characters."""
    name = str(error.get("code") or error.get("type") or "unnamed")
    clean = "".join(char if char.isalnum() or char in "_-" else "_" for char in name)
    return f"error_{clean[:MAX_LABEL_CHARS]}"


@dataclass(frozen=True, slots=True)
class SseEvent:
    """One server-sent event."""

    id: str | None
    data: bytes


class SseParser:
    """Cuts a byte stream into server-sent events; bytes may be split anywhere."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._id: str | None = None

    def feed(self, piece: bytes) -> Iterator[SseEvent]:
        """Events that `piece` completes."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for raw_line in lines:
            line = raw_line.removesuffix(b"\r")
            if not line:
                if self._data:
                    yield SseEvent(self._id, b"\n".join(self._data))
                self._data, self._id = [], None
                continue
            name, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if name == b"data":
                self._data.append(value)
            elif name == b"id":
                self._id = value.decode("utf-8", "replace")


class StreamReader:
    """Reads the chunks of one streamed completion into an observation."""

    def __init__(self, seen: Observation, *, is_chat: bool) -> None:
        self._seen = seen
        self._is_chat = is_chat
        self._ids: set[str] = set()
        self._done = False

    def read(self, event: SseEvent, now_s: float) -> None:
        """Takes one event that came at `now_s`. Raises ExchangeFailed for an error or what is no chunk."""
        if event.data == b"[DONE]":
            self._done = True
            return
        if event.id is not None:
            self._seen.duplicated |= event.id in self._ids
            self._ids.add(event.id)
        chunk = _object(event.data)
        if "error" in chunk:
            error = chunk["error"] if isinstance(chunk["error"], dict) else {"message": chunk["error"]}
            raise ExchangeFailed(error_label(error), str(error.get("message", "")))
        for choice in chunk.get("choices") or ():
            self._read_choice(choice, now_s)
        if isinstance(chunk.get("usage"), dict):
            self._seen.heard_usage(chunk["usage"])
        if isinstance(chunk.get("baton"), dict):
            self._seen.heard_stamps(chunk["baton"].get("timings"))

    def close(self) -> None:
        """The stream has ended. Raises ExchangeFailed if that was too early."""
        if self._seen.finish_reason is None or not self._done:
            raise ExchangeFailed("disconnect", "the stream ended before its finish reason and [DONE]")

    def _read_choice(self, choice: Mapping[str, Any], now_s: float) -> None:
        seen = self._seen
        text = (choice.get("delta") or {}).get("content") if self._is_chat else choice.get("text")
        reason = choice.get("finish_reason")
        # A completions chunk without text still holds a token (half a character, say); a chat's empty one is its role.
        holds_token = bool(text) or (not self._is_chat and reason is None)
        if holds_token and seen.finish_reason is not None:
            seen.duplicated = True
        if holds_token or (reason is not None and seen.last_token_s is None):
            seen.heard_tokens(now_s)
        if reason is not None:
            seen.duplicated |= seen.finish_reason is not None
            seen.finish_reason = str(reason)


class HttpTransport:
    """One HTTP connection for each request under way, as many as the schedule brings about."""

    def __init__(self, http: httpx.AsyncClient, endpoint: str, headers: Mapping[str, str], clock: Clock) -> None:
        self._http = http
        self._endpoint = endpoint
        self._headers = {**headers, "content-type": "application/json"}
        self._is_chat = endpoint == CHAT_COMPLETIONS
        self._clock = clock

    async def exchange(self, job: Job, seen: Observation) -> None:
        headers = {**self._headers, "x-request-id": job.request_id}
        seen.sent_s = self._clock.monotonic()
        try:
            async with self._http.stream("POST", self._endpoint, content=job.body, headers=headers) as response:
                if response.status_code != httpx.codes.OK:
                    text = (await response.aread()).decode("utf-8", "replace")
                    raise ExchangeFailed(f"http_{response.status_code}", text)
                await self._read(response, seen)
        except httpx.ConnectError as error:
            raise ExchangeFailed("connect", str(error)) from error
        except httpx.HTTPError as error:
            raise ExchangeFailed("disconnect", f"{type(error).__name__}: {error}") from error

    async def _read(self, response: httpx.Response, seen: Observation) -> None:
        parser = SseParser()
        reader = StreamReader(seen, is_chat=self._is_chat)
        async for piece in response.aiter_raw():
            now_s = self._clock.monotonic()
            for event in parser.feed(piece):
                reader.read(event, now_s)
        reader.close()


@asynccontextmanager
async def open_http(base_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client without limits of its own; waiting is bounded per job.

    Proxies of the environment are left out: a proxy's latency would be reported as the server's.
    """
    # Idle connections go sooner than common servers close theirs (5 s): a request on one that closes fails.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0)
    headers = {"accept": "text/event-stream", "accept-encoding": "identity"}
    async with httpx.AsyncClient(
        base_url=base_url,
        timeout=None,  # noqa: S113 - see above
        limits=limits,
        headers=headers,
        trust_env=False,
    ) as http:
        yield http


async def first_model(http: httpx.AsyncClient, timeout_s: float = 10.0) -> str:
    """The id of the first model that the server lists. Raises StartupError if there is none to be had."""
    try:
        answer = await http.get("/v1/models", timeout=timeout_s, headers={"accept": "application/json"})
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise StartupError(
            f"{http.base_url} names no model under /v1/models ({type(error).__name__}: {error}); "
            "is the server up? --model skips the question"
        ) from error


def _object(data: bytes) -> dict[str, Any]:
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ExchangeFailed("malformed", f"no JSON in a stream event: {error}") from error
    if not isinstance(chunk, dict):
        raise ExchangeFailed("malformed", "a stream event is no JSON object")
    return chunk


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
