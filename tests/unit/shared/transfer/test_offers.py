import asyncio
import gc
import weakref
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from shared.kv.progress import KvProgress
from shared.transfer.offer import TRANSITIONS, Offer, OfferState
from shared.transfer.offers import Offers, PullRefused
from shared.transfer.port import Outcome, Refusal
from shared.transfer.proof import Claim
from shared.wire.wire_format import WireFormat
from tests.contract.transfer_worlds import SECRET, a_cache


def an_offer(on_end=lambda outcome: None):
    return Offer(
        key="k",
        source="source",
        puller="puller",
        secret=SECRET,
        pages=(1, 2),
        progress=KvProgress.all_there(100),
        max_loss=WireFormat.NATIVE,
        hold_s=1.0,
        on_end=on_end,
    )


CLAIM = Claim(b"challenge", "puller", b"address", "k", (0, 1))


class Book:
    def __init__(self, offers):
        self.offers = offers
        self.outcomes = []
        self.settled = []
        self.num_cuts = 0
        self.cut_lets_go = asyncio.Event()

    def add(self, hold_s=60.0, progress=None):
        self.offers.add(
            "h:1",
            "k",
            (1, 2),
            num_tokens=100,
            secret=SECRET,
            puller="puller",
            hold_s=hold_s,
            on_end=self.outcomes.append,
            progress=progress,
            max_loss=WireFormat.NATIVE,
        )

    def begin(self, **changes):
        secret = changes.pop("secret", SECRET)
        claim = replace(CLAIM, **changes)
        offer = self.offers.find(claim, claim.proof(secret))
        offer.begin(self._cut, lambda: self.settled.append(offer.outcome))
        return offer

    async def _cut(self):
        self.num_cuts += 1
        self.cut_lets_go.set()

    async def ended(self):
        async with asyncio.timeout(10):
            while not self.outcomes:
                await asyncio.sleep(0.001)
        return self.outcomes


@asynccontextmanager
async def a_book():
    async with asyncio.TaskGroup() as tasks:
        offers = Offers(a_cache(8), "source", asyncio.get_running_loop().time, tasks)
        yield Book(offers)
        await offers.close()
        assert len(offers) == 0


def reason_of(error):
    return error.value.reason


@pytest.mark.parametrize("state", list(OfferState))
def test_every_state_says_what_may_follow(state):
    assert state in TRANSITIONS
    assert (TRANSITIONS[state] == frozenset()) is (state is OfferState.ENDED)


async def test_the_first_to_settle_decides():
    outcomes = []
    offer = an_offer(outcomes.append)
    assert offer.settle(Outcome.EXPIRED)
    assert not offer.settle(Outcome.PULLED)
    offer.end()
    assert outcomes == [Outcome.EXPIRED]


async def test_an_offer_ends_once():
    offer = an_offer()
    offer.settle(Outcome.WITHDRAWN)
    offer.end()
    with pytest.raises(AssertionError):
        offer.end()


async def test_nothing_is_sent_from_an_offer_that_is_not_being_pulled():
    offer = an_offer()
    with pytest.raises(AssertionError), offer.sending():
        pass


async def test_the_secret_does_not_show():
    async with a_book() as book:
        book.add()
        with pytest.raises(PullRefused) as error:
            book.begin(secret=bytes(16))
        assert SECRET.hex() not in str(error.value)
        assert repr(SECRET) not in repr(error.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"key": "other"}, Refusal.UNKNOWN_KEY),
        ({"secret": bytes(16)}, Refusal.WRONG_SECRET),
        ({"secret": b""}, Refusal.WRONG_SECRET),
        ({"puller": "other"}, Refusal.WRONG_PULLER),
        ({"want": (2,)}, Refusal.WRONG_PAGES),
        ({"want": (-1,)}, Refusal.WRONG_PAGES),
        ({"want": (0, 0)}, Refusal.WRONG_PAGES),
    ],
)
async def test_a_refused_pull_leaves_the_offer_as_it_was(changes, reason):
    async with a_book() as book:
        book.add()
        with pytest.raises(PullRefused) as error:
            book.begin(**changes)
        assert reason_of(error) is reason
        assert book.begin().state is OfferState.PULLING


async def test_who_has_no_secret_does_not_learn_what_became_of_an_offer():
    async with a_book() as book:
        book.add()
        book.offers.withdraw("k")
        await book.ended()
        for secret, reason in ((SECRET, Refusal.WITHDRAWN), (bytes(16), Refusal.WRONG_SECRET)):
            with pytest.raises(PullRefused) as error:
                book.begin(secret=secret)
            assert reason_of(error) is reason


async def test_an_offer_waits_for_what_is_in_flight():
    async with a_book() as book:
        book.add()
        offer = book.begin()
        with offer.sending():
            book.offers.withdraw("k")
            await asyncio.sleep(0.02)
            assert book.outcomes == []
            assert len(book.offers) == 1
        assert await book.ended() == [Outcome.WITHDRAWN]
        assert len(book.offers) == 0
        assert book.num_cuts == 0


async def test_a_hold_that_runs_out_cuts_the_connection_and_then_ends():
    async with a_book() as book:
        book.add(hold_s=0.02)
        offer = book.begin()
        with offer.sending():
            await book.cut_lets_go.wait()
            assert offer.state is OfferState.CLOSING
            await asyncio.sleep(0.01)
            assert book.outcomes == []
        assert await book.ended() == [Outcome.EXPIRED]
        assert book.num_cuts == 1


async def test_a_send_that_outlives_a_withdrawal_is_cut_at_the_end_of_the_hold():
    async with a_book() as book:
        book.add(hold_s=0.05)
        offer = book.begin()
        with offer.sending():
            book.offers.withdraw("k")
            await book.cut_lets_go.wait()
        assert await book.ended() == [Outcome.WITHDRAWN]


async def test_the_hold_begins_when_all_kv_is_computed():
    async with a_book() as book:
        progress = KvProgress(100)
        book.add(hold_s=0.02, progress=progress)
        await asyncio.sleep(0.06)
        offer = book.begin()
        assert offer.deadline_s is None
        progress.complete()
        assert await book.ended() == [Outcome.EXPIRED]
        assert book.settled == [Outcome.EXPIRED]


async def test_an_offer_that_ends_while_its_kv_is_computed_lets_go_of_who_waits_for_it():
    async with a_book() as book:
        progress = KvProgress(100)
        book.add(progress=progress)
        waiting = asyncio.create_task(progress.chunk(0))
        book.offers.withdraw("k")
        assert await book.ended() == [Outcome.WITHDRAWN]
        assert await waiting is None


async def test_the_progress_must_be_that_of_the_prompt():
    async with a_book() as book:
        with pytest.raises(ValueError, match="99 tokens"):
            book.add(progress=KvProgress(99))


async def test_refusals_are_counted_by_reason():
    async with a_book() as book:
        book.add()
        for secret in (bytes(16), b""):
            with pytest.raises(PullRefused):
                book.begin(secret=secret)
        with pytest.raises(PullRefused):
            book.begin(key="other")
        assert book.offers.refusals == {Refusal.WRONG_SECRET: 2, Refusal.UNKNOWN_KEY: 1}


async def test_closing_waits_for_every_end():
    async with a_book() as book:
        book.add()
        await book.offers.close()
        assert book.outcomes == [Outcome.WITHDRAWN]


async def test_an_ended_offer_keeps_nothing_alive_but_its_answer():
    """It is remembered for late pullers; what its owner and its connection hold may be large."""

    class Hold:
        def ended(self, outcome):
            pass

        def settled(self):
            pass

        async def cut(self):
            pass

    async with a_book() as book:
        hold = Hold()
        book.offers.add(
            "k",
            "k",
            (1,),
            num_tokens=5,
            secret=SECRET,
            puller="puller",
            hold_s=60.0,
            on_end=hold.ended,
            progress=None,
            max_loss=WireFormat.NATIVE,
        )
        claim = replace(CLAIM, want=(0,))
        offer = book.offers.find(claim, claim.proof(SECRET))
        offer.begin(hold.cut, hold.settled)
        offer.settle(Outcome.PULLED)
        held = weakref.ref(hold)
        del hold
        async with asyncio.timeout(10):
            while len(book.offers):
                await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        gc.collect()
        assert held() is None
        with pytest.raises(PullRefused) as error:
            book.begin(want=(0,))
        assert reason_of(error) is Refusal.ALREADY_PULLED
