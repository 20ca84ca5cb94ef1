"""The result is a pure function of the log, and always one that can be written."""

import dataclasses

import pytest

from services.stream_out import results
from services.stream_out.results import result_of, usage_of
from shared.policy.fold import ChoiceState, End, RequestState
from shared.request import FinishReason, RequestId
from shared.wire.to_ingest import LogPosition
from shared.wire.to_stream_out import View
from shared.wire.wire_format import WireFormat
from tests.fake_tokeniser import fake_tokeniser

TOKENISER = fake_tokeniser()
VIEW = View(
    tenant="t",
    model="m",
    body_hash="h",
    chat=False,
    num_choices=1,
    num_prompt_tokens=3,
    deadline_s=100.0,
    job=LogPosition(0, 0),
)


def a_request(text, stop_reason=None, chat=False):
    choice = ChoiceState(ids=TOKENISER.encode(text), end=End(FinishReason.STOP, stop_reason))
    view = dataclasses.replace(VIEW, chat=chat)
    return RequestState(RequestId("r"), 0, 1.0, view=view, choices={0: choice}, finished=True)


def test_an_answer_too_large_to_be_written_ends_as_failed_rather_than_never(monkeypatch):
    monkeypatch.setattr(results, "MAX_RESULT_BYTES", 2000)
    assert result_of(a_request("fits"), TOKENISER).status == "completed"
    too_large = result_of(a_request("x" * 2000), TOKENISER)
    assert (too_large.status, too_large.response) == ("failed", None)
    assert too_large.error.http_status == 500


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("stop_reason", [None, "stop!", 7])
def test_what_stopped_a_choice_is_told(chat, stop_reason):
    (choice,) = result_of(a_request("abc", stop_reason, chat), TOKENISER).response["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop_reason)


def test_usage_tells_the_most_lossy_form_of_all_choices():
    request = a_request("abc")
    request.choices[1] = dataclasses.replace(request.choices[0], wire_format=WireFormat.INT8)
    assert usage_of(request).wire_format is WireFormat.INT8
    details = result_of(request, TOKENISER).response["usage"]["prompt_tokens_details"]
    assert details["kv_wire_format"] == "int8"
