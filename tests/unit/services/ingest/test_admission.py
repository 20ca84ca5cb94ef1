"""Admission against one model's limits: each refusal names field and limit."""

import orjson
import pytest

from services.ingest.admission import Admission, ModelFacts, default_seed
from services.ingest.jobs import Job
from shared.errors import ContextTooLong, InvalidRequest, ModelNotFound, RequestError, UnsupportedCheckpoint
from shared.request import RequestId
from shared.wire.to_ingest import LogPosition
from tests.fake_tokeniser import fake_tokeniser

ADMISSION = Admission(fake_tokeniser(), ModelFacts("fake", max_context=256, vocab_size=1000))


def a_job(**body):
    return Job(RequestId("r"), LogPosition(0, 0), orjson.dumps(body), "t", 1000.0, 2000.0, None, None)


def admit(capacity_tokens=None, **body):
    return ADMISSION.admit(a_job(**{"model": "fake", **body}), capacity_tokens)


def test_text_chat_and_ids():
    assert len(admit(prompt="abc").prompt_ids) == 3
    assert list(admit(prompt=[5, 6, 7]).prompt_ids) == [5, 6, 7]
    chat = admit(messages=[{"role": "user", "content": "hi"}])
    assert chat.spec.chat
    assert chat.sampling.max_tokens == 256 - len(chat.prompt_ids)


@pytest.mark.parametrize(("prompt_len", "max_tokens"), [(5, 16), (240, 16), (250, 6)])
def test_a_completion_that_names_no_length_takes_what_the_context_leaves(prompt_len, max_tokens):
    assert admit(prompt=[5] * prompt_len).sampling.max_tokens == max_tokens


def test_the_seed_is_that_of_the_request_unless_given():
    assert admit(prompt="a").sampling.seed == default_seed(RequestId("r"))
    assert admit(prompt="a", seed=7).sampling.seed == 7


@pytest.mark.parametrize(
    ("body", "error", "param"),
    [
        ({"prompt": ""}, InvalidRequest, "prompt"),
        ({"prompt": []}, InvalidRequest, "prompt"),
        ({"prompt": [1000]}, InvalidRequest, "prompt"),
        ({"prompt": [5], "stop_token_ids": [1000]}, InvalidRequest, "stop_token_ids"),
        ({"prompt": [5] * 256}, ContextTooLong, "prompt"),
        ({"prompt": [5] * 300}, ContextTooLong, "prompt"),
        ({"prompt": [5] * 250, "max_tokens": 7}, ContextTooLong, "max_tokens"),
        ({"prompt": [5], "model": "other"}, ModelNotFound, "model"),
    ],
)
def test_refusals(body, error, param):
    with pytest.raises(RequestError) as refused:
        admit(**body)
    assert type(refused.value) is error
    assert refused.value.param == param


def test_the_limit_is_in_the_message():
    with pytest.raises(ContextTooLong, match="256") as refused:
        admit(prompt=[5] * 250, max_tokens=7)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(ContextTooLong, match="128"):
        admit(128, prompt=[5] * 130)


def test_records_are_bounded_by_n_and_logprobs():
    roomy = Admission(fake_tokeniser(), ModelFacts("fake", max_context=200_000, vocab_size=1000))
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 20}
    with pytest.raises(InvalidRequest, match="at most") as refused:
        roomy.admit(a_job(**body, n=8, max_tokens=1000), None)
    assert refused.value.param == "max_tokens"


def test_the_model_folder_must_say_its_limits(tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64, "vocab_size": 10}')
    assert ModelFacts.load(tmp_path, "m") == ModelFacts("m", 64, 10)
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    with pytest.raises(UnsupportedCheckpoint, match="vocab_size"):
        ModelFacts.load(tmp_path, "m")
