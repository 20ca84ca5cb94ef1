"""Judges a run by what is left of it: the records of the topics, and what each client saw.

    ingest ──────> jobs ─────────────────────────────┐
    stream-out ──> fold ──> stories: tokens by the placement that made them, cuts, ends
    results ─────> one a job, the bytes that the fold gives ──> findings: plain sentences with request ids
    dead-letter ─> those that lost three workers      │         numbers
    captures ────> each event once, in order, as the log has it

Tokens are checked by the fake engine's rule, from the ids that the placement was given: in a salted run an answer that
mixes placements, or goes on behind tokens that were never accepted, has wrong tokens. So the fold is checked too.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from services.ingest.admission import Admission, Admitted, ModelFacts
from services.ingest.jobs import read_job
from services.stream_out.events import EventMaker
from services.stream_out.results import result_of
from services.stream_out.sse import format_event
from shared.blocks import TokenIds, token_ids
from shared.bus.port import Record
from shared.engine.fake import fake_answer
from shared.errors import RequestError
from shared.policy.fold import ChoiceState, RequestState
from shared.request import FinishReason, RequestId, keyed_request_id
from shared.text.tokeniser import Tokeniser
from shared.wire.codec import encode
from shared.wire.results import HEADER_SOURCE_OFFSET, HEADER_SOURCE_PARTITION, RESULT_DECODER, Result
from shared.wire.to_ingest import RESUME_DECODER
from tests.faults.capture import Capture, Manner, Outcome
from tests.faults.stories import ChoiceStory, Story, read_stories

MAX_LOSSES = 3
WORKERS_LOST = "workers_lost"
"""Code of the error of a request that lost that many workers in a row."""

SLACK_S = 1.0
"""Clocks of client, broker and services may differ so much, and a verdict may be so early or late."""

JOB_DEADLINE_S = 600.0
"""Of jobs that name none; none of a load's does."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What was done to a process.

    Attributes:
        kind: "kill", "stop", "cut redis", ...
        target: the process's name, as "decode-1", or "kafka", "redis".
        incarnation: of the worker, if it was one.
        address: of the edge, as clients call it, if it was one.
        until_s: when it was over; for a kill, when its successor was ready.
    """

    at_s: float
    until_s: float
    kind: str
    target: str
    incarnation: str = ""
    address: str = ""


@dataclass(frozen=True, slots=True)
class History:
    """All of a run. Records of a topic in the order of each partition, from its beginning."""

    ingest: Sequence[Record]
    stream_out: Sequence[Record]
    results: Sequence[Record]
    dead_letters: Sequence[Record]
    resumes: Sequence[Record] = ()
    captures: Sequence[Capture] = ()
    faults: Sequence[Fault] = ()


@dataclass(frozen=True, slots=True)
class Rules:
    """What the run was made with.

    Attributes:
        salted: the engines' tokens depend on the placement.
        grace_s: a request whose client is away for so long may be cancelled.
    """

    tokeniser: Tokeniser
    facts: ModelFacts
    salted: bool
    grace_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """The judgement: nothing is wrong if there are no findings."""

    findings: list[str]
    numbers: dict[str, Any]


def check(history: History, rules: Rules) -> Report:
    """What is wrong with a run that has come to rest, and what it did."""
    stories, findings = read_stories(history.stream_out)
    checker = _Checker(history, rules, stories)
    findings += checker.findings()
    return Report(findings, checker.numbers())


def stream_of(story: Story, tokeniser: Tokeniser) -> list[tuple[str, str]]:
    """(id, data) of all events of a stream from its beginning, as any edge makes them of the log."""
    maker = EventMaker(tokeniser)
    made: list[tuple[str, str]] = []
    for offset, changes in story.changes:
        for event in maker.make(offset, changes):
            told = format_event(story.state.request_id, event.cursor, event.body).decode().split("\n")
            made.append((told[0].removeprefix("id: "), told[1].removeprefix("data: ")))
    return made


class _Checker:
    """One judgement."""

    def __init__(self, history: History, rules: Rules, stories: Mapping[RequestId, Story]) -> None:
        self._history = history
        self._rules = rules
        self._stories = stories
        self._admission = Admission(rules.tokeniser, rules.facts)
        self._jobs = _by_key(history.ingest)
        self._results = _by_key(history.results)
        self._resumes = _by_key(history.resumes)
        self._letters = _by_key(history.dead_letters)
        self._at = {(record.partition, record.offset): record for record in history.ingest}
        self._captures: dict[RequestId, list[Capture]] = defaultdict(list)
        self._by_name = {capture.name: capture for capture in history.captures}
        for capture in history.captures:
            request_id = _id_of(capture)
            if request_id is not None:
                self._captures[request_id].append(capture)

    def findings(self) -> list[str]:
        found: list[str] = []
        for request_id in self._jobs:
            found += [f"{request_id}: {finding}" for finding in self._of_request(request_id)]
        for request_id in self._results.keys() - self._jobs.keys():
            found.append(f"{request_id}: has a result, but no job stands on ingest")
        for request_id in self._stories.keys() - self._jobs.keys():
            if self._stories[request_id].state.view is not None:
                found.append(f"{request_id}: is told of on stream-out, but no job stands on ingest")
        for request_id in self._letters.keys() - self._jobs.keys():
            found.append(f"{request_id}: stands on dead-letter, but no job stands on ingest")
        for capture in self._history.captures:
            found += [
                f"{capture.request_id or '(no id)'} of client {capture.name}: {finding}"
                for finding in self._of_capture(capture)
            ]
        return found

    # What the log says of a request

    def _of_request(self, request_id: RequestId) -> Iterator[str]:
        results = self._results.get(request_id, [])
        story = self._stories.get(request_id)
        if story is None or not story.state.finished:
            yield "was accepted and has no end on stream-out"
            if results:
                yield "has a result before its end"
            return
        if not results:
            yield "was accepted and ended, but has no result"
            return
        if len({record.value for record in results}) > 1:
            yield f"has {len(results)} results that differ"
        result = RESULT_DECODER.decode(results[0].value)
        expected = result_of(story.state, self._rules.tokeniser)
        if encode(expected) != results[0].value:
            yield f"its result is not what the fold says: {result.status} instead of {expected.status}, or another text"
        yield from self._of_tokens(story)
        yield from self._of_resumes(request_id, story)
        yield from self._of_end(request_id, story, expected)
        if expected.status == "completed" and expected.response is not None:
            yield from self._of_texts(story, expected.response)

    def _of_tokens(self, story: Story) -> Iterator[str]:
        """Each token must be the one that its placement makes of what was accepted before it."""
        if not any(choice.grown for choice in story.choices.values()):
            return
        admitted = self._admitted(story.state)
        if isinstance(admitted, str):
            yield admitted
            return
        view = story.state.view
        assert view is not None
        sampling = replace(admitted.sampling, max_tokens=view.sampling.max_tokens)
        if sampling != view.sampling:
            yield f"runs with other parameters than its job asks for: {view.sampling}"
        for index, choice in sorted(story.choices.items()):
            yield from self._of_choice(story.state, index, choice, admitted.prompt_ids)

    def _admitted(self, state: RequestState) -> Admitted | str:
        assert state.view is not None
        record = self._at.get((state.view.job.partition, state.view.job.offset))
        if record is None or record.key != state.request_id.encode():
            return f"its job does not stand where its view says, {state.view.job}"
        try:
            return self._admission.admit(read_job(record, default_deadline_s=JOB_DEADLINE_S), None)
        except RequestError as error:
            return f"has tokens, but its job is to be refused: {error.message}"

    def _of_choice(self, state: RequestState, index: int, choice: ChoiceStory, prompt: TokenIds) -> Iterator[str]:
        assert state.view is not None
        sampling = state.view.sampling
        ids = token_ids(())
        for growth in choice.grown:
            if growth.index != len(ids):
                yield f"choice {index} goes on at {growth.index} behind {len(ids)} tokens"
                return
            expected = fake_answer(
                prompt + ids,
                len(prompt),
                sampling,
                index,
                len(growth.ids),
                eos_token_ids=self._rules.tokeniser.eos_ids,
                vocab_size=self._rules.facts.vocab_size,
                salted_by=growth.placement if self._rules.salted else None,
            )
            if list(growth.ids) != expected:
                wrong = next(
                    (k for k, pair in enumerate(zip(growth.ids, expected, strict=False)) if pair[0] != pair[1]), 0
                )
                yield (
                    f"choice {index} has at {growth.index + wrong} a token that placement {growth.placement} does not"
                    f" make of what was accepted before: {list(growth.ids)} instead of {expected}"
                )
                return
            ids += growth.ids
        if ids != state.choice(index).ids:
            yield f"choice {index} has other ids in the fold than came record by record"
        yield from self._of_finish(state, index, state.choice(index))

    def _of_finish(self, state: RequestState, index: int, choice: ChoiceState) -> Iterator[str]:
        """Whether a worker's end is right: neither early nor late."""
        assert state.view is not None
        sampling, stops = state.view.sampling, state.view.stop_strings
        ends = sampling.ends(frozenset(self._rules.tokeniser.eos_ids))
        ended_by_id = (
            len(choice.ids) > sampling.min_tokens and choice.ids[-1:].tolist()[0] in ends if choice.ids else False
        )
        armed_before = choice.ids[:-1] if len(choice.ids) - 1 >= max(1, sampling.min_tokens) else choice.ids[:0]
        if sampling.min_tokens == 0 and any(stop in self._text(armed_before, ends) for stop in stops):
            yield f"choice {index} goes on behind a stop string"
        match choice.end.finish if choice.end is not None else None:
            case FinishReason.LENGTH if len(choice.ids) != sampling.max_tokens:
                yield f"choice {index} ended by length with {len(choice.ids)} of {sampling.max_tokens} tokens"
            case FinishReason.STOP if not ended_by_id and not any(
                stop in self._text(choice.ids, ends) for stop in stops
            ):
                yield f"choice {index} was stopped by nothing that its {len(choice.ids)} tokens hold"
            case _:
                pass

    def _text(self, ids: TokenIds, ends: frozenset[int]) -> str:
        return self._rules.tokeniser.decode([token_id for token_id in ids if token_id not in ends])

    def _of_resumes(self, request_id: RequestId, story: Story) -> Iterator[str]:
        """What was to be placed again must go on behind what was accepted."""
        for record in self._resumes.get(request_id, ()):
            resume = RESUME_DECODER.decode(record.value)
            accepted = story.state.choice(resume.choice).ids[: len(resume.accepted_ids)]
            if resume.accepted_ids != accepted:
                yield f"choice {resume.choice} was resumed for epoch {resume.epoch} behind other ids than the accepted"

    def _of_texts(self, story: Story, response: Mapping[str, Any]) -> Iterator[str]:
        """The answer's text, made another way than the edge makes it."""
        view = story.state.view
        assert view is not None
        if view.sampling.min_tokens:
            return  # a stop string that came too early is ordinary text, which takes a matcher to tell
        ends = view.sampling.ends(frozenset(self._rules.tokeniser.eos_ids))
        for told in response["choices"]:
            text = self._text(story.state.choice(told["index"]).ids, ends)
            cuts = [text.find(stop) for stop in view.stop_strings if stop in text]
            expected = text[: min(cuts)] if cuts else text
            if _text_of(told) != expected:
                yield f"choice {told['index']} has the text {_text_of(told)!r}, its tokens say {expected!r}"

    # Whether its end is one that may be

    def _of_end(self, request_id: RequestId, story: Story, result: Result) -> Iterator[str]:
        by_losses = result.status == "failed" and result.error is not None and result.error.code == WORKERS_LOST
        if request_id in self._letters and not by_losses:
            yield f"stands on dead-letter, though it ended as {result.status}"
        match result.status:
            case "completed":
                return
            case "failed" if not by_losses:
                yield f"failed, though nothing was wrong with it: {result.error}"
            case "failed":
                yield from self._of_losses(story)
                yield from self._of_letters(request_id, story)
            case "rejected":
                error = result.error
                if error is None or error.http_status not in {429, 503} or error.retry_after_s is None:
                    yield f"was rejected, though nothing was wrong with it: {error}"
            case "expired":
                yield from self._of_expiry(story)
            case _:
                yield from self._of_cancellation(request_id, story)

    def _of_losses(self, story: Story) -> Iterator[str]:
        """Three in a row without a token between them, each of a worker that something had been done to."""
        lost = [choice.losses for choice in story.choices.values() if len(choice.losses) >= MAX_LOSSES]
        if not lost:
            yield f"failed for {MAX_LOSSES} lost workers, but lost fewer in a row"
        hit = {fault.incarnation for fault in self._history.faults}
        if any(fault.target.startswith(("kafka", "redis")) for fault in self._history.faults):
            return  # whoever was cut off from what went away may be taken for lost
        for incarnation in {incarnation for losses in lost for incarnation in losses} - hit:
            yield f"lost worker {incarnation}, which nothing had been done to"

    def _of_letters(self, request_id: RequestId, story: Story) -> Iterator[str]:
        assert story.state.view is not None
        job = story.state.view.job
        if request_id not in self._letters:
            yield f"failed for {MAX_LOSSES} lost workers, but does not stand on dead-letter"
        for letter in self._letters.get(request_id, ()):
            headers = dict(letter.headers)
            source = (headers.get(HEADER_SOURCE_PARTITION), headers.get(HEADER_SOURCE_OFFSET))
            if source != (str(job.partition).encode(), str(job.offset).encode()):
                yield f"its dead-letter names another place than its job's: {source}"
            elif letter.value != self._at[job.partition, job.offset].value:
                yield "its dead-letter has other bytes than its job"

    def _of_expiry(self, story: Story) -> Iterator[str]:
        view, finished_s = story.state.view, story.finished_s
        assert view is not None
        assert finished_s is not None
        if finished_s < view.deadline_s - SLACK_S:
            yield f"expired {view.deadline_s - finished_s:.1f} s before its deadline"

    def _of_cancellation(self, request_id: RequestId, story: Story) -> Iterator[str]:
        assert story.finished_s is not None
        at_s = story.finished_s
        captures = self._captures.get(request_id) or self._captures_by_user(request_id)
        if not any(self._may_be_cancelled(capture, request_id, at_s) for capture in captures):
            reason = story.state.cut_reason
            yield f"was cancelled ({reason}), but no client had left it or asked for that"

    def _captures_by_user(self, request_id: RequestId) -> list[Capture]:
        """Who sent the job, where the client was never told its id."""
        names = {_user_of(record.value) for record in self._jobs[request_id]}
        return [self._by_name[name] for name in names if name in self._by_name]

    def _may_be_cancelled(self, capture: Capture, request_id: RequestId, at_s: float) -> bool:
        asked_s = capture.delete_asked_s
        if asked_s is not None and at_s >= asked_s - SLACK_S:
            return True
        if _id_of(capture) != request_id:
            return True  # told another id, or none: nobody attends to this job
        grace_s = self._rules.grace_s - SLACK_S
        if any(to_s - from_s >= grace_s and from_s + grace_s <= at_s for from_s, to_s in capture.silences):
            return True
        gone_s = capture.left_s if capture.left_s is not None else capture.ended_s
        if capture.outcome in {Outcome.LEFT, Outcome.LOST_TRACK, Outcome.NO_END} and gone_s is not None:
            return at_s >= gone_s + grace_s or bool(capture.silences)
        edges = {attempt.edge for attempt in capture.attempts}
        return any(
            fault.address in edges and fault.at_s <= at_s and fault.until_s >= capture.sent_s
            for fault in self._history.faults
            if fault.address
        )

    # What the clients saw

    def _of_capture(self, capture: Capture) -> Iterator[str]:
        if capture.outcome is Outcome.NO_END:
            yield f"has waited {capture.timeout_s:.0f} s and more, and has no end"
        if capture.outcome is Outcome.UNKNOWN:
            yield "was told that there is no such request"
        if capture.outcome is Outcome.OPEN:
            yield "is still waiting"
        request_id = capture.request_id
        if request_id is None or (capture.manner is Manner.JOB and capture.outcome is not Outcome.SENT):
            return
        if request_id not in self._jobs:
            yield "was told that it is accepted, but no job stands on ingest"
            return
        story, records = self._stories.get(RequestId(request_id)), self._results.get(RequestId(request_id))
        if story is None or not story.state.finished or not records:
            return  # said of the request already
        result = RESULT_DECODER.decode(records[0].value)
        if capture.manner is Manner.STREAM:
            yield from self._of_events(capture, story)
        yield from _of_outcome(capture, result)

    def _of_events(self, capture: Capture, story: Story) -> Iterator[str]:
        expected = stream_of(story, self._rules.tokeniser)
        for place, event in enumerate(capture.events):
            if place >= len(expected):
                yield f"got {event.id} behind the end"
                return
            if (event.id, event.data) == expected[place]:
                continue
            ids = [event_id for event_id, _ in expected]
            if event.id not in ids:
                yield f"got {event.id}, which the log does not have"
            elif ids.index(event.id) < place:
                yield f"got {event.id} again or out of order, as its event {place}"
            elif ids.index(event.id) > place:
                yield f"did not get {ids[place]} before {event.id}"
            else:
                yield f"got {event.id} as {event.data}, the log says {expected[place][1]}"
            return
        whole = capture.outcome is Outcome.DONE or (capture.outcome is Outcome.ERROR and not capture.answer)
        if whole and len(capture.events) < len(expected):
            yield f"ended behind {len(capture.events)} of {len(expected)} events"

    # Numbers

    def numbers(self) -> dict[str, Any]:
        ends = Counter(
            RESULT_DECODER.decode(records[0].value).status
            for key, records in self._results.items()
            if key in self._jobs
        )
        choices = [choice for story in self._stories.values() for choice in story.choices.values() if choice.placed]
        return {
            "requests": len(self._jobs),
            "requests_by_end": dict(ends),
            "requests_without_result": len(self._jobs.keys() - self._results.keys()),
            "clients_by_outcome": dict(Counter(str(capture.outcome) for capture in self._history.captures)),
            "tokens": sum(len(growth.ids) for choice in choices for growth in choice.grown),
            "events_received": sum(len(capture.events) for capture in self._history.captures),
            "streams_resumed": sum(capture.num_resumes > 0 for capture in self._history.captures),
            "resumes": sum(capture.num_resumes for capture in self._history.captures),
            "choices_by_placements": dict(sorted(Counter(len(choice.placed) for choice in choices).items())),
            "result_copies": sum(len(records) - 1 for records in self._results.values()),
            "dead_letters": len(self._letters),
            "faults_by_kind": dict(Counter(_name_of(fault) for fault in self._history.faults)),
        }


def _name_of(fault: Fault) -> str:
    return f"{fault.kind} {fault.target.rpartition('-')[0] or fault.target}"


def _of_outcome(capture: Capture, result: Result) -> Iterator[str]:
    """Whether what the client was told at the end is the result."""
    if capture.outcome is Outcome.DONE:
        if result.status != "completed" or result.response is None:
            yield f"has a whole answer, but the result is {result.status}"
        elif capture.manner is Manner.WHOLE and json.loads(capture.answer) != result.response:
            yield "has another answer than the result"
        elif capture.manner is Manner.STREAM:
            yield from _of_streamed_text(capture, result.response)
    elif capture.outcome is Outcome.ERROR:
        if result.error is None:
            yield f"has an error, but the result is {result.status}"
            return
        told = json.loads(capture.answer or capture.events[-1].data)["error"]
        if told["message"] != result.error.message or told["code"] != result.error.code:
            yield f"was told {told}, the result says {result.error}"
        if capture.answer and capture.status != result.error.http_status:
            yield f"has status {capture.status}, the result says {result.error.http_status}"


def _of_streamed_text(capture: Capture, response: Mapping[str, Any]) -> Iterator[str]:
    parts: dict[int, list[str]] = defaultdict(list)
    for event in capture.events:
        for choice in json.loads(event.data).get("choices", ()):
            parts[choice["index"]].append(_text_of(choice))
    for choice in response["choices"]:
        streamed = "".join(parts[choice["index"]])
        if streamed != _text_of(choice):
            yield f"choice {choice['index']} was streamed as {streamed!r}, the result has {_text_of(choice)!r}"


def _text_of(choice: Mapping[str, Any]) -> str:
    """The text of a choice of any shape."""
    if "text" in choice:
        return choice["text"]
    return choice.get("delta", choice.get("message", {})).get("content") or ""


def _by_key(records: Sequence[Record]) -> dict[RequestId, list[Record]]:
    found: dict[RequestId, list[Record]] = defaultdict(list)
    for record in records:
        found[RequestId((record.key or b"").decode("utf-8", "replace"))].append(record)
    return dict(found)


def _id_of(capture: Capture) -> RequestId | None:
    if capture.request_id is not None:
        return RequestId(capture.request_id)
    return None if capture.key is None else keyed_request_id(capture.tenant, capture.key)


def _user_of(body: bytes) -> str:
    try:
        return str(json.loads(body).get("user", ""))
    except (ValueError, AttributeError):
        return ""
