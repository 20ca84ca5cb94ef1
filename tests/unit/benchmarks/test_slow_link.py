import pytest

from benchmarks.slow_link import (
    FRAME_BYTES,
    FRAME_PAYLOAD_BYTES,
    Answer,
    event_of,
    kafka_on,
    kv_bytes,
    link_rate,
    problems,
    times_of,
    tokens_in,
    wire_format_of,
    worker_in,
)
from infra.local.process import ProcessSpec
from infra.two_hosts import Host


def a_config(**changes):
    return {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576} | changes


def test_native_bytes_are_those_of_whole_pages():
    page_bytes = 30 * 2 * 64 * 3 * 64 * 2
    assert kv_bytes(a_config(), "bfloat16", 64) == page_bytes
    assert kv_bytes(a_config(), "bfloat16", 65) == 2 * page_bytes
    assert kv_bytes(a_config(head_dim=128), "float32", 1) == 4 * page_bytes


def test_a_link_is_as_slow_as_its_payload_must_be():
    assert link_rate(FRAME_PAYLOAD_BYTES, 2.0) == pytest.approx(FRAME_BYTES * 8 / 2.0)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("", 0),
        (": keep-alive", 0),
        ("id: 3", 0),
        ("data: [DONE]", 0),
        ('data: {"choices":[],"usage":{}}', 0),
        ('data: {"choices":[{"text":"","logprobs":null}]}', 0),
        ('data: {"choices":[{"text":"a b","logprobs":{"tokens":["a"," b"]}}]}', 2),
    ],
)
def test_tokens_of_a_stream_are_counted_by_their_logprobs(line, wanted):
    assert tokens_in(event_of(line)) == wanted


@pytest.mark.parametrize(
    ("event", "wanted"),
    [
        ({}, None),
        ({"usage": None}, None),
        ({"usage": {"prompt_tokens_details": {"cached_tokens": 0}}}, None),
        ({"usage": {"prompt_tokens_details": {"cached_tokens": 0, "kv_wire_format": "int8"}}}, "int8"),
    ],
)
def test_the_usage_names_a_lossy_form(event, wanted):
    assert wire_format_of(event) == wanted


def test_the_first_request_warms_up_and_medians_are_of_the_rest():
    answers = [
        Answer(9.0, 99.0, 900, "native"),
        Answer(1.0, 3.0, 10, "int8"),
        Answer(2.0, 2.5, 30, "int8"),
        Answer(1.5, 5.0, 20, "native"),
    ]
    assert times_of(answers, native_bytes=40, bound_s=2.0) == {
        "ratio_to_bound": 1.5,
        "second_token_s": 3.0,
        "first_token_s": 1.5,
        "first_to_second_s": 2.0,
        "second_token_each_s": [3.0, 2.5, 5.0],
        "wire_bytes": 20,
        "wire_share_of_native": 0.5,
        "wire_formats": ["int8", "int8", "native"],
        "first_request_second_token_s": 99.0,
    }


def a_case(ratio=1.25, wire_formats=("int8", "int8")):
    return {
        "factor": 1.5,
        "max_loss": "int8",
        "native": {"ratio_to_bound": 9.0, "wire_formats": ["native", "native"]},
        "int8": {"ratio_to_bound": ratio, "wire_formats": list(wire_formats)},
    }


def test_a_second_token_may_come_a_quarter_late():
    assert problems([a_case()]) == []
    (late,) = problems([a_case(ratio=1.251)])
    assert "1.251 times" in late


def test_a_lossy_form_that_was_not_used_is_a_problem():
    (unused,) = problems([a_case(wire_formats=("int8", "native"))])
    assert "not always used" in unused


async def never():
    return False


HOST = Host(namespace="a-host", address="10.0.0.1", way_address="10.0.1.1")


def test_a_worker_in_a_host_takes_kv_over_the_link_and_the_rest_past_it():
    spec = ProcessSpec(
        name="decode-0", command=("python", "-m", "x"), address="http://127.0.0.1:7", is_ready=never, env={"A": "1"}
    )
    inside = worker_in(HOST, spec, 7)
    assert inside.command == ("ip", "netns", "exec", "a-host", "python", "-m", "x")
    assert inside.address == "http://10.0.1.1:7"
    assert inside.env == {
        "A": "1",
        "BATON_HTTP_HOST": "10.0.1.1",
        "BATON_TRANSFER_HOST": "10.0.0.1",
        "BATON_TRANSFER_NET_DEVICES": "link0",
        "UCX_NET_DEVICES": "link0",
        "UCX_TLS": "tcp",
    }


class Ports:
    def __init__(self):
        self._next = 5

    def pick(self):
        self._next += 1
        return self._next


def test_kafka_tells_other_hosts_where_it_is(monkeypatch, tmp_path):
    spec = ProcessSpec(name="kafka", command=("java", "file"), address="127.0.0.1:6", is_ready=never)
    monkeypatch.setattr("benchmarks.slow_link.kafka_spec", lambda data_dir, port, controller_port: spec)
    moved = kafka_on(tmp_path, Ports(), "10.0.2.1")
    assert moved.address == "10.0.2.1:6"
    assert moved.command[2:] == (
        "--override",
        "listeners=PLAINTEXT://10.0.2.1:6,CONTROLLER://127.0.0.1:7",
        "--override",
        "advertised.listeners=PLAINTEXT://10.0.2.1:6",
    )
