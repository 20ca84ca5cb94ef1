"""The end of a request for those who asked: pure functions of what the log tells and the tokeniser.

Nothing here knows which edge asks or when, so two owners write the same result byte for byte.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from shared.blocks import TokenIds
from shared.errors import RequestError
from shared.policy.fold import ChoiceState, Loss, RequestState
from shared.request import Event, FinishReason, TokenLogprob
from shared.text.stream import TextStream
from shared.text.tokeniser import Tokeniser
from shared.wire.codec import encode
from shared.wire.openai_answers import (
    ENDS_AS_ERROR,
    AnswerChoice,
    AnswerHead,
    Candidate,
    TokenLine,
    Usage,
    chat_completion,
    completion,
)
from shared.wire.results import Result
from shared.wire.to_stream_out import ErrorBody, View
from shared.wire.topics import MAX_RECORD_BYTES
from shared.wire.wire_format import WireFormat

COMPLETED = "completed"
CANCELLED_HTTP_STATUS = 499
"""What proxies log when a client went away; no standard status says it."""


def cancelled_error(reason: str) -> ErrorBody:
    """Why a cancelled request has no answer."""
    return ErrorBody(
        f"the request was cancelled: {reason}", "request_cancelled", CANCELLED_HTTP_STATUS, code="request_cancelled"
    )


EXPIRED_ERROR = ErrorBody(
    "the request's deadline passed before its answer was complete", "timeout_error", 504, code="deadline_exceeded"
)

WORKER_LOST = "worker lost"
"""Reason of a cut that closes the placement of a worker that is gone."""

WORKERS_LOST = "workers lost"
"""Reason of a cut that ends a request after too many of these."""

MAX_LOSSES = 3
"""So many workers lost in a row, without a token between, end a request: it may be what they died of."""

WORKERS_LOST_ERROR = ErrorBody(
    f"{MAX_LOSSES} workers in a row were lost with the request, without a new token between",
    "server_error",
    500,
    code="workers_lost",
)

MAX_RESULT_BYTES = MAX_RECORD_BYTES - 1024
"""Admission bounds results by an estimate; a larger one could never be written, and its request would never end."""

RESULT_TOO_LARGE = ErrorBody(
    f"the answer has more than {MAX_RESULT_BYTES} bytes, the largest record of `results`", "server_error", 500
)

_DEFAULT_ERRORS = {
    FinishReason.FAILED: ErrorBody("the request failed", "server_error", 500, code="internal_error"),
    FinishReason.REJECTED: ErrorBody("the request was refused", "invalid_request_error", 400),
    FinishReason.CANCELLED: cancelled_error("no reason was given"),
    FinishReason.EXPIRED: EXPIRED_ERROR,
}


def status_of(state: RequestState) -> str:
    """ "completed" if every choice ended by stop or length, else the first other finish reason."""
    failure = _failed_choice(state)
    return COMPLETED if failure is None else failure[0].value


def error_of(state: RequestState) -> ErrorBody | None:
    """Why the finished request has no whole answer; None if it has one."""
    failure = _failed_choice(state)
    return None if failure is None else failure[1]


def is_given_up(state: RequestState) -> bool:
    """Whether too many workers were lost with the request for it to be placed again."""
    return any(len(choice.losses) >= MAX_LOSSES for choice in state.choices.values())


def ended_by_losses(state: RequestState) -> bool:
    """Whether that ended it, and not its client or its deadline first."""
    return any(choice.end is not None and choice.end.error == WORKERS_LOST_ERROR for choice in state.choices.values())


def losses_of(state: RequestState) -> list[Loss]:
    """The workers that were lost with the choice that ended it."""
    return max((choice.losses for choice in state.choices.values()), key=len, default=[])


def _failed_choice(state: RequestState) -> tuple[FinishReason, ErrorBody] | None:
    for _, choice in sorted(state.choices.items()):
        if choice.end is not None and choice.end.finish in ENDS_AS_ERROR:
            return choice.end.finish, choice.end.error or _DEFAULT_ERRORS[choice.end.finish]
    return None


def error_json(error: ErrorBody | RequestError) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def head_of(state: RequestState) -> AnswerHead:
    """What every object of the answer begins with."""
    view = _view(state)
    created_s = view.stamps.get(Event.ACCEPTED, state.first_timestamp_s)
    return AnswerHead(state.request_id, int(created_s), view.model, null_usage=view.include_usage)


def usage_of(state: RequestState) -> Usage:
    """Tokens so far. Cached are those that no choice had to compute; the wire format is that of the worst choice."""
    formats = [choice.wire_format for choice in state.choices.values()]
    cached = [choice.num_cached_tokens for choice in state.choices.values() if choice.num_cached_tokens is not None]
    return Usage(
        prompt_tokens=_view(state).num_prompt_tokens,
        completion_tokens=sum(len(choice.ids) for choice in state.choices.values()),
        cached_tokens=min(cached, default=0),
        wire_format=max(formats, key=lambda wire_format: wire_format.loss, default=WireFormat.NATIVE),
    )


def total_tokens(state: RequestState) -> int:
    """What the request cost; nothing, if it never was opened."""
    if state.view is None:
        return 0
    usage = usage_of(state)
    return usage.prompt_tokens + usage.completion_tokens


def extension_of(state: RequestState) -> dict[str, Any]:
    """Our own field of an answer: where the request's time went, in unix seconds by event."""
    return {"request_id": state.request_id, "timings": timings_of(state)}


def timings_of(state: RequestState) -> dict[Event, float]:
    """Stamps in the order of the request's life."""
    stamps = state.stamps
    return {event: stamps[event] for event in Event if event in stamps}


def token_lines(tokeniser: Tokeniser, ids: TokenIds, logprobs: Sequence[TokenLogprob]) -> list[TokenLine]:
    """Tokens as their log probabilities are shown; `logprobs` has one for each of `ids`."""
    return [
        TokenLine(
            _candidate(tokeniser, token_id, logprob.logprob),
            tuple(_candidate(tokeniser, rival_id, rival) for rival_id, rival in logprob.top),
        )
        for token_id, logprob in zip(ids, logprobs, strict=False)
    ]


def _candidate(tokeniser: Tokeniser, token_id: int, logprob: float) -> Candidate:
    return Candidate(tokeniser.token_text(token_id), tokeniser.token_bytes(token_id), logprob)


def text_stream(view: View, tokeniser: Tokeniser) -> TextStream:
    """The text of one choice, as the worker that ended it made it."""
    return TextStream.of_choice(tokeniser, view.stop_strings, view.sampling)


def answer_of(state: RequestState, tokeniser: Tokeniser) -> dict[str, Any]:
    """The whole answer of a request that completed."""
    view = _view(state)
    choices = [_answer_choice(index, choice, view, tokeniser) for index, choice in _by_index(state)]
    build = chat_completion if view.chat else completion
    return {**build(head_of(state), choices, usage_of(state)), "baton": extension_of(state)}


def result_of(state: RequestState, tokeniser: Tokeniser) -> Result:
    """The request's one record on `results`."""
    error = error_of(state)
    result = Result(
        request_id=state.request_id,
        status=status_of(state),
        tenant=state.view.tenant if state.view else "",
        body_hash=state.view.body_hash if state.view else "",
        response=answer_of(state, tokeniser) if error is None else None,
        error=error,
        timings=timings_of(state),
    )
    if len(encode(result)) > MAX_RESULT_BYTES:
        return replace(result, status=FinishReason.FAILED, response=None, error=RESULT_TOO_LARGE)
    return result


def unmakeable_result(state: RequestState) -> Result:
    """Ends a request of which the log tells what no answer can be made of."""
    error = _DEFAULT_ERRORS[FinishReason.FAILED]
    return Result(request_id=state.request_id, status=FinishReason.FAILED, error=error)


def _answer_choice(index: int, choice: ChoiceState, view: View, tokeniser: Tokeniser) -> AnswerChoice:
    assert choice.end is not None, "an answer is made of choices that ended"
    stream = text_stream(view, tokeniser)
    text = stream.push(choice.ids).text + stream.finish()
    with_logprobs = view.sampling.logprobs is not None
    tokens = token_lines(tokeniser, choice.ids, choice.logprobs) if with_logprobs else None
    return AnswerChoice(index, text, choice.end.finish, tokens, choice.end.stop_reason)


def _by_index(state: RequestState) -> Iterable[tuple[int, ChoiceState]]:
    return sorted(state.choices.items())


def _view(state: RequestState) -> View:
    assert state.view is not None, "asked only of requests that were opened"
    return state.view
