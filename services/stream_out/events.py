"""Makes the events of a request's stream: a pure function of its records in log order, the same on every edge.

    Opened ──> role chunk (chat)      Grew ──> delta, if it shows text or carries logprobs
    Ended ──> rest of the text, finish chunk      Finished ──> usage chunk if asked for, or the error

An event is named by the record it was made of and its place among those made of it, so a client that saw it may go on
behind it anywhere.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from services.stream_out.results import (
    error_json,
    error_of,
    extension_of,
    head_of,
    text_stream,
    token_lines,
    usage_of,
)
from services.stream_out.sse import Cursor
from shared.policy.fold import Change, Ended, Finished, Grew, Opened, RequestState
from shared.text.stream import TextStream
from shared.text.tokeniser import Tokeniser
from shared.wire.openai_answers import (
    ENDS_AS_ERROR,
    TokenLine,
    chat_delta_chunk,
    chat_finish_chunk,
    chat_role_chunk,
    chat_usage_chunk,
    completion_delta_chunk,
    completion_finish_chunk,
    completion_usage_chunk,
    num_chars,
)

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One event; `body` is its JSON."""

    cursor: Cursor
    body: bytes


@dataclass(slots=True)
class _ChoiceText:
    """How far the text of a choice was made; `num_chars` counts characters begun by its tokens."""

    stream: TextStream
    num_chars: int = 0


@dataclass(slots=True)
class EventMaker:
    """Makes one request's events; must be given each record's changes once, in log order."""

    tokeniser: Tokeniser
    _texts: dict[int, _ChoiceText] = field(default_factory=dict[int, _ChoiceText])

    def make(self, offset: int, changes: Sequence[Change]) -> list[StreamEvent]:
        """The events made of the record at `offset`."""
        bodies = [body for change in changes for body in self._bodies(change)]
        return [StreamEvent(Cursor(offset, k), orjson.dumps(body, option=_JSON)) for k, body in enumerate(bodies)]

    def _bodies(self, change: Change) -> Iterator[Json]:
        match change:
            case Opened(state, choice):
                if _is_chat(state):
                    yield chat_role_chunk(head_of(state), choice)
            case Grew():
                yield from self._delta(change)
            case Ended(state, choice, end) if end.finish not in ENDS_AS_ERROR:
                rest = self._text(state, choice).stream.finish()
                if rest:
                    yield self._delta_chunk(state, choice, rest, None)
                finish_chunk = chat_finish_chunk if _is_chat(state) else completion_finish_chunk
                yield finish_chunk(head_of(state), choice, end.finish, end.stop_reason)
            case Finished(state):
                yield from _last(state)
            case _:
                return

    def _delta(self, grew: Grew) -> Iterator[Json]:
        state = grew.state
        text = self._text(state, grew.choice)
        shown = text.stream.push(grew.ids).text
        lines: list[TokenLine] | None = None
        if state.view is not None and state.view.sampling.logprobs is not None:
            logprobs = state.choices[grew.choice].logprobs[grew.index : grew.index + len(grew.ids)]
            lines = token_lines(self.tokeniser, grew.ids, logprobs)
        if shown or lines:
            yield self._delta_chunk(state, grew.choice, shown, lines)
        text.num_chars += sum(num_chars(line.chosen.raw) for line in lines or ())

    def _delta_chunk(self, state: RequestState, choice: int, text: str, lines: list[TokenLine] | None) -> Json:
        head = head_of(state)
        if _is_chat(state):
            return chat_delta_chunk(head, choice, text, lines)
        return completion_delta_chunk(head, choice, text, lines, text_offset=self._text(state, choice).num_chars)

    def _text(self, state: RequestState, choice: int) -> _ChoiceText:
        if choice not in self._texts:
            assert state.view is not None, "a choice has text only once it was opened"
            self._texts[choice] = _ChoiceText(text_stream(state.view, self.tokeniser))
        return self._texts[choice]


_JSON = orjson.OPT_NON_STR_KEYS


def _is_chat(state: RequestState) -> bool:
    return state.view is not None and state.view.chat


def _last(state: RequestState) -> Iterator[Json]:
    error = error_of(state)
    if error is not None:
        yield error_json(error)
    elif state.view is not None and state.view.include_usage:
        usage_chunk = chat_usage_chunk if state.view.chat else completion_usage_chunk
        yield {**usage_chunk(head_of(state), usage_of(state)), "baton": extension_of(state)}
