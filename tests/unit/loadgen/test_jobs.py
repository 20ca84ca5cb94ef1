import json

import pytest

from loadgen.jobs import CHAT_COMPLETIONS, COMPLETIONS, JobMaker, RequestShape
from loadgen.prompts import IdPrompts, Prompt, vocabulary_of_size
from shared.request import REQUEST_ID_PATTERN
from shared.wire.openai import parse_body
from tests.unit.loadgen.builders import scheduled


class Words:
    fingerprint = "words"

    def make(self, row):
        return Prompt("a b c", 3)


def maker(prompts=None, endpoint=COMPLETIONS, *, ignore_eos=True, stream=True):
    shape = RequestShape(endpoint, "m", ignore_eos=ignore_eos, temperature=0.0, stream=stream)
    return JobMaker(shape, prompts or IdPrompts(0, vocabulary_of_size(100)), "run", 5.0)


def test_ids_are_sent_with_the_traces_length_as_lower_and_upper_bound():
    job = maker().make(scheduled(3, input_tokens=7, output_tokens=9))
    body = json.loads(job.body)
    assert len(body["prompt"]) == job.prompt_tokens == 7
    assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"], body["temperature"]) == (9, 9, True, 0)
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})
    assert job.request_id == "replay-run-3"
    assert REQUEST_ID_PATTERN.fullmatch(job.request_id)


def test_a_chat_is_one_user_message_and_may_end_early():
    body = json.loads(maker(Words(), CHAT_COMPLETIONS, ignore_eos=False).make(scheduled(0)).body)
    assert body["messages"] == [{"role": "user", "content": "a b c"}]
    assert not {"prompt", "min_tokens", "ignore_eos"} & set(body)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("endpoint", [COMPLETIONS, CHAT_COMPLETIONS])
def test_baton_accepts_every_body_and_knows_all_its_fields(endpoint, stream):
    prompts = Words() if endpoint == CHAT_COMPLETIONS else None
    parsed = parse_body(maker(prompts, endpoint, stream=stream).make(scheduled(0)).body, chat=None)
    assert parsed.unknown_fields == ()
    assert parsed.spec.chat == (endpoint == CHAT_COMPLETIONS)
    assert parsed.spec.max_tokens == parsed.spec.min_tokens == 3


def test_bodies_of_two_runs_are_the_same_bytes():
    first, second = maker(), JobMaker(maker().shape, maker().prompts, "another run", 5.0)
    assert first.make(scheduled(1)).body == second.make(scheduled(1)).body
    assert first.make(scheduled(1)).request_id != second.make(scheduled(1)).request_id
