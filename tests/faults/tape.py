"""Histories made by hand: one salted request, record by record."""

import json
from dataclasses import replace

from services.ingest.admission import ModelFacts
from services.stream_out.results import result_of
from shared.blocks import token_ids
from shared.bus.port import Record
from shared.engine.fake import FAKE_VOCAB_SIZE, fake_answer
from shared.request import FinishReason, Incarnation, PlacementId, RequestId, SamplingParams, WorkerRef
from shared.wire.codec import encode
from shared.wire.results import HEADER_SOURCE_OFFSET, HEADER_SOURCE_PARTITION
from shared.wire.to_ingest import LogPosition, body_hash
from shared.wire.to_stream_out import Cut, Frame, FrameEntry, Open, View
from tests.fake_tokeniser import fake_tokeniser
from tests.faults.capture import Capture, Manner, Outcome, Received
from tests.faults.history import History, Rules, stream_of
from tests.faults.stories import read_stories

REQUEST = RequestId("r1")
TOKENISER = fake_tokeniser()
RULES = Rules(TOKENISER, ModelFacts("fake", 4096, FAKE_VOCAB_SIZE), salted=True, grace_s=5.0)
PROMPT = token_ids([300, 301, 302])
GREEDY = SamplingParams(max_tokens=4, seed=7, temperature=0, ignore_eos=True)
P1, D1, D2, D3 = (WorkerRef(slot, Incarnation(name)) for slot, name in enumerate(("p1", "d1", "d2", "d3")))
BEGIN_S = 1000.0
DEADLINE_S = 1100.0


def job_body(**changes):
    body = {"model": "fake", "user": "c1", "prompt": list(PROMPT), "max_tokens": 4, "temperature": 0, "seed": 7}
    return json.dumps(body | {"ignore_eos": True, "stream": True} | changes).encode()


def salted(placement, num, before=(), sampling=GREEDY):
    ids = PROMPT + token_ids(before)
    return fake_answer(ids, len(PROMPT), sampling, 0, num, salted_by=placement)


class Tape:
    """A history in the making: one job on `ingest`, and what is told of it, a tenth of a second a record."""

    def __init__(self, body=None, **view):
        self.body = body or job_body()
        self.now_s = BEGIN_S
        self.story = []
        self.letters = []
        self.view = View(
            tenant="default",
            model="fake",
            body_hash=body_hash(self.body),
            chat=False,
            num_choices=1,
            num_prompt_tokens=3,
            deadline_s=DEADLINE_S,
            job=LogPosition(3, 0),
            sampling=GREEDY,
        )
        self.view = replace(self.view, **view)

    def tell(self, message):
        self.now_s += 0.1
        self.story.append(Record("stream-out", 5, len(self.story), None, encode(message), (), self.now_s))
        return self

    def open(self, placement, epoch=1, decode=D1):
        view = self.view if epoch == 1 else None
        return self.tell(Open(REQUEST, 0, epoch, PlacementId(placement), P1, decode, view))

    def frame(self, placement, index, ids, worker=D1, finish=None, **entry):
        told = FrameEntry(REQUEST, 0, PlacementId(placement), index, token_ids(ids), finish=finish, **entry)
        return self.tell(Frame(worker, (told,), made_s=self.now_s))

    def cut(self, epoch, outcome=None, error=None, reason="worker lost", lost=None):
        return self.tell(Cut(REQUEST, 0, epoch, reason, outcome, error, lost=lost))

    def letter(self, value=None, offset=0):
        headers = ((HEADER_SOURCE_PARTITION, b"3"), (HEADER_SOURCE_OFFSET, str(offset).encode()))
        self.letters.append(Record("dead-letter", 3, 0, REQUEST.encode(), value or self.body, headers, self.now_s))
        return self

    def state(self):
        stories, _ = read_stories(self.story)
        return stories[REQUEST]

    def history(self, **changes):
        """With the right result."""
        headers = (("deadline-unix-ms", b"1100000"),)
        parts = {
            "ingest": [Record("ingest", 3, 0, REQUEST.encode(), self.body, headers, BEGIN_S)],
            "stream_out": self.story,
            "dead_letters": self.letters,
        }
        if "results" not in changes:
            parts["results"] = [result_record(encode(result_of(self.state().state, TOKENISER)))]
        return History(**(parts | changes))

    def capture(self, outcome=Outcome.DONE, **changes):
        """Of a client that streamed it."""
        events = [Received(BEGIN_S + 1, *event) for event in stream_of(self.state(), TOKENISER)]
        capture = Capture("c1", Manner.STREAM, BEGIN_S, 100.0, request_id=REQUEST, events=events, outcome=outcome)
        return replace(capture, ended_s=self.now_s, **changes)


def result_record(value, key=REQUEST):
    return Record("results", 5, 0, key.encode(), value, (), BEGIN_S + 2)


def resumed():
    """One request, its decode worker lost in the middle: tokens of placements a and b."""
    first = salted("a", 2)
    rest = salted("b", 2, first)
    return (
        Tape()
        .open("a")
        .frame("a", 0, first[:1], worker=P1, num_cached_tokens=0)
        .frame("a", 1, first[1:])
        .cut(2, lost=D1)
        .open("b", epoch=2, decode=D2)
        .frame("b", 2, rest[:1], worker=P1, num_cached_tokens=0)
        .frame("b", 3, rest[1:], worker=D2, finish=FinishReason.LENGTH)
    )
