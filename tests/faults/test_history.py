"""The judge finds each kind of wrong in a history made by hand, and nothing in a good one."""

import json
from dataclasses import replace

import pytest

from services.stream_out.results import cancelled_error
from shared.blocks import token_ids
from shared.bus.port import Record
from shared.engine.fake import fake_answer
from shared.request import FinishReason, Incarnation, RequestId, TokenLogprob
from shared.wire.codec import encode
from shared.wire.results import RESULT_DECODER
from shared.wire.to_ingest import LogPosition, Resume
from shared.wire.to_stream_out import Attach, ErrorBody
from tests.faults.capture import Attempt, Manner, Outcome
from tests.faults.history import Fault, check
from tests.faults.tape import (
    BEGIN_S,
    D1,
    D2,
    D3,
    GREEDY,
    P1,
    PROMPT,
    REQUEST,
    RULES,
    TOKENISER,
    Tape,
    job_body,
    result_record,
    resumed,
    salted,
)


def ended(outcome, error=None, reason="test", **view):
    """Some tokens, then a cut with an outcome."""
    return Tape(**view).open("a").frame("a", 0, salted("a", 2), worker=P1).cut(2, outcome, error, reason)


def findings(history):
    return check(history, RULES).findings


def found(history, part):
    """Whether some finding says `part`, and all name the request."""
    told = findings(history)
    assert all(finding.startswith(("r1", "(no id)", "other")) for finding in told), told
    return any(part in finding for finding in told)


# Good ones.


def test_a_resumed_stream_is_right_and_counted():
    tape = resumed()
    report = check(tape.history(captures=[tape.capture(num_resumes=1)]), RULES)
    assert report.findings == []
    assert report.numbers["requests_by_end"] == {"completed": 1}
    assert (report.numbers["tokens"], report.numbers["streams_resumed"]) == (4, 1)
    assert report.numbers["choices_by_placements"] == {2: 1}


def test_copies_of_records_and_of_results_are_nothing():
    tape = resumed()
    copies = [replace(record, offset=record.offset + len(tape.story)) for record in tape.story]
    good = tape.history()
    assert findings(replace(good, stream_out=[*tape.story, *copies], results=good.results * 2)) == []


def test_an_engine_without_salt_is_checked_by_the_plain_rule():
    ids = fake_answer(PROMPT, 3, GREEDY)
    plain = replace(RULES, salted=False)
    good = Tape().open("a").frame("a", 0, ids, finish=FinishReason.LENGTH)
    assert check(good.history(), plain).findings == []
    bad = Tape().open("a").frame("a", 0, [*ids[:3], ids[3] + 1], finish=FinishReason.LENGTH)
    assert "has at 3 a token" in check(bad.history(), plain).findings[0]


# Ends and results.


def test_a_job_without_a_story_was_lost():
    assert found(resumed().history(stream_out=[], results=[]), "has no end on stream-out")


def test_a_job_whose_story_stops_was_lost():
    tape = Tape().open("a").frame("a", 0, salted("a", 2))
    assert found(tape.history(results=[]), "has no end on stream-out")


def test_an_end_without_result():
    assert found(resumed().history(results=[]), "has no result")


def test_results_that_differ():
    good = resumed().history()
    other = result_record(good.results[0].value + b" ")
    assert found(replace(good, results=[*good.results, other]), "2 results that differ")


def test_a_result_that_the_fold_does_not_give():
    good = resumed().history()
    result = RESULT_DECODER.decode(good.results[0].value)
    result.response["choices"][0]["text"] += "!"
    assert found(replace(good, results=[result_record(encode(result))]), "not what the fold says")


def test_what_has_no_job():
    good = resumed().history()
    other = result_record(good.results[0].value, key=RequestId("other"))
    assert found(replace(good, results=[*good.results, other]), "other: has a result, but no job")
    assert found(replace(good, ingest=[], results=[]), "is told of on stream-out, but no job")


def test_what_cannot_be_read():
    good = resumed().history()
    garbage = replace(good.stream_out[0], value=b"{", offset=90)
    (finding,) = findings(replace(good, stream_out=[*good.stream_out, garbage]))
    assert finding.startswith("stream-out 5:90 cannot be read")


# Tokens.


def test_a_splice_of_two_placements():
    first = salted("a", 2)
    stale = salted("a", 2, first)
    tape = Tape().open("a").frame("a", 0, first).cut(2).open("b", epoch=2, decode=D2)
    tape.frame("b", 2, stale, worker=D2, finish=FinishReason.LENGTH)
    assert found(tape.history(), "has at 2 a token that placement b does not make")


def test_a_placement_that_went_on_behind_what_was_never_accepted():
    first = salted("a", 2)
    rest = salted("b", 2, [*first[:1], first[1] + 1])
    tape = Tape().open("a").frame("a", 0, first).cut(2).open("b", epoch=2, decode=D2)
    tape.frame("b", 2, rest, worker=D2, finish=FinishReason.LENGTH)
    assert found(tape.history(), "has at 2 a token")


@pytest.mark.parametrize("place", range(4))
def test_a_changed_token(place):
    ids = salted("a", 4)
    ids[place] = (ids[place] + 1) % 1000
    tape = Tape().open("a").frame("a", 0, ids, finish=FinishReason.LENGTH)
    assert found(tape.history(), f"has at {place} a token")


def test_an_end_that_is_too_early_or_has_no_cause():
    early = Tape().open("a").frame("a", 0, salted("a", 3), finish=FinishReason.LENGTH)
    assert found(early.history(), "ended by length with 3 of 4 tokens")
    for_nothing = Tape().open("a").frame("a", 0, salted("a", 3), finish=FinishReason.STOP)
    assert found(for_nothing.history(), "was stopped by nothing")


def test_a_stop_string_ends_a_choice_where_it_is_and_not_later():
    def tape(stop_at):
        stop = TOKENISER.decode(salted("a", 4)[:stop_at])[-3:]
        return Tape(job_body(stop=[stop]), stop_strings=(stop,)).open("a")

    stopped = tape(4).frame("a", 0, salted("a", 4), finish=FinishReason.STOP)
    assert findings(stopped.history()) == []
    missed = tape(2).frame("a", 0, salted("a", 4), finish=FinishReason.LENGTH)
    assert found(missed.history(), "goes on behind a stop string")


def test_other_parameters_than_the_job_asks_for():
    sampling = replace(GREEDY, seed=8)
    tape = Tape(sampling=sampling).open("a").frame("a", 0, salted("a", 4), finish=FinishReason.LENGTH)
    assert found(tape.history(), "runs with other parameters")


def test_a_view_that_names_another_place():
    tape = Tape(job=LogPosition(3, 1)).open("a").frame("a", 0, salted("a", 4), finish=FinishReason.LENGTH)
    assert found(tape.history(), "does not stand where its view says")


@pytest.mark.parametrize(("change", "is_right"), [(0, True), (1, False)])
def test_a_request_is_resumed_behind_what_was_accepted(change, is_right):
    first = salted("a", 2)
    resume = Resume(REQUEST, 0, 2, LogPosition(3, 0), 4, token_ids([first[0], first[1] + change]))
    record = Record("ingest-resume", 5, 0, REQUEST.encode(), encode(resume), (), BEGIN_S)
    assert found(resumed().history(resumes=[record]), "behind other ids than the accepted") is not is_right


# Whether an end may be.


CANCELLED = (FinishReason.CANCELLED, cancelled_error("client gone"), "client gone")


def test_cancelled_for_no_reason():
    tape = ended(*CANCELLED)
    assert found(tape.history(), "no client had left it")
    watching = tape.capture(Outcome.ERROR)
    assert found(tape.history(captures=[watching]), "no client had left it")
    early = tape.capture(Outcome.LEFT, left_s=BEGIN_S)
    assert found(tape.history(captures=[early]), "no client had left it")
    unheard = tape.capture(Outcome.ERROR, silences=[(BEGIN_S - 2.0, BEGIN_S)])
    assert found(tape.history(captures=[unheard]), "no client had left it")


@pytest.mark.parametrize(
    ("outcome", "changes"),
    [
        (Outcome.LEFT, {"left_s": BEGIN_S - 10}),
        (Outcome.ERROR, {"delete_asked_s": BEGIN_S + 0.2}),
        (Outcome.ERROR, {"silences": [(BEGIN_S - 6, BEGIN_S)]}),
        (Outcome.LOST_TRACK, {"request_id": None, "events": []}),
        (Outcome.ERROR, {"attempts": [Attempt(BEGIN_S, "post", "http://edge")]}),
    ],
)
def test_cancelled_for_a_reason(outcome, changes):
    tape = ended(*CANCELLED)
    pause = Fault(BEGIN_S - 5, BEGIN_S + 0.1, "stop", "edge-0", address="http://edge")
    assert findings(tape.history(captures=[tape.capture(outcome, **changes)], faults=[pause])) == []


def test_expired_in_time_and_before():
    late = {"deadline_s": BEGIN_S + 0.2}
    body = (("deadline-unix-ms", b"1000200"),)
    good = ended(FinishReason.EXPIRED, **late)
    job = Record("ingest", 3, 0, REQUEST.encode(), good.body, body, BEGIN_S)
    assert findings(good.history(ingest=[job])) == []
    assert found(ended(FinishReason.EXPIRED).history(), "before its deadline")


def test_failed_and_rejected_for_no_reason():
    error = ErrorBody("broken", "server_error", 500)
    assert found(ended(FinishReason.FAILED, error).history(), "failed, though nothing was wrong")
    assert found(ended(FinishReason.REJECTED, error).history(), "was rejected, though nothing was wrong")
    busy = ErrorBody("busy", "server_error", 503, retry_after_s=2.0)
    assert findings(ended(FinishReason.REJECTED, busy).history()) == []


LOST = ErrorBody("three workers were lost", "server_error", 500, code="workers_lost")


def thrice_lost(num_progress=0):
    """Three placements cut for lost workers; the last `num_progress` of them made a token first."""
    tape, ids = Tape(), []
    for number, decode in enumerate((D1, D2, D3), 1):
        placement = f"pl{number}"
        tape.open(placement, epoch=number, decode=decode)
        if number > 3 - num_progress:
            token = salted(placement, 1, ids)
            tape.frame(placement, len(ids), token, worker=P1)
            ids += token
        last = number == 3
        tape.cut(number + 1, FinishReason.FAILED if last else None, LOST if last else None, lost=decode)
    return tape


def test_three_losses_in_a_row_end_a_request():
    tape = thrice_lost().letter()
    assert findings(tape.history()) != []  # no fault explains them
    faults = [Fault(BEGIN_S, BEGIN_S, "kill", name, incarnation=name) for name in ("d1", "d2", "d3")]
    assert findings(tape.history(faults=faults)) == []
    assert found(tape.history(faults=faults[:2]), "lost worker d3, which nothing had been done to")
    redis = Fault(BEGIN_S, BEGIN_S, "stop", "redis")
    assert findings(tape.history(faults=[redis])) == []


def test_failed_for_fewer_losses():
    assert found(thrice_lost(num_progress=1).letter().history(), "lost fewer in a row")


def test_dead_letters():
    assert found(thrice_lost().history(), "does not stand on dead-letter")
    assert found(thrice_lost().letter(b"other").history(), "other bytes than its job")
    assert found(thrice_lost().letter(offset=4).history(), "names another place")
    assert found(resumed().letter().history(), "stands on dead-letter, though it ended as completed")


# What clients saw.


def of_client(change, outcome=Outcome.DONE):
    """The findings about a good run whose client's events were changed."""
    tape = resumed()
    capture = tape.capture(outcome)
    change(capture.events)
    return tape.history(captures=[capture])


def swap(events):
    events[1], events[2] = events[2], events[1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda events: events.insert(1, events[0]), "again or out of order, as its event 1"),
        (lambda events: events.pop(1), "did not get r1:2.0 before r1:5.0"),
        (swap, "did not get r1:2.0 before r1:5.0"),
        (lambda events: events.pop(), "ended behind 4 of 5 events"),
        (lambda events: events.append(events[0]), "got r1:1.0 behind the end"),
        (lambda events: events.insert(2, replace(events[2], id="r1:3.0")), "which the log does not have"),
        (lambda events: events.insert(2, replace(events.pop(2), data="{}")), "the log says"),
    ],
)
def test_events_of_a_stream(change, told):
    assert found(of_client(change), told)


def test_a_client_that_left_need_not_have_all():
    assert findings(of_client(lambda events: events.pop(), Outcome.LEFT)) == []
    assert found(of_client(lambda events: events.pop(1), Outcome.LEFT), "did not get")


@pytest.mark.parametrize(
    ("outcome", "told"),
    [(Outcome.NO_END, "has no end"), (Outcome.UNKNOWN, "no such request"), (Outcome.OPEN, "still waiting")],
)
def test_a_client_without_an_answer(outcome, told):
    assert found(of_client(lambda _: None, outcome), told)


def test_a_client_that_was_told_of_a_job_which_is_not_there():
    tape = resumed()
    history = tape.history(captures=[tape.capture()], ingest=[], stream_out=[], results=[])
    assert found(history, "was told that it is accepted")


def test_a_whole_answer_is_the_result():
    tape = resumed()
    good = tape.history()
    response = RESULT_DECODER.decode(good.results[0].value).response
    capture = tape.capture(manner=Manner.WHOLE, events=[], answer=json.dumps(response), status=200)
    assert findings(replace(good, captures=[capture])) == []
    other = replace(capture, answer=json.dumps(response | {"model": "x"}))
    assert found(replace(good, captures=[other]), "has another answer than the result")


def test_an_error_is_that_of_the_result():
    tape = ended(*CANCELLED)
    left = {"delete_asked_s": BEGIN_S}
    assert findings(tape.history(captures=[tape.capture(Outcome.ERROR, **left)])) == []
    assert found(tape.history(captures=[tape.capture(Outcome.DONE, **left)]), "has a whole answer, but")
    told = json.dumps({"error": {"message": "no", "type": "x", "param": None, "code": None}})
    refused = tape.capture(Outcome.ERROR, manner=Manner.WHOLE, events=[], answer=told, status=500, **left)
    assert found(tape.history(captures=[refused]), "the result says")
    good = resumed()
    assert found(good.history(captures=[replace(refused, events=[])]), "has an error, but the result is completed")


def test_attaching_and_logprobs_change_nothing():
    ids = salted("a", 4)
    logprobs = tuple(TokenLogprob(-(1 + token % 7) / 8, ()) for token in ids)
    tape = Tape(job_body(logprobs=0), sampling=replace(GREEDY, logprobs=0)).open("a")
    tape.tell(Attach(REQUEST, Incarnation("edge"), "s"))
    tape.frame("a", 0, ids, finish=FinishReason.LENGTH, logprobs=logprobs)
    assert findings(tape.history(captures=[tape.capture()])) == []
