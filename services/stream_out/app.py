"""The edge's HTTP routes: OpenAI's, and our own for a request's events, state and end."""

import asyncio
import math
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from services.stream_out.openapi import openapi_document
from services.stream_out.requests import Requests, Submission
from services.stream_out.results import answer_of, error_json, error_of
from services.stream_out.service import StreamOut
from services.stream_out.sse import BEFORE_ALL, DONE, KEEP_ALIVE, MEDIA_TYPE, Cursor, format_event, parse_event_id
from services.stream_out.streams import Hold, Story
from services.stream_out.tenants import Caller
from shared.errors import (
    BodyTooLarge,
    BodyTooSlow,
    EdgeDraining,
    IdempotencyConflict,
    InvalidRequest,
    ModelNotFound,
    NotAuthenticated,
    Overloaded,
    RateLimited,
    RequestError,
    RequestNotFound,
    UnsupportedBody,
)
from shared.policy.limits import estimated_tokens
from shared.request import REQUEST_ID_PATTERN, Priority, RequestId
from shared.state.port import StateUnavailable
from shared.wire.openai import GenerationSpec, parse_body
from shared.wire.openai_answers import model_card, model_list
from shared.wire.to_ingest import MAX_IDEMPOTENCY_KEY_CHARS, NO_PRIORITY, TENANT_PATTERN, body_hash
from shared.wire.to_stream_out import ErrorBody
from shared.wire.topics import MAX_DEADLINE_S, NUM_SLOTS

TENANT_HEADER = "x-baton-tenant"
TIMEOUT_HEADER = "x-baton-timeout-s"
PRIORITY_HEADER = "x-baton-priority"

DEFAULT_TENANT = "default"

SINGLE_HEADERS = (
    "authorization",
    "idempotency-key",
    "last-event-id",
    TENANT_HEADER,
    TIMEOUT_HEADER,
    PRIORITY_HEADER,
)
"""Of two values one would win, and not everybody on the way would agree which."""

JSON_TYPE_PATTERN = re.compile(r'application/json\s*(;\s*charset="?utf-?8"?\s*)?', re.IGNORECASE)

MAX_SEND_BYTES = 64 * 1024
"""Events that a stream is behind by are sent together up to about this size."""

INTERNAL_ERROR = ErrorBody(
    "the request failed here; nothing was wrong with it", "server_error", 500, code="internal_error"
)

T = TypeVar("T")

Handler = Callable[[Request, Send], Awaitable[None]]


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


class Endpoint:
    """An ASGI app of one route: every failure becomes an answer in OpenAI's shape."""

    def __init__(self, name: str, handler: Handler, edge: StreamOut) -> None:
        self._name = name
        self._handler = handler
        self._metrics = edge.metrics
        self._logger = edge.logger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def counting_send(message: Any) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._metrics.http_answers.labels(self._name, message["status"]).inc()
            await send(message)

        try:
            await self._handler(Request(scope, receive, counting_send), counting_send)
        except RequestError as error:
            if begun:
                return  # the server cuts the connection, as below; the client goes on elsewhere
            await _error_answer(error, {})(scope, receive, counting_send)
        except (ClientGone, ClientDisconnect):
            self._metrics.clients_gone.inc()
        except Exception:
            self._logger.exception("route failed", route=self._name)
            if begun:
                raise  # the server cuts the connection: nothing else tells the client that its answer is not whole
            await _error_answer(INTERNAL_ERROR, {})(scope, receive, counting_send)


class Api:
    """The routes of one edge."""

    def __init__(self, edge: StreamOut, requests: Requests) -> None:
        self._edge = edge
        self._requests = requests
        self._settings = edge.settings
        self._started_s = int(edge.clock_s())

    def routes(self) -> list[BaseRoute]:
        """All but health and metrics, which every process has; the last one catches what is no route."""

        def route(path: str, method: str, handler: Handler) -> Route:
            endpoint: ASGIApp = Endpoint(f"{method} {path}", handler, self._edge)
            return Route(path, endpoint, methods=[method])

        return [
            route("/v1/chat/completions", "POST", self._chat_completions),
            route("/v1/completions", "POST", self._completions),
            route("/v1/models", "GET", self._models),
            route("/v1/models/{name:path}", "GET", self._model),
            route("/v1/requests/{id}", "GET", self._describe),
            route("/v1/requests/{id}", "DELETE", self._cancel),
            route("/v1/requests/{id}/events", "GET", self._events),
            route("/v1/requests/{id}/placement", "GET", self._placement),
            route("/openapi.json", "GET", self._openapi),
        ]

    async def _chat_completions(self, request: Request, send: Send) -> None:
        await self._generate(request, send, chat=True)

    async def _completions(self, request: Request, send: Send) -> None:
        await self._generate(request, send, chat=False)

    async def _generate(self, request: Request, send: Send, *, chat: bool) -> None:
        caller = self._caller(request)
        with self._edge.admission.client(caller.tenant, caller.limits):
            await self._generate_for(caller, request, send, chat=chat)

    async def _generate_for(self, caller: Caller, request: Request, send: Send, *, chat: bool) -> None:
        _check_headers(request)
        body = await _read_body(
            request, max_bytes=self._settings.max_body_bytes, timeout_s=self._settings.body_timeout_s
        )
        parsed = parse_body(body, chat=chat)
        self._edge.metrics.unknown_fields.inc(len(parsed.unknown_fields))
        caller.check_model(parsed.spec.model)
        event_id = request.headers.get("last-event-id")
        if event_id:
            await self._resume(caller, request, send, *parse_event_id(event_id), body=body)
            return
        submission = self._submission(caller, request, body, parsed.spec)

        async def answer() -> None:
            async with self._requests.submit(submission) as hold:
                if parsed.spec.stream:
                    await self._stream_from_the_beginning(hold, request, send)
                else:
                    await self._answer(hold, request, send)

        await unless_gone(request.receive, answer(), cut=self._edge.admission.cut)

    def _caller(self, request: Request) -> Caller:
        """Who sends the request. Raises NotAuthenticated, InvalidRequest."""
        tenant = request.headers.get(TENANT_HEADER)
        if self._edge.tenants is None:
            if tenant is not None and not TENANT_PATTERN.fullmatch(tenant):
                raise InvalidRequest(f"header {TENANT_HEADER} must match {TENANT_PATTERN.pattern}", param=TENANT_HEADER)
            return Caller(DEFAULT_TENANT if tenant is None else tenant)
        caller = self._edge.tenants.caller(request.headers.get("authorization"))
        if tenant is not None:
            raise InvalidRequest(f"header {TENANT_HEADER} is not taken here: the key says it", param=TENANT_HEADER)
        return caller

    def _submission(self, caller: Caller, request: Request, body: bytes, spec: GenerationSpec) -> Submission:
        key = request.headers.get("idempotency-key")
        if key is not None and not 1 <= len(key) <= MAX_IDEMPOTENCY_KEY_CHARS:
            raise InvalidRequest(
                f"header Idempotency-Key must have 1 to {MAX_IDEMPOTENCY_KEY_CHARS} characters", param="Idempotency-Key"
            )
        return Submission(
            body,
            caller=caller,
            num_choices=spec.n,
            num_tokens=estimated_tokens(len(body), spec.max_tokens, spec.n),
            max_new_tokens=spec.max_tokens,
            deadline_s=self._edge.clock_s() + self._timeout_s(request),
            priority=_priority(request, caller),
            idempotency_key=key,
            traceparent=request.headers.get("traceparent"),
        )

    def _timeout_s(self, request: Request) -> float:
        text = request.headers.get(TIMEOUT_HEADER)
        if text is None:
            return self._settings.default_timeout_s
        try:
            timeout_s = float(text)
        except ValueError:
            timeout_s = 0.0
        if not 0 < timeout_s <= MAX_DEADLINE_S:
            raise InvalidRequest(
                f"header {TIMEOUT_HEADER} must be seconds, above 0 and at most {MAX_DEADLINE_S}", param=TIMEOUT_HEADER
            )
        return timeout_s

    async def _answer(self, hold: Hold, request: Request, send: Send) -> None:
        story = await hold.wait(lambda story: story.finished)
        assert story.state is not None
        error = error_of(story.state)
        if error is not None:
            await _send(_error_answer(error, hold.headers), request, send)
            return
        await _send(_json(answer_of(story.state, self._edge.tokeniser), hold.headers), request, send)

    async def _stream_from_the_beginning(self, hold: Hold, request: Request, send: Send) -> None:
        try:
            async with asyncio.timeout(self._settings.first_record_timeout_s):
                await hold.wait(lambda story: story.opened or story.finished)
        except TimeoutError:
            pass  # no word from ingest yet: the stream begins, and a refusal comes as its error event
        error = _refusal(hold.story)
        if error is not None:
            await _send(_error_answer(error, hold.headers), request, send)
            return
        await self._stream(hold, BEFORE_ALL, send)

    async def _resume(
        self,
        caller: Caller,
        request: Request,
        send: Send,
        request_id: RequestId,
        cursor: Cursor,
        *,
        body: bytes | None = None,
    ) -> None:
        async def answer() -> None:
            async with self._requests.resume(request_id, caller) as hold:
                view = hold.story.state.view if hold.story.state is not None else None
                if body is not None and view is not None and view.body_hash != body_hash(body):
                    raise IdempotencyConflict("Last-Event-ID names a request with another body", param="Last-Event-ID")
                self._edge.metrics.resumed.inc()
                if cursor == BEFORE_ALL:
                    await self._stream_from_the_beginning(hold, request, send)
                else:
                    await self._stream(hold, cursor, send)

        await unless_gone(request.receive, answer(), cut=self._edge.admission.cut)

    async def _stream(self, hold: Hold, cursor: Cursor, send: Send) -> None:
        headers = {"content-type": MEDIA_TYPE, "cache-control": "no-cache", "x-accel-buffering": "no"}
        raw_headers = [(k.encode(), v.encode()) for k, v in (headers | hold.headers).items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw_headers})
        with self._edge.metrics.streams.track_inprogress():
            async for chunk in _chunks(hold, cursor, keep_alive_s=self._settings.keep_alive_s):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self, request: Request, send: Send) -> None:
        caller = self._caller(request)
        with self._edge.admission.client(caller.tenant, caller.limits):
            await self._events_for(caller, request, send)

    async def _events_for(self, caller: Caller, request: Request, send: Send) -> None:
        request_id = _path_id(request)
        event_id = request.headers.get("last-event-id") or request.query_params.get("last_event_id")
        cursor = BEFORE_ALL
        if event_id:
            named, cursor = parse_event_id(event_id)
            if named != request_id:
                raise InvalidRequest(f"Last-Event-ID is of another request than {request_id}", param="Last-Event-ID")
        await self._resume(caller, request, send, request_id, cursor)

    async def _describe(self, request: Request, send: Send) -> None:
        caller = self._caller(request)
        await _send(_json(await self._requests.describe(_path_id(request), caller)), request, send)

    async def _placement(self, request: Request, send: Send) -> None:
        caller = self._caller(request)
        await _send(_json(await self._requests.placement(_path_id(request), caller)), request, send)

    async def _cancel(self, request: Request, send: Send) -> None:
        caller, request_id = self._caller(request), _path_id(request)
        status = await self._requests.cancel(request_id, caller)
        await _send(_json({"id": request_id, "status": status}), request, send)

    async def _models(self, request: Request, send: Send) -> None:
        names = await self._model_names(self._caller(request))
        await _send(_json(model_list(names, created=self._started_s)), request, send)

    async def _model(self, request: Request, send: Send) -> None:
        name = request.path_params["name"]
        if name not in await self._model_names(self._caller(request)):
            raise ModelNotFound(f"no worker serves the model {name}", param="model")
        await _send(_json(model_card(name, created=self._started_s)), request, send)

    async def _openapi(self, request: Request, send: Send) -> None:
        await _send(_json(openapi_document()), request, send)

    async def _model_names(self, caller: Caller) -> list[str]:
        try:
            workers = await self._edge.state.workers(num_slots=NUM_SLOTS)
        except StateUnavailable as error:
            raise Overloaded("the workers are not known now", retry_after_s=1.0) from error
        return sorted({worker.card.model for worker in workers if caller.may_use(worker.card.model)})


def not_found_route(edge: StreamOut) -> BaseRoute:
    """Catches every path that no route before it took."""

    async def refuse(request: Request, _: Send) -> None:
        raise RequestNotFound(f"no such route: {request.method} {request.url.path}", code="unknown_url")

    return _AnyPath(Endpoint("other", refuse, edge))


class _AnyPath(BaseRoute):
    """Takes every path and method; a pattern would let a path with a newline through."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return (Match.FULL if scope["type"] == "http" else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T], *, cut: asyncio.Event) -> T:
    """The outcome of `work`, or ClientGone if the client hangs up before, or EdgeDraining if `cut` is set before; the
    work is cancelled then."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    cutting = asyncio.ensure_future(cut.wait())
    try:
        await asyncio.wait({working, leaving, cutting}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if leaving.done():
            raise ClientGone
        raise EdgeDraining("this edge ends; the request goes on elsewhere", retry_after_s=1.0)
    finally:
        for task in (working, leaving, cutting):
            task.cancel()
        await asyncio.gather(working, leaving, cutting, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _chunks(hold: Hold, cursor: Cursor, *, keep_alive_s: float) -> AsyncGenerator[bytes]:
    """What goes over the wire behind `cursor`: events, comments in silence, and the end mark of a good end."""
    request_id = hold.story.request_id
    while True:
        story = hold.story
        finished = story.finished
        events = story.events_behind(cursor)
        while events:
            parts: list[bytes] = []
            num_bytes = 0
            for event in events:
                parts.append(format_event(request_id, event.cursor, event.body))
                num_bytes += len(parts[-1])
                cursor = event.cursor
                if num_bytes >= MAX_SEND_BYTES:
                    break
            events = events[len(parts) :]
            yield b"".join(parts)
        if finished:
            break
        hold.check()
        if hold.story is not story or story.events_behind(cursor) or story.finished:
            continue
        try:
            async with asyncio.timeout(keep_alive_s):
                await story.news()
        except TimeoutError:
            yield KEEP_ALIVE
    assert hold.story.state is not None
    if error_of(hold.story.state) is None:
        yield DONE


def _check_headers(request: Request) -> None:
    """The body must be plain JSON, and no header that means something here may come twice."""
    for name in SINGLE_HEADERS:
        if len(request.headers.getlist(name)) > 1:
            raise InvalidRequest(f"header {name} must come once", param=name)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedBody("the body must not be compressed", param="content-encoding")
    content_type = request.headers.get("content-type")
    if content_type is not None and not JSON_TYPE_PATTERN.fullmatch(content_type):
        raise UnsupportedBody("header content-type must be application/json, in UTF-8", param="content-type")


def _priority(request: Request, caller: Caller) -> Priority:
    """Raises InvalidRequest, NotAllowed."""
    text = request.headers.get(PRIORITY_HEADER, Priority.STANDARD)
    try:
        priority = Priority(text)
    except ValueError:
        raise InvalidRequest(f"header {PRIORITY_HEADER} {NO_PRIORITY}", param=PRIORITY_HEADER) from None
    caller.check_priority(priority)
    return priority


async def _read_body(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body. Raises BodyTooLarge as soon as it is known to be over the limit, and BodyTooSlow."""
    too_large = BodyTooLarge(f"the body is over the limit of {max_bytes} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > max_bytes:
        raise too_large
    parts: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                num_bytes += len(part)
                if num_bytes > max_bytes:
                    raise too_large
                parts.append(part)
    except TimeoutError as error:
        raise BodyTooSlow(f"the body did not come within {timeout_s:g} s") from error
    return b"".join(parts)


def _refusal(story: Story) -> ErrorBody | None:
    """Why nothing will be streamed, if that is known already."""
    if story.state is None or not story.finished or any(choice.ids for choice in story.state.choices.values()):
        return None
    return error_of(story.state)


def _path_id(request: Request) -> RequestId:
    request_id = request.path_params["id"]
    if not REQUEST_ID_PATTERN.fullmatch(request_id):
        raise RequestNotFound(f"a request id matches {REQUEST_ID_PATTERN.pattern}")
    return RequestId(request_id)


def _json(body: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    content = orjson.dumps(body, option=orjson.OPT_NON_STR_KEYS)
    return Response(content, status, headers, media_type="application/json")


def _error_answer(error: RequestError | ErrorBody, headers: Mapping[str, str]) -> Response:
    told = dict(headers)
    if error.retry_after_s is not None:
        told["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, RateLimited):
        told |= error.headers
    if isinstance(error, NotAuthenticated):
        told["www-authenticate"] = "Bearer"
    return _json(error_json(error), told, error.http_status)


async def _send(response: Response, request: Request, send: Send) -> None:
    await response(request.scope, request.receive, send)
