"""Events and results are functions of the records alone: however they are read, edges agree."""

import json
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from services.stream_out.events import EventMaker
from services.stream_out.results import answer_of, result_of, status_of
from services.stream_out.sse import BEFORE_ALL
from services.stream_out.streams import PartitionLog, Story
from shared.blocks import token_ids
from shared.request import (
    Event,
    FinishReason,
    Incarnation,
    PlacementId,
    RequestId,
    SamplingParams,
    TokenLogprob,
    WorkerRef,
)
from shared.text.tokeniser import Tokeniser
from shared.wire.codec import encode
from shared.wire.results import RESULT_DECODER
from shared.wire.to_ingest import LogPosition
from shared.wire.to_stream_out import STREAM_OUT_DECODER, Cut, ErrorBody, Frame, FrameEntry, Open, View
from tests.tiny_tokenizers import byte_level

TOKENISER = Tokeniser(byte_level(), eos_ids=(1,))
TEXT = "Hello world, 你好 мир said hello"
IDS = TOKENISER.encode(TEXT, add_special=False)
WORKER = WorkerRef(1, Incarnation("w"))
ID = RequestId("r")


def view(**fields):
    defaults = {"tenant": "t", "model": "tiny", "body_hash": "h", "chat": True, "num_choices": 1}
    defaults |= {"num_prompt_tokens": 5, "deadline_s": 9e9, "job": LogPosition(0, 0), "stamps": {Event.ACCEPTED: 12.7}}
    return View(**(defaults | fields))


def opening(choice=0, epoch=1, **fields):
    placement = PlacementId(f"{choice}/{epoch}")
    return Open(ID, choice, epoch, placement, WORKER, WORKER, view(**fields) if epoch == 1 else None)


def frame(index, ids, finish=None, choice=0, epoch=1, logprobs=False, **fields):
    lines = tuple(TokenLogprob(-1.0, ((token_id, -1.0), (7, -2.0))) for token_id in ids) if logprobs else ()
    entry = FrameEntry(ID, choice, PlacementId(f"{choice}/{epoch}"), index, token_ids(ids), lines, finish, **fields)
    return Frame(WORKER, (entry,), made_s=0.0)


def read(messages, start=0, only=None):
    log = PartitionLog(0, start, TOKENISER, only=only)
    for offset, message in enumerate(messages, start):
        log.apply(offset, 100.0 + offset, STREAM_OUT_DECODER.decode(encode(message)))
    return log


def events_of(messages):
    return list(read(messages).stories[ID].events_behind(BEFORE_ALL))


def chunks_of(messages):
    return [json.loads(event.body) for event in events_of(messages)]


def text_of(chunks, choice=0):
    choices = [c for chunk in chunks for c in chunk.get("choices", ()) if c["index"] == choice]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


def history(seed):
    """One choice, moved now and then, with doubled and overlapping frames, cut into records anyhow."""
    random = Random(seed)
    messages = [opening(stop_strings=random.choice([(), (" said",), ("or",)]))]
    epoch = 1
    known = 0
    while known < len(IDS):
        if random.random() < 0.2:
            messages.append(Cut(ID, 0, epoch + 1, "drain"))
            epoch += 1
            messages.append(opening(epoch=epoch))
        begin = random.randint(max(0, known - 2), known)
        end = random.randint(known, min(len(IDS), known + 4))
        finish = FinishReason.STOP if end == len(IDS) else None
        messages += [frame(begin, IDS[begin:end], finish, epoch=epoch)] * random.randint(1, 2)
        known = max(known, end)
    return messages


@given(st.integers(), st.integers())
@settings(max_examples=60, deadline=None)
def test_events_do_not_depend_on_when_they_are_asked_for(seed, askings):
    messages, random = history(seed), Random(askings)
    whole = events_of(messages)
    assert [event.cursor for event in whole] == sorted({event.cursor for event in whole})
    log = PartitionLog(0, 0, TOKENISER)
    seen, cursor = [], BEFORE_ALL
    for offset, message in enumerate(messages):
        log.apply(offset, 0.0, STREAM_OUT_DECODER.decode(encode(message)))
        if random.random() < 0.5:
            seen += log.stories[ID].events_behind(cursor)
            cursor = seen[-1].cursor if seen else BEFORE_ALL
    assert seen + list(log.stories[ID].events_behind(cursor)) == whole


@given(st.integers())
@settings(max_examples=60, deadline=None)
def test_the_stream_says_what_the_answer_says(seed):
    log = read(history(seed))
    answer = answer_of(log.stories[ID].state, TOKENISER)
    chunks = [json.loads(event.body) for event in log.stories[ID].events_behind(BEFORE_ALL)]
    assert text_of(chunks) == answer["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == answer["choices"][0]["finish_reason"] == "stop"
    assert answer["created"] == chunks[0]["created"] == 12


def test_another_reader_of_one_request_sees_the_same():
    other = FrameEntry(RequestId("other"), 0, PlacementId("x"), 0, token_ids([3]))
    mixed = Frame(WORKER, (other, *frame(0, IDS[:3]).entries), made_s=0.0)
    messages = [opening(), mixed, frame(3, IDS[3:], FinishReason.STOP)]
    alone = read(messages, only=ID)
    assert list(alone.stories) == [ID]
    assert list(alone.stories[ID].events_behind(BEFORE_ALL)) == events_of(messages)


def test_completion_chunks_place_each_token_in_the_text():
    fields = {"chat": False, "sampling": SamplingParams(max_tokens=99, logprobs=1)}
    messages = [opening(**fields)]
    for index, token_id in enumerate(IDS):
        finish = FinishReason.STOP if index + 1 == len(IDS) else None
        messages.append(frame(index, [token_id], finish, logprobs=True))
    lines = [c["logprobs"] for chunk in chunks_of(messages) for c in chunk["choices"] if c["logprobs"]]
    offsets = [offset for line in lines for offset in line["text_offset"]]
    whole = answer_of(read(messages).stories[ID].state, TOKENISER)["choices"][0]["logprobs"]
    assert offsets == whole["text_offset"]
    assert len(set(offsets)) > 5


def test_half_a_character_is_held_back():
    chunks = chunks_of([opening(), *(frame(index, [token_id]) for index, token_id in enumerate(IDS))])
    assert "\ufffd" not in text_of(chunks)
    assert TEXT.startswith(text_of(chunks))


def test_a_refusal_is_one_error_event_and_a_result():
    error = ErrorBody("no", "invalid_request_error", 400, "prompt")
    messages = [Cut(ID, 0, 2, "refused", FinishReason.REJECTED, error, view(num_choices=3))]
    assert chunks_of(messages) == [
        {"error": {"message": "no", "type": "invalid_request_error", "param": "prompt", "code": None}}
    ]
    result = result_of(read(messages).stories[ID].state, TOKENISER)
    assert (result.status, result.response, result.error, result.tenant) == ("rejected", None, error, "t")


def test_cancelled_without_any_view_is_a_result_too():
    messages = [Cut(ID, 0, 2, "client asked", FinishReason.CANCELLED)]
    result = result_of(read(messages).stories[ID].state, TOKENISER)
    assert (result.status, result.tenant) == ("cancelled", "")
    assert result.error is not None


def test_the_result_is_the_same_byte_for_byte_from_wherever_it_is_read():
    messages = [opening(), frame(0, IDS[:3]), frame(3, IDS[3:], FinishReason.LENGTH)]
    first = encode(result_of(read(messages).stories[ID].state, TOKENISER))
    log = PartitionLog(0, 0, TOKENISER)
    for offset, message in enumerate([*messages, frame(0, IDS[:1])]):
        log.apply(offset, 100.0 + offset, STREAM_OUT_DECODER.decode(encode(message)))
    assert encode(result_of(log.stories[ID].state, TOKENISER)) == first
    assert RESULT_DECODER.decode(first).response["choices"][0]["finish_reason"] == "length"


def test_usage_counts_all_choices_and_what_nobody_computed():
    fields = {"num_choices": 2, "include_usage": True}
    messages = [opening(0, **fields), opening(1, **fields)]
    messages += [frame(0, IDS[:4], FinishReason.LENGTH, num_cached_tokens=0)]
    messages += [frame(0, IDS[:2], FinishReason.LENGTH, choice=1, num_cached_tokens=5)]
    usage = chunks_of(messages)[-1]
    assert usage["usage"]["completion_tokens"] == 6
    assert usage["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert usage["baton"]["request_id"] == ID


def test_the_first_bad_end_names_the_request():
    messages = [opening(0, num_choices=2), opening(1, num_choices=2)]
    messages += [frame(0, IDS[:2], FinishReason.STOP), Cut(ID, 1, 2, "deadline", FinishReason.EXPIRED)]
    state = read(messages).stories[ID].state
    assert state.finished
    assert status_of(state) == "expired"
    assert json.loads(events_of(messages)[-1].body)["error"]["code"] == "deadline_exceeded"


def test_nothing_is_made_for_nobody():
    """A request that no client streams keeps its records' changes, and no text is made of them."""
    story: Story = read([opening(), frame(0, IDS[:3])]).stories[ID]
    assert story._events == []
    assert isinstance(story._maker, EventMaker)
    assert not story._maker._texts
