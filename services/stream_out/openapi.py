"""The OpenAPI document of an edge: served at `/openapi.json`, tested against the routes and against every answer.

Bodies come from the models that parse them, and limits from where they are checked.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from services.stream_out.results import CANCELLED_HTTP_STATUS, COMPLETED
from services.stream_out.sse import DONE_DATA, MEDIA_TYPE
from shared.request import NUM_SLOTS, REQUEST_ID_PATTERN, Event, FinishReason, Priority
from shared.wire.explanation import MAX_CANDIDATES
from shared.wire.openai import MAX_BODY_BYTES, MAX_CHOICES, body_schemas
from shared.wire.openai_answers import FINISH_REASONS
from shared.wire.to_ingest import MAX_IDEMPOTENCY_KEY_CHARS, TENANT_PATTERN
from shared.wire.topics import MAX_DEADLINE_S
from shared.wire.wire_format import WireFormat

Json = dict[str, Any]

_SCHEMAS = "#/components/schemas/"
_STATUSES = ["queued", "running", COMPLETED, *(reason for reason in FinishReason if reason not in FINISH_REASONS)]


@cache
def openapi_document() -> Json:
    """The document; not to be changed by its callers."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Baton",
            "version": "1",
            "description": "OpenAI's chat and text completions, and the state, events and end of each request.",
        },
        "paths": _paths(),
        "components": {
            "schemas": {**body_schemas(_SCHEMAS + "{model}"), **_answer_schemas()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _paths() -> Json:
    request_id = _parameter("id", "path", {"type": "string", "pattern": f"^{REQUEST_ID_PATTERN.pattern}$"})
    return {
        "/v1/chat/completions": {"post": _generation("createChatCompletion", "ChatCompletion")},
        "/v1/completions": {"post": _generation("createCompletion", "Completion")},
        "/v1/models": {"get": _operation("listModels", "Models that are served now", _json_answer("ModelList"), 503)},
        "/v1/models/{name}": {
            "get": _operation(
                "getModel",
                "One model",
                _json_answer("Model"),
                404,
                503,
                parameters=[_parameter("name", "path", {"type": "string", "minLength": 1})],
            )
        },
        "/v1/requests/{id}": {
            "get": _operation(
                "describeRequest",
                "Where a request is in its life",
                _json_answer("Request"),
                404,
                503,
                parameters=[request_id],
            ),
            "delete": _operation(
                "cancelRequest",
                "End a request, wherever it is; tells how it ended, which may have been otherwise before",
                _json_answer("Cancelled"),
                404,
                503,
                parameters=[request_id],
            ),
        },
        "/v1/requests/{id}/events": {
            "get": _operation(
                "followRequest",
                "A request's events from its beginning, or behind one of them. An end that is no answer comes as its "
                "error where nothing was streamed",
                _stream_answer("ChatCompletionChunk", "CompletionChunk"),
                *_ENDS,
                parameters=[
                    request_id,
                    _LAST_EVENT_ID,
                    _parameter("last_event_id", "query", {"type": "string"}, "As the header Last-Event-ID."),
                ],
            )
        },
        "/v1/requests/{id}/placement": {
            "get": _operation(
                "explainPlacement",
                "Where a request's choices were placed, each time, and why",
                _json_answer("Placement"),
                404,
                503,
                parameters=[request_id],
            )
        },
        "/openapi.json": {"get": _operation("getOpenapi", "This document", _content({"type": "object"}))},
        "/health": {"get": _operation("getHealth", "The process lives", _content(_HEALTH_SCHEMA), open_to_all=True)},
        "/ready": {
            "get": {
                **_operation("getReady", "All it needs is there", _content(_READY_SCHEMA), open_to_all=True),
                "responses": {"200": _content(_READY_SCHEMA), "503": _content(_READY_SCHEMA)},
            }
        },
        "/metrics": {
            "get": _operation(
                "getMetrics",
                "Prometheus metrics",
                {"description": "OK", "content": {"text/plain": {"schema": {"type": "string"}}}},
                open_to_all=True,
            )
        },
    }


_ENDS = (400, 404, 409, CANCELLED_HTTP_STATUS, 500, 503, 504)
"""Statuses of a request that was found and has no answer, with those of not finding it."""

_MEANINGS: Mapping[int, str] = {
    400: "The request is wrong: the message names field and limit",
    401: "No key, or a wrong one",
    403: "The key may not do this",
    404: "No such model, request or route",
    408: "The body did not come in time",
    409: "The idempotency key or event id belongs to another body",
    413: f"The body has more than {MAX_BODY_BYTES} bytes",
    415: "The body is no plain JSON in UTF-8",
    429: "Over the tenant's limits: see Retry-After",
    CANCELLED_HTTP_STATUS: "The request was cancelled",
    500: "The request failed here; nothing was wrong with it",
    503: "Saturated, or what is needed is away: see Retry-After",
    504: "The deadline passed first",
}


def _generation(operation_id: str, name: str) -> Json:
    answer = {
        "description": "The answer, or with `stream` its events",
        "content": {**_stream_answer(f"{name}Chunk")["content"], **_json_answer(name)["content"]},
    }
    statuses = (*_ENDS, 408, 413, 415)
    operation = _operation(operation_id, "Continue a prompt", answer, *statuses, parameters=_GENERATION_PARAMETERS)
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": f"{_SCHEMAS}{name}Request"}}}}
    return operation | {"requestBody": body}


def _operation(
    operation_id: str,
    summary: str,
    answer: Json,
    *statuses: int,
    parameters: list[Json] | None = None,
    open_to_all: bool = False,
) -> Json:
    """An operation; `statuses` are those of its errors beside what any call may get."""
    errors = {*statuses} if open_to_all else {*statuses, 401, 403, 429, 500, 503}
    responses = {"200": answer} | {str(status): _error_answer(status) for status in sorted(errors)}
    operation: Json = {"operationId": operation_id, "summary": summary, "responses": responses}
    if parameters:
        operation["parameters"] = parameters
    if open_to_all:
        operation["security"] = []
    return operation


def _parameter(name: str, place: str, schema: Json, description: str | None = None) -> Json:
    parameter: Json = {"name": name, "in": place, "schema": schema, "required": place == "path"}
    return parameter if description is None else parameter | {"description": description}


def _content(schema: Json) -> Json:
    return {"description": "OK", "content": {"application/json": {"schema": schema}}}


def _json_answer(name: str) -> Json:
    return _content({"$ref": _SCHEMAS + name})


def _stream_answer(*names: str) -> Json:
    """A stream of these objects, or of an error as its last one; `[DONE]` ends one that ended well."""
    objects: Json = {"anyOf": [{"$ref": _SCHEMAS + name} for name in (*names, "Error")]}
    event: Json = {
        "description": "One event; `data` is an object as JSON, or `[DONE]`.",
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "data": {
                "anyOf": [
                    {"const": DONE_DATA},
                    {"type": "string", "contentMediaType": "application/json", "contentSchema": objects},
                ]
            },
        },
        "required": ["data"],
    }
    return {"description": "Server-sent events", "content": {MEDIA_TYPE: {"schema": event}}}


def _error_answer(status: int) -> Json:
    answer = _json_answer("Error") | {"description": _MEANINGS[status]}
    if status in {429, 503}:
        return answer | {"headers": {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}}
    return answer


_LAST_EVENT_ID = _parameter(
    "Last-Event-ID",
    "header",
    {"type": "string", "pattern": rf"^({REQUEST_ID_PATTERN.pattern}:[0-9]{{1,19}}\.[0-9]{{1,19}})?$"},
    "Go on behind this event, on whichever edge.",
)


_GENERATION_PARAMETERS: list[Json] = [
    _parameter(
        "Idempotency-Key",
        "header",
        {"type": "string", "minLength": 1, "maxLength": MAX_IDEMPOTENCY_KEY_CHARS},
        "Requests of one tenant under one key are one request.",
    ),
    _LAST_EVENT_ID,
    _parameter(
        "x-baton-timeout-s",
        "header",
        {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_DEADLINE_S},
        "Seconds after which nobody wants the answer.",
    ),
    _parameter(
        "x-baton-tenant",
        "header",
        {"type": "string", "pattern": f"^{TENANT_PATTERN.pattern}$"},
        "Whose request it is, where no keys are set up; with keys it is the key's.",
    ),
    _parameter(
        "x-baton-priority",
        "header",
        {"enum": list(Priority)},
        "Who goes first of those that wait; batch runs where nobody else needs the workers. Standard if not said.",
    ),
    _parameter("traceparent", "header", {"type": "string"}, "W3C trace context; what is none is ignored."),
]

_HEALTH_SCHEMA: Json = {"type": "object", "properties": {"status": {"type": "string"}}, "required": ["status"]}
_READY_SCHEMA: Json = {
    "type": "object",
    "properties": {"ready": {"type": "boolean"}},
    "required": ["ready"],
    "additionalProperties": {"type": "boolean"},
}


def _object(properties: Json, *optional: str) -> Json:
    """An object of just these fields, all of them there but the optional ones."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _list_of(items: Json) -> Json:
    return {"type": "array", "items": items}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _answer_schemas() -> dict[str, Json]:
    text, number, integer = {"type": "string"}, {"type": "number"}, {"type": "integer", "minimum": 0}
    timings: Json = {
        "description": "Unix seconds at which the request passed each event.",
        "type": "object",
        "properties": {event.value: number for event in Event},
        "additionalProperties": False,
    }
    usage = _object(
        {
            "prompt_tokens": integer,
            "completion_tokens": integer,
            "total_tokens": integer,
            "prompt_tokens_details": _object(
                {"cached_tokens": integer, "kv_wire_format": {"enum": [lossy.value for lossy in WireFormat]}},
                "kv_wire_format",
            ),
        }
    )
    finish: Json = {
        "finish_reason": {"enum": list(FINISH_REASONS.values())},
        "stop_reason": {"anyOf": [text, {"type": "integer"}, {"type": "null"}]},
    }
    model = _object({"id": text, "object": {"const": "model"}, "created": integer, "owned_by": text, "root": text})

    index: Json = {"index": {"type": "integer", "minimum": 0, "maximum": MAX_CHOICES - 1}}

    def answer(kind: str, choice: Json) -> Json:
        return _object(
            {
                "id": text,
                "object": {"const": kind},
                "created": integer,
                "model": text,
                "choices": _list_of(_object({**index, **choice, **finish})),
                "usage": usage,
                "baton": _object({"request_id": text, "timings": timings}),
            }
        )

    def chunk(kind: str, choice: Json) -> Json:
        """What is streamed of an answer; `usage` and where the time went come last, if asked for."""
        whole = answer(kind, {})["properties"]
        part = _object({**index, **choice, **finish, "finish_reason": _or_null(finish["finish_reason"])}, "stop_reason")
        return _object({**whole, "choices": _list_of(part), "usage": _or_null(usage)}, "usage", "baton")

    candidate: Json = {"token": text, "logprob": number, "bytes": _list_of(integer)}
    chat_logprobs = _object(
        {
            "content": _list_of(_object({**candidate, "top_logprobs": _list_of(_object(candidate))})),
            "refusal": {"type": "null"},
        }
    )
    logprobs = _object(
        {
            "tokens": _list_of(text),
            "token_logprobs": _list_of(number),
            "top_logprobs": _list_of({"type": "object", "additionalProperties": number}),
            "text_offset": _list_of(integer),
        }
    )
    message = _object({"role": {"const": "assistant"}, "content": text, "refusal": {"type": "null"}})
    delta = _object({"role": {"const": "assistant"}, "content": text}, "role", "content")
    error = _object({"message": text, "type": text, "param": _or_null(text), "code": _or_null(text)})
    request_choice = _object(
        {
            "index": integer,
            "completion_tokens": integer,
            "finish_reason": _or_null({"enum": [reason.value for reason in FinishReason]}),
        }
    )
    request = {
        "id": text,
        "object": {"const": "baton.request"},
        "status": {"enum": _STATUSES},
        "model": text,
        "last_event": _or_null({"enum": [event.value for event in Event]}),
        "timings": timings,
        "usage": usage,
        "choices": _list_of(request_choice),
        "reason": _or_null(text),
    }
    slot: Json = {"type": "integer", "minimum": 0, "maximum": NUM_SLOTS - 1}
    considered = {
        "description": "A way to run the choice, as predicted then: the workers' slots, seconds, and pages of 64 "
        "tokens of the prompt. cost_s is what the decision made smallest, by the operator's goals; it is no latency.",
        **_object(
            {
                **dict.fromkeys(("prefill", "decode"), slot),
                **dict.fromkeys(("ttft_s", "tpot_s", "cost_s"), number),
                **dict.fromkeys(("cached_pages", "fetched_pages"), integer),
                **dict.fromkeys(("queue_s", "transfer_s"), number),
                "is_local": {"type": "boolean"},
            }
        ),
    }
    candidates: Json = {
        "description": "The best, best first; the first was chosen.",
        "type": "array",
        "items": considered,
        "maxItems": MAX_CANDIDATES,
    }
    explanation = _object({"reason": text, "num_considered": integer, "candidates": candidates})
    placement = {
        **index,
        "epoch": {"type": "integer", "minimum": 1},
        **dict.fromkeys(("prefill", "decode"), slot),
        "placed": _or_null({"description": "Unix seconds.", "type": "number"}),
        "explanation": _or_null(explanation),
    }
    return {
        "ChatCompletion": answer("chat.completion", {"message": message, "logprobs": _or_null(chat_logprobs)}),
        "ChatCompletionChunk": chunk("chat.completion.chunk", {"delta": delta, "logprobs": _or_null(chat_logprobs)}),
        "Completion": answer("text_completion", {"text": text, "logprobs": _or_null(logprobs)}),
        "CompletionChunk": chunk("text_completion", {"text": text, "logprobs": _or_null(logprobs)}),
        "Model": model,
        "ModelList": _object({"object": {"const": "list"}, "data": _list_of({"$ref": f"{_SCHEMAS}Model"})}),
        "Request": _object(request, "model", "last_event", "timings", "usage", "choices", "reason"),
        "Placement": _object(
            {"id": text, "object": {"const": "baton.placement"}, "placements": _list_of(_object(placement))}
        ),
        "Cancelled": _object({"id": text, "status": {"enum": _STATUSES}}),
        "Error": _object({"error": error}),
    }
