"""What the edge observes of a request that ended."""

import dataclasses

import pytest
from prometheus_client import CollectorRegistry

from services.stream_out.metrics import EdgeMetrics
from shared.policy.fold import ChoiceState, End, RequestState
from shared.request import Event, FinishReason, Incarnation, PlacementId, RequestId, WorkerRef
from shared.wire.explanation import Candidate, Explanation
from shared.wire.to_ingest import LogPosition
from shared.wire.to_stream_out import Open, View
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
    stamps={Event.ACCEPTED: 10.0, Event.ADMITTED: 10.25},
)
STAMPS = {
    Event.PLACED: 10.5,
    Event.PREFILLING: 11.0,
    Event.FIRST_TOKEN: 12.0,
    Event.TRANSFERRING: 12.25,
    Event.DECODING: 12.5,
    Event.FINISHED: 14.0,
}


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def metrics(registry):
    return EdgeMetrics(registry)


def a_request(text, finish, stamps):
    choice = ChoiceState(ids=TOKENISER.encode(text), end=End(finish), stamps=dict(stamps))
    return RequestState(RequestId("r"), 0, 10.0, view=VIEW, choices={0: choice}, finished=True)


def stages(registry):
    return {
        sample.labels["stage"]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "baton_stage_seconds_sum"
    }


def test_each_stage_that_a_request_passed_is_observed_once(metrics, registry):
    metrics.observe_end(a_request("abcde", FinishReason.STOP, STAMPS), "completed", 14.5)
    assert stages(registry) == {
        "accepted_admitted": 0.25,
        "admitted_placed": 0.25,
        "placed_prefilling": 0.5,
        "prefilling_first_token": 1.0,
        "first_token_transferring": 0.25,
        "transferring_decoding": 0.25,
        "decoding_finished": 1.5,
        "finished_delivered": 0.5,
    }
    value = registry.get_sample_value
    assert value("vllm:time_to_first_token_seconds_sum") == 2.0
    assert value("vllm:e2e_request_latency_seconds_sum") == 4.0
    assert value("vllm:request_time_per_output_token_seconds_sum") == 0.5
    assert value("baton_handoff_gap_seconds_sum") == 0.5
    assert value("vllm:request_success_total", {"finished_reason": "stop"}) == 1
    assert value("baton_requests_finished_total", {"status": "completed"}) == 1


def test_an_answer_of_one_token_has_no_gap_and_no_time_per_token(metrics, registry):
    stamps = {event: STAMPS[event] for event in (Event.PLACED, Event.PREFILLING, Event.FIRST_TOKEN)}
    metrics.observe_end(a_request("a", FinishReason.LENGTH, {**stamps, Event.FINISHED: 12.0}), "completed", 12.5)
    assert stages(registry)["first_token_finished"] == 0
    assert registry.get_sample_value("baton_handoff_gap_seconds_count") == 0
    assert registry.get_sample_value("vllm:request_time_per_output_token_seconds_count") == 0


def placed_once(predicted, epoch=1):
    workers = WorkerRef(0, Incarnation("p")), WorkerRef(1, Incarnation("d"))
    explanation = Explanation("", 1, (predicted,) if predicted else ())
    return Open(RequestId("r"), 0, epoch, PlacementId("p"), *workers, explanation=explanation)


PREDICTED = Candidate(
    0, 1, ttft_s=3.0, tpot_s=0.25, cost_s=1, cached_pages=0, fetched_pages=0, queue_s=0, transfer_s=0, is_local=False
)


@pytest.mark.parametrize(
    ("opens", "ratios"),
    [
        ([placed_once(PREDICTED)], (0.5, 2.0)),
        ([placed_once(PREDICTED), placed_once(PREDICTED, epoch=2)], (0, 0)),
        ([placed_once(None)], (0, 0)),
        ([dataclasses.replace(placed_once(None), explanation=None)], (0, 0)),
        ([placed_once(PREDICTED._replace(ttft_s=0.0))], (0, 0)),
    ],
    ids=["once", "moved", "nobody knows why", "older ingest", "nothing"],
)
def test_times_are_held_against_what_was_predicted_of_where_it_ran(metrics, registry, opens, ratios):
    state = a_request("abcde", FinishReason.STOP, STAMPS)
    state.choices[0].opens.extend(opens)
    metrics.observe_end(state, "completed", 14.5)
    told = ("baton_ttft_prediction_ratio_sum", "baton_tpot_prediction_ratio_sum")
    assert tuple(map(registry.get_sample_value, told)) == ratios


def test_what_was_refused_has_an_end_and_no_latency(metrics, registry):
    refused = dataclasses.replace(a_request("", FinishReason.REJECTED, {}), view=None)
    metrics.observe_end(refused, "rejected", 14.5)
    assert registry.get_sample_value("baton_requests_finished_total", {"status": "rejected"}) == 1
    assert registry.get_sample_value("vllm:time_to_first_token_seconds_count") == 0
    assert registry.get_sample_value("vllm:request_success_total", {"finished_reason": "rejected"}) is None
    assert stages(registry) == {}


def test_what_ended_early_adds_no_stage_that_is_none(metrics, registry):
    stamps = {event: STAMPS[event] for event in (Event.PLACED, Event.PREFILLING, Event.FIRST_TOKEN)}
    metrics.observe_end(a_request("ab", FinishReason.EXPIRED, stamps), "expired", 99.0)
    assert registry.get_sample_value("vllm:time_to_first_token_seconds_count") == 1
    assert stages(registry) == {}


def test_clocks_of_two_hosts_never_make_a_time_negative(metrics, registry):
    metrics.observe_end(a_request("abc", FinishReason.STOP, {**STAMPS, Event.PLACED: 10.0}), "completed", 14.5)
    assert stages(registry)["admitted_placed"] == 0


def test_the_first_failure_is_an_increase(registry, metrics):
    assert registry.get_sample_value("baton_requests_finished_total", {"status": "failed"}) == 0


def test_reasons_to_cut_begin_at_0(registry, metrics):
    for reason in ("deadline", "client gone"):
        assert registry.get_sample_value("baton_cuts_written_total", {"reason": reason}) == 0
