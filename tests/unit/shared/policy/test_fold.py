"""The fold under random schedules: zombies, duplicates, delays, competing placements and cuts."""

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.blocks import token_ids
from shared.policy.fold import Ended, Finished, Grew, Loss, Opened, PartitionFold, Vacated, Voided
from shared.request import FinishReason, Incarnation, PlacementId, RequestId, WorkerRef
from shared.wire.to_ingest import LogPosition
from shared.wire.to_stream_out import Attach, Cut, Detach, Frame, FrameEntry, Open, View
from shared.wire.topics import MAX_DEADLINE_S
from shared.wire.wire_format import WireFormat

REQUEST = RequestId("r")
PREFILL = WorkerRef(0, Incarnation("p"))
DECODE = WorkerRef(1, Incarnation("d"))


def a_view(num_choices=1, edge=None):
    return View(
        tenant="t",
        model="m",
        body_hash="h",
        chat=False,
        num_choices=num_choices,
        num_prompt_tokens=3,
        deadline_s=100.0,
        job=LogPosition(0, 0),
        edge=edge,
    )


def an_open(placement, epoch=1, choice=0, **view):
    return Open(REQUEST, choice, epoch, PlacementId(placement), PREFILL, DECODE, a_view(**view) if epoch == 1 else None)


def a_frame(placement, index, ids, finish=None):
    return Frame(
        DECODE, (FrameEntry(REQUEST, 0, PlacementId(placement), index, token_ids(ids), finish=finish),), made_s=0.0
    )


def a_prefill_frame(placement, index, ids):
    entry = FrameEntry(REQUEST, 0, PlacementId(placement), index, token_ids(ids))
    return Frame(PREFILL, (entry,), made_s=0.0)


def a_cut(epoch, outcome=None, choice=0, lost=None):
    return Cut(REQUEST, choice, epoch, "test", outcome, lost=lost)


def fold_all(*messages):
    fold = PartitionFold()
    changes = [change for offset, message in enumerate(messages) for change in fold.apply(offset, 0.0, message)]
    return fold.requests[REQUEST], changes


def kinds(changes):
    return [type(change) for change in changes]


def test_choices_that_the_request_did_not_ask_for_are_void():
    """Two jobs under one id, the second with a larger `n`: the request is the one that was opened first."""
    stray = Frame(DECODE, (FrameEntry(REQUEST, 1, PlacementId("b"), 0, token_ids([5])),), made_s=0.0)
    state, changes = fold_all(
        stray,
        an_open("a"),
        an_open("b", choice=1, num_choices=2),
        stray,
        a_cut(2, FinishReason.CANCELLED, choice=1),
        a_frame("a", 0, [7], FinishReason.LENGTH),
    )
    assert state.finished
    assert list(state.choices) == [0]
    assert [change.placement for change in changes if isinstance(change, Voided)] == ["b"] * 4


def test_a_plain_life():
    state, changes = fold_all(an_open("a"), a_frame("a", 0, [7]), a_frame("a", 1, [8, 9], FinishReason.LENGTH))
    assert kinds(changes) == [Opened, Grew, Grew, Ended, Finished]
    assert list(state.choice(0).ids) == [7, 8, 9]
    assert state.choice(0).end.finish is FinishReason.LENGTH


def test_frames_before_their_open_are_held_and_others_void():
    state, changes = fold_all(a_frame("a", 0, [1]), a_frame("b", 0, [2]), an_open("b"), an_open("a"))
    assert list(state.choice(0).ids) == [2]
    assert [change.placement for change in changes if isinstance(change, Voided)] == ["a", "a", "a"]


def test_overlap_is_trimmed_and_a_gap_is_held_until_filled():
    state, _ = fold_all(
        an_open("a"), a_frame("a", 0, [1]), a_frame("a", 3, [4]), a_frame("a", 0, [1, 2]), a_frame("a", 2, [3])
    )
    assert list(state.choice(0).ids) == [1, 2, 3, 4]


def test_a_cut_makes_the_old_placement_void_and_the_next_epoch_goes_on():
    state, changes = fold_all(
        an_open("a"),
        a_frame("a", 0, [1]),
        a_cut(2),
        a_frame("a", 1, [66]),
        an_open("late", epoch=1),
        an_open("b", epoch=2),
        a_frame("b", 1, [2], FinishReason.STOP),
    )
    assert list(state.choice(0).ids) == [1, 2]
    assert Vacated in kinds(changes)
    assert state.finished


def test_it_keeps_the_placements_that_counted():
    state, _ = fold_all(an_open("a"), an_open("a"), an_open("void"), a_cut(2), an_open("late"), an_open("b", epoch=2))
    assert [(opened.placement, opened.epoch) for opened in state.choice(0).opens] == [("a", 1), ("b", 2)]


def test_a_cut_voids_placements_that_never_opened():
    _, changes = fold_all(an_open("a"), a_cut(2), a_frame("z", 0, [1]), a_cut(3))
    assert [change.placement for change in changes if isinstance(change, Voided)] == ["a", "a", "z"]


def test_a_drain_before_the_first_open_does_nothing():
    """Ingest stands still between work and `open`, the worker drains meanwhile: only the `open` tells of which job."""
    state, changes = fold_all(a_frame("a", 0, [1]), a_cut(2), an_open("a"), a_frame("a", 1, [2], FinishReason.STOP))
    assert kinds(changes) == [Opened, Grew, Grew, Ended, Finished]
    assert list(state.choice(0).ids) == [1, 2]


def test_decode_is_told_of_an_end_by_prefill():
    """It holds room for the choice, and prefill may not live to tell it."""
    entry = FrameEntry(REQUEST, 0, PlacementId("a"), 0, token_ids([1]), finish=FinishReason.STOP)
    _, changes = fold_all(an_open("a"), Frame(PREFILL, (entry,), made_s=0.0))
    assert [(change.placement, change.worker) for change in changes if isinstance(change, Voided)] == [("a", DECODE)]


def test_a_cut_at_the_wrong_epoch_does_nothing():
    state, changes = fold_all(an_open("a"), a_cut(3, FinishReason.CANCELLED), a_cut(1, FinishReason.CANCELLED))
    assert kinds(changes) == [Opened]
    assert not state.finished


def test_the_first_end_wins():
    state, changes = fold_all(
        an_open("a"),
        a_frame("a", 0, [1], FinishReason.STOP),
        a_cut(2, FinishReason.CANCELLED),
        a_frame("a", 1, [2]),
    )
    assert state.choice(0).end.finish is FinishReason.STOP
    assert list(state.choice(0).ids) == [1]
    assert kinds(changes).count(Finished) == 1


def test_a_refusal_before_any_open_ends_all_choices():
    state, changes = fold_all(a_cut(2, FinishReason.REJECTED), an_open("a", choice=1, num_choices=2))
    assert state.finished
    assert kinds(changes) == [Ended, Finished, Voided, Voided]


def test_every_choice_must_end():
    state, _ = fold_all(
        an_open("a", num_choices=2),
        an_open("b", choice=1, num_choices=2),
        a_frame("a", 0, [1], FinishReason.STOP),
    )
    assert not state.finished
    assert state.open_choices == [1]


def test_attachments_are_counted_by_edge_and_stream():
    edge, other = Incarnation("e"), Incarnation("f")
    state, _ = fold_all(
        an_open("a", edge=edge), Attach(REQUEST, other, "s"), Detach(REQUEST, edge, ""), Detach(REQUEST, edge, "")
    )
    assert state.attached == {(other, "s")}


def test_what_comes_for_a_forgotten_request_is_void():
    fold = PartitionFold()
    fold.apply(7, 0.0, an_open("a"))
    fold.apply(8, 0.0, a_frame("a", 0, [1], FinishReason.STOP))
    fold.forget(REQUEST, 5.0)
    assert kinds(fold.apply(9, 6.0, a_frame("a", 1, [2]))) == [Voided]
    assert kinds(fold.apply(10, 6.0, an_open("b"))) == [Voided, Voided]
    assert fold.first_offset_of(REQUEST) == 7
    fold.expire(10.0)
    assert fold.first_offset_of(REQUEST) is None
    assert kinds(fold.apply(11, 11.0, an_open("b"))) == [Opened]


def test_what_waits_for_its_first_placement_stays_void_as_long_as_it_may_come():
    """Cancelled in ingest's line: its job is not taken out of it."""
    early = PartitionFold()
    early.apply(0, 0.0, a_cut(2, FinishReason.CANCELLED))
    half = PartitionFold()
    half.apply(0, 0.0, an_open("a", num_choices=2))
    for choice in (0, 1):
        half.apply(1, 0.0, a_cut(2, FinishReason.CANCELLED, choice=choice))
    for fold in (early, half):
        fold.forget(REQUEST, 5.0)
        fold.expire(99.0)
        assert kinds(fold.apply(9, 99.0, an_open("b", choice=1, num_choices=2))) == [Voided, Voided]
        fold.expire(MAX_DEADLINE_S + 1.0)
        assert not fold._forgotten


def test_strays_expire():
    fold = PartitionFold()
    fold.apply(0, 1.0, a_frame("zombie", 4, [1]))
    fold.expire(2.0)
    assert REQUEST not in fold.requests


# A random history: several placements per epoch compete, each writes tokens salted by its own name and conditioned on
# what was accepted when it began, each record may come twice and those of different writers interleave at will.

LENGTH = 5


def write_placement(placement, epoch, prefix):
    """The records of one placement: token i is (salt, i), so a splice of two placements shows."""
    salt = 1000 * (1 + int(placement[1:]))
    ids = [*prefix, *[salt + index for index in range(len(prefix), LENGTH)]]
    return [
        a_frame(placement, index, [ids[index]], FinishReason.LENGTH if index == LENGTH - 1 else None)
        for index in range(len(prefix), LENGTH)
    ]


def interleave(rng, queues):
    """Merge in random order; the order within a queue is kept, any record may be repeated with all behind it."""
    while queues:
        queue = rng.choice(queues)
        if not queue[0]:
            queues.remove(queue)
            continue
        record = queue[0].pop(0)
        yield record
        if rng.random() < 0.15:
            queue[0][:0] = [record]


class History:
    """A log that is folded as it is written, with what a client and a result writer saw."""

    def __init__(self, rng):
        self.rng = rng
        self.log = []
        self.answer = []
        self.num_ends = 0
        self.fold = PartitionFold()
        self.names = (f"p{number}" for number in itertools.count())

    @property
    def state(self):
        return self.fold.requests[REQUEST]

    @property
    def prefix(self):
        return list(self.state.choice(0).ids) if REQUEST in self.fold.requests else []

    def write(self, messages):
        for message in messages:
            self.log.append(message)
            for change in self.fold.apply(len(self.log) - 1, float(len(self.log)), message):
                if isinstance(change, Grew):
                    assert change.index == len(self.answer)
                    self.answer.extend(change.ids)
                self.num_ends += isinstance(change, Finished)

    def rival_placements(self, epoch, count):
        """Sends of `count` placements of one epoch and of those that opened them."""
        for name in itertools.islice(self.names, count):
            yield [write_placement(name, epoch, self.prefix)]
            yield [[an_open(name, epoch)]]


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.sampled_from(["lost", "drained", "token", "old token", "stale cut"]), max_size=20),
)
def test_losses_are_those_since_the_last_token(steps):
    """Whatever else happens between: what does not count changes nothing."""
    history = History(random.Random(0))
    history.write([an_open("p1")])
    epoch, num_made, expected = 1, 0, []
    for step in steps:
        match step:
            case "lost" | "drained":
                epoch += 1
                lost = DECODE if step == "lost" else None
                history.write([a_cut(epoch, lost=lost), an_open(f"p{epoch}", epoch)])
                if lost is not None:
                    expected.append(Loss(DECODE, epoch - 1))
            case "token":
                history.write([a_frame(f"p{epoch}", num_made, [num_made])])
                num_made += 1
                expected = []
            case "old token":
                history.write([a_frame(f"p{epoch - 1}", num_made, [66])])
                if num_made:
                    history.write([a_frame(f"p{epoch}", num_made - 1, [num_made - 1])])
            case "stale cut":
                history.write([a_cut(epoch, lost=DECODE), a_cut(epoch + 2, lost=DECODE)])
        assert history.state.choice(0).losses == expected


@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, 2**32), num_epochs=st.integers(1, 4), rivals=st.integers(1, 3), cancel=st.booleans())
def test_any_schedule_gives_one_unspliced_answer(seed, num_epochs, rivals, cancel):
    history = History(random.Random(seed))
    late = []
    for epoch in range(1, num_epochs):
        records = list(interleave(history.rng, [[late], *history.rival_placements(epoch, rivals)]))
        num_in_time = history.rng.randrange(len(records) + 1)
        history.write([*records[:num_in_time], a_cut(epoch + 1)])
        late = records[num_in_time:]
    history.write(interleave(history.rng, [[late], *history.rival_placements(num_epochs, rivals)]))
    if cancel:
        history.write([a_cut(history.state.choice(0).epoch + 1, FinishReason.CANCELLED)])

    assert history.state.finished
    assert history.num_ends == 1
    assert history.answer == list(history.state.choice(0).ids)
    assert [token % 1000 for token in history.answer] == list(range(len(history.answer)))
    salts = [token // 1000 for token in history.answer]
    assert salts == sorted(salts), "tokens of an older placement stand behind those of a newer one"
    finish = history.state.choice(0).end.finish
    assert len(history.answer) == LENGTH or finish is FinishReason.CANCELLED

    again = History(random.Random(seed))
    again.write(history.log)
    assert again.answer == history.answer
    assert again.state.choice(0).end == history.state.choice(0).end


def test_the_same_open_twice_is_one():
    _, changes = fold_all(an_open("a"), an_open("a"))
    assert kinds(changes) == [Opened]


def test_a_finish_that_ends_before_what_is_known_is_stale():
    state, _ = fold_all(an_open("a"), a_frame("a", 0, [1, 2, 3]), a_frame("a", 0, [1], FinishReason.STOP))
    assert not state.finished


def a_lossy_frame(placement, index, ids, wire_format):
    entry = FrameEntry(REQUEST, 0, PlacementId(placement), index, token_ids(ids), wire_format=wire_format)
    return Frame(DECODE, (entry,), made_s=0.0)


def test_a_choice_remembers_the_most_lossy_form_of_all_its_placements():
    """What follows tokens that were computed from lossy KV follows from lossy KV."""
    state, _ = fold_all(
        an_open("a"),
        a_frame("a", 0, [7]),
        a_lossy_frame("a", 1, [8], WireFormat.INT4),
        a_cut(2),
        a_lossy_frame("a", 2, [9], WireFormat.INT4),
        an_open("b", epoch=2),
        a_lossy_frame("b", 2, [9], WireFormat.INT8),
    )
    assert state.choice(0).wire_format is WireFormat.INT4
    state, _ = fold_all(an_open("a"), a_frame("a", 0, [7]), a_lossy_frame("elsewhere", 1, [8], WireFormat.INT8))
    assert state.choice(0).wire_format is WireFormat.NATIVE


def test_a_failure_of_decode_waits_for_the_first_token_and_is_void_if_that_was_the_last():
    """Decode may refuse a ticket while prefill still computes: its failure has the index behind the first token."""
    failure = a_frame("a", 1, [], FinishReason.FAILED)
    state, changes = fold_all(an_open("a"), failure, a_frame("a", 0, [7]))
    assert kinds(changes) == [Opened, Grew, Ended, Finished]
    assert state.choice(0).end.finish is FinishReason.FAILED
    state, changes = fold_all(an_open("a"), failure, a_frame("a", 0, [7], FinishReason.STOP))
    assert state.choice(0).end.finish is FinishReason.STOP
    assert kinds(changes) == [Opened, Grew, Ended, Finished]


def needed(*messages):
    return [worker.incarnation for worker in fold_all(*messages)[0].choice(0).needed]


def test_prefill_is_needed_until_decode_has_said_something_that_counts():
    first = a_prefill_frame("a", 0, [1])
    assert needed(a_frame("a", 0, [1])) == []
    assert needed(an_open("a")) == ["p", "d"]
    assert needed(an_open("a"), first) == ["p", "d"]
    assert needed(an_open("a"), a_frame("a", 1, [2])) == ["p", "d"]
    assert needed(an_open("a"), a_frame("a", 1, [2]), first) == ["d"]
    assert needed(an_open("a"), first, a_frame("a", 1, [2])) == ["d"]
    assert needed(an_open("a"), first, a_frame("a", 1, [2]), a_cut(2)) == []
    assert needed(an_open("a"), first, a_frame("a", 1, [2]), a_cut(2), an_open("b", epoch=2)) == ["p", "d"]


def test_a_placement_on_one_worker_needs_it_once_and_is_voided_there_once():
    local = Open(REQUEST, 0, 1, PlacementId("a"), DECODE, DECODE, a_view())
    state, _ = fold_all(local)
    assert state.choice(0).needed == (DECODE,)
    state, changes = fold_all(local, a_frame("a", 0, [7], FinishReason.LENGTH))
    assert state.finished
    assert Voided not in kinds(changes), "who ended it holds nothing more"
    _, changes = fold_all(local, a_frame("a", 0, [7]), a_cut(2))
    assert [change.worker for change in changes if isinstance(change, Voided)] == [DECODE]
