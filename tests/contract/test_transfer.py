"""What every `Transfer` does, the twin and the real one."""

import asyncio
from dataclasses import replace

import pytest
import torch

from shared.blocks import PAGE_TOKENS
from shared.errors import KvTransferFailed, LayoutMismatch
from shared.transfer.port import Outcome, Pulled, Refusal
from shared.wire.wire_format import WireFormat
from tests.contract.transfer_pair import TIMEOUT_S, Ends, a_pair
from tests.contract.transfer_worlds import SECRET, LocalWorld, UcxWorld, a_cache, a_layout


@pytest.fixture(params=[LocalWorld, UcxWorld], ids=["local", "ucx"])
def world(request):
    return request.param()


@pytest.mark.parametrize(
    ("want", "into"),
    [
        ((0,), (9,)),
        ((4,), (0,)),
        ((1, 3), (30, 2)),
        ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9)),
        ((4, 3, 2, 1, 0), (9, 1, 8, 2, 7)),
        ((), ()),
    ],
)
async def test_exactly_the_wanted_pages_arrive(world, want, into):
    async with a_pair(world) as pair:
        pulled = await pair.pull(pair.offer(pages=(3, 4, 5, 20, 7)), want, into)
        assert pulled == Pulled(WireFormat.NATIVE, len(want) * pair.source_cache.layout.page_bytes)
        pair.check_arrived((3, 4, 5, 20, 7), want, into)
        assert await pair.ends.wait("k") is Outcome.PULLED


async def test_many_pages_travel_in_several_messages(world):
    async with a_pair(world, num_pages=64, pages_per_part=3) as pair:
        offered = list(range(60, 10, -1))
        want, into = list(range(1, 50)), list(range(49))
        await pair.pull(pair.offer(pages=offered), want, into)
        pair.check_arrived(offered, want, into)


async def test_a_partial_last_page_is_a_page(world):
    async with a_pair(world) as pair:
        ticket = pair.offer(pages=(1, 2), num_tokens=65)
        await pair.pull(ticket, (0, 1), (5, 6))
        pair.check_arrived((1, 2), (0, 1), (5, 6))


async def test_pulls_run_at_once_in_both_directions(world):
    cache_a, cache_b = a_cache(64, seed=1), a_cache(64, seed=2)
    before_a, before_b = cache_a.pages.clone(), cache_b.pages.clone()
    ends = Ends()
    async with (
        world,
        world.transfer(cache_a, "a", pages_per_part=1) as a,
        world.transfer(cache_b, "b", pages_per_part=2) as b,
    ):
        pulls = []
        for k in range(8):
            pages, into = [4 * k, 4 * k + 1, 4 * k + 2], [32 + 3 * k, 33 + 3 * k, 34 + 3 * k]
            for source, puller, name in ((a, b, "b"), (b, a, "a")):
                ticket = source.offer(
                    f"{k}",
                    pages,
                    num_tokens=3 * PAGE_TOKENS,
                    secret=SECRET,
                    puller=name,
                    hold_s=60.0,
                    on_end=ends.of(f"{k}-to-{name}"),
                )
                pulls.append(puller.pull(ticket, want=(0, 1, 2), into=into, timeout_s=TIMEOUT_S))
        await asyncio.gather(*pulls)
        for k in range(8):
            assert torch.equal(cache_b.pages[32 + 3 * k : 35 + 3 * k], before_a[4 * k : 4 * k + 3])
            assert torch.equal(cache_a.pages[32 + 3 * k : 35 + 3 * k], before_b[4 * k : 4 * k + 3])
            assert await ends.wait(f"{k}-to-a") is await ends.wait(f"{k}-to-b") is Outcome.PULLED
        await world.check_nothing_leaked()


@pytest.mark.parametrize(
    ("change", "reason", "refusals"),
    [
        ({"secret": bytes(16)}, "secret", {Refusal.WRONG_SECRET: 1}),
        ({"secret": SECRET + b"x"}, "secret", {Refusal.WRONG_SECRET: 1}),
        ({"key": "other"}, "no such offer", {Refusal.UNKNOWN_KEY: 1}),
        ({"source": "an-earlier-start"}, "restarted", {Refusal.WRONG_SOURCE: 1}),
    ],
)
async def test_a_wrong_ticket_is_refused_and_the_right_one_still_works(world, change, reason, refusals):
    async with a_pair(world) as pair:
        ticket = pair.offer()
        with pytest.raises(KvTransferFailed, match=reason):
            await pair.pull(replace(ticket, **change))
        pair.check_arrived((), (), ())
        assert pair.ends.outcomes == {}
        assert pair.source.refusals == refusals
        await pair.pull(ticket)
        pair.check_arrived((3,), (0,), (0,))


async def test_another_worker_is_refused_though_it_has_the_ticket(world):
    async with a_pair(world) as pair:
        ticket = pair.offer(puller="somebody-else")
        with pytest.raises(KvTransferFailed, match="another worker"):
            await pair.pull(ticket)
        assert pair.source.refusals == {Refusal.WRONG_PULLER: 1}
        pair.check_arrived((), (), ())
        pair.source.withdraw("k")
        assert await pair.ends.wait("k") is Outcome.WITHDRAWN


async def test_a_pull_of_nothing_that_is_refused_leaves_the_link_to_the_others(world):
    async with a_pair(world) as pair:
        ticket = pair.offer("k")
        withdrawn = pair.offer("withdrawn", pages=(8,))
        await pair.puller.connect(pair.source.address, ticket.source)
        pair.source.withdraw("withdrawn")
        await pair.ends.wait("withdrawn")
        with pytest.raises(KvTransferFailed, match="withdrawn"):
            await pair.pull(withdrawn, (), ())
        await pair.pull(ticket)
        (link,) = pair.puller.links()
        assert (link.speed is None) is (world.__class__ is LocalWorld), "the tested link is still there"
        assert pair.source.refusals == {Refusal.WITHDRAWN: 1}


async def test_pages_beyond_the_offer_are_refused_by_the_source(world):
    async with a_pair(world) as pair:
        ticket = pair.offer()
        with pytest.raises(KvTransferFailed, match="outside the offer"):
            await pair.pull(replace(ticket, num_tokens=100 * PAGE_TOKENS), (5,))
        assert pair.source.refusals == {Refusal.WRONG_PAGES: 1}
        await pair.pull(ticket)


@pytest.mark.parametrize(
    ("want", "into"), [((0,), ()), ((5,), (0,)), ((0, 0), (1, 2)), ((0, 1), (2, 2)), ((0,), (32,))]
)
async def test_a_pull_that_makes_no_sense_is_an_error_of_the_caller(world, want, into):
    async with a_pair(world) as pair:
        ticket = pair.offer()
        with pytest.raises(ValueError):
            await pair.pull(ticket, want, into)
        await pair.pull(ticket)


@pytest.mark.parametrize("bad", ["key in use", "short secret", "page outside", "page twice", "pages and tokens"])
async def test_an_offer_that_makes_no_sense_is_an_error_of_the_caller(world, bad):
    async with a_pair(world) as pair:
        ticket = pair.offer("k")
        with pytest.raises(ValueError):
            pair.source.offer(
                "k" if bad == "key in use" else "l",
                {"page outside": (1, 32), "page twice": (1, 1)}.get(bad, (1, 2)),
                num_tokens=64 if bad == "pages and tokens" else 128,
                secret=b"short" if bad == "short secret" else SECRET,
                puller="puller",
                hold_s=1.0,
                on_end=pair.ends.of("l"),
            )
        await pair.pull(ticket)


async def test_another_layout_is_refused_by_the_ticket_and_at_connect(world):
    ends = Ends()
    ours, theirs = a_layout("m"), a_layout("another model")
    async with (
        world,
        world.transfer(a_cache(seed=1, layout=theirs), "source") as source,
        world.transfer(a_cache(layout=ours), "puller") as puller,
    ):
        ticket = source.offer(
            "k", (1,), num_tokens=64, secret=SECRET, puller="puller", hold_s=60.0, on_end=ends.of("k")
        )
        for shown in (ticket, replace(ticket, layout_fingerprint=ours.fingerprint)):
            with pytest.raises(LayoutMismatch):
                await puller.pull(shown, want=(0,), into=(0,), timeout_s=TIMEOUT_S)
        assert ends.outcomes == {}
        assert source.refusals == {Refusal.WRONG_LAYOUT: 1}


async def test_a_hold_that_ran_out_is_refused(world):
    async with a_pair(world) as pair:
        ticket = pair.offer(hold_s=0.02)
        assert await pair.ends.wait("k") is Outcome.EXPIRED
        with pytest.raises(KvTransferFailed, match="expired"):
            await pair.pull(ticket)
        assert pair.source.refusals == {Refusal.EXPIRED: 1}
        pair.check_arrived((), (), ())


async def test_a_hold_that_runs_out_during_a_pull_ends_it(world):
    async with a_pair(world, pages_per_part=1) as pair:
        async with world.held_back(pair.source):
            pull = asyncio.create_task(pair.pull(pair.offer(hold_s=0.1), (0, 1, 2), (0, 1, 2)))
            assert await pair.ends.wait("k") is Outcome.EXPIRED
        with pytest.raises(KvTransferFailed):
            await pull
        await pair.pull(pair.offer("next"))


async def test_an_offer_withdrawn_before_the_pull_is_refused(world):
    async with a_pair(world) as pair:
        ticket = pair.offer()
        pair.source.withdraw("k")
        pair.source.withdraw("k")
        pair.source.withdraw("never seen")
        assert await pair.ends.wait("k") is Outcome.WITHDRAWN
        with pytest.raises(KvTransferFailed, match="withdrawn"):
            await pair.pull(ticket)


async def test_an_offer_withdrawn_during_the_pull_ends_it_and_no_other(world):
    async with a_pair(world, pages_per_part=1) as pair:
        async with world.held_back(pair.source):
            pull = asyncio.create_task(pair.pull(pair.offer(), (0, 1, 2), (0, 1, 2)))
            other = asyncio.create_task(pair.pull(pair.offer("other", (8, 9)), (0, 1), (8, 9)))
            await asyncio.sleep(0.1)
            pair.source.withdraw("k")
        with pytest.raises(KvTransferFailed, match="withdrawn"):
            await pull
        await other
        assert pair.source.refusals == {Refusal.WITHDRAWN: 1}
        assert torch.equal(pair.puller_cache.pages[8:10], pair.source_cache.pages[8:10])
        assert await pair.ends.wait("k") is Outcome.WITHDRAWN
        assert await pair.ends.wait("other") is Outcome.PULLED


async def test_a_ticket_is_good_for_one_pull(world):
    async with a_pair(world) as pair:
        ticket = pair.offer()
        await pair.pull(ticket)
        assert await pair.ends.wait("k") is Outcome.PULLED
        with pytest.raises(KvTransferFailed, match="pulled before"):
            await pair.pull(ticket)
        assert pair.source.refusals == {Refusal.ALREADY_PULLED: 1}


async def test_of_two_pulls_at_once_with_one_ticket_one_gets_the_pages(world):
    async with a_pair(world) as pair:
        ticket = pair.offer()
        results = await asyncio.gather(pair.pull(ticket), pair.pull(ticket), return_exceptions=True)
        assert {type(result) for result in results} == {Pulled, KvTransferFailed}


async def test_a_cancelled_pull_ends_the_offer_and_writes_nothing_later(world):
    async with a_pair(world, pages_per_part=1) as pair:
        async with world.held_back(pair.source):
            pull = asyncio.create_task(pair.pull(pair.offer(), (0, 1, 2), (0, 1, 2)))
            await asyncio.sleep(0.1)
            pull.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await pull
        then = pair.puller_cache.pages.clone()
        assert await pair.ends.wait("k") is Outcome.FAILED
        await pair.pull(pair.offer("next"), (0,), (31,))
        assert torch.equal(pair.puller_cache.pages[:31], then[:31])


async def test_a_pull_that_takes_too_long_fails_and_the_next_one_works(world):
    async with a_pair(world) as pair:
        async with world.held_back(pair.source):
            with pytest.raises(KvTransferFailed, match=r"within 0\.1 s"):
                await pair.pull(pair.offer(), timeout_s=0.1)
            assert await pair.ends.wait("k") is Outcome.FAILED
        await pair.pull(pair.offer("next"))


async def test_nobody_at_the_address(world):
    async with a_pair(world) as pair:
        ticket = pair.offer(hold_s=0.01)
        with pytest.raises(KvTransferFailed):
            await pair.pull(replace(ticket, address="127.0.0.1:1"))
        with pytest.raises(KvTransferFailed):
            await pair.pull(replace(ticket, address="no address"))
        await pair.ends.wait("k")


async def test_a_source_that_closes_fails_the_pull_and_ends_its_offers(world):
    ends = Ends()
    async with world, world.transfer(a_cache(), "puller") as puller:
        source_cache = a_cache(seed=1)
        async with world.transfer(source_cache, "source") as source:
            tickets = [
                source.offer(key, (1,), num_tokens=64, secret=SECRET, puller="puller", hold_s=60.0, on_end=ends.of(key))
                for key in ("pulling", "waiting")
            ]
            async with world.held_back(source):
                pull = asyncio.create_task(puller.pull(tickets[0], want=(0,), into=(0,), timeout_s=TIMEOUT_S))
                await asyncio.sleep(0.1)
        assert ends.outcomes["pulling"] in (Outcome.FAILED, Outcome.WITHDRAWN, Outcome.PULLED)
        assert ends.outcomes["waiting"] is Outcome.WITHDRAWN
        results = await asyncio.gather(pull, return_exceptions=True)
        assert isinstance(results[0], KvTransferFailed) or ends.outcomes["pulling"] is Outcome.PULLED
        with pytest.raises(KvTransferFailed):
            await puller.pull(tickets[1], want=(0,), into=(0,), timeout_s=TIMEOUT_S)
        await world.check_nothing_leaked()


async def test_a_puller_that_closes_fails_its_pulls_and_the_offer(world):
    ends = Ends()
    async with world, world.transfer(a_cache(seed=1), "source") as source:
        async with world.transfer(a_cache(), "puller") as puller:
            ticket = source.offer(
                "k", (1,), num_tokens=64, secret=SECRET, puller="puller", hold_s=60.0, on_end=ends.of("k")
            )
            async with world.held_back(source):
                pull = asyncio.create_task(puller.pull(ticket, want=(0,), into=(0,), timeout_s=TIMEOUT_S))
                await asyncio.sleep(0.1)
                await puller.__aexit__(None, None, None)
        with pytest.raises(KvTransferFailed):
            await pull
        assert await ends.wait("k") is Outcome.FAILED
        await world.check_nothing_leaked()


async def test_a_source_that_restarted_on_its_address_is_known_as_another(world):
    ends = Ends()
    async with world, world.transfer(a_cache(), "puller") as puller:
        async with world.transfer(a_cache(seed=1), "first") as first:
            address = first.address
            old = first.offer(
                "k", (1,), num_tokens=64, secret=SECRET, puller="puller", hold_s=60.0, on_end=ends.of("k")
            )
            used = first.offer(
                "used", (1,), num_tokens=64, secret=SECRET, puller="puller", hold_s=60.0, on_end=ends.of("used")
            )
            await puller.pull(used, want=(0,), into=(0,), timeout_s=TIMEOUT_S)
        async with world.transfer(a_cache(seed=2), "second", address=address) as second:
            new = second.offer(
                "k", (1,), num_tokens=64, secret=SECRET, puller="puller", hold_s=60.0, on_end=ends.of("new k")
            )
            with pytest.raises(KvTransferFailed, match="restarted"):
                await puller.pull(old, want=(0,), into=(0,), timeout_s=TIMEOUT_S)
            await puller.pull(new, want=(0,), into=(0,), timeout_s=TIMEOUT_S)


async def test_a_source_that_restarted_is_connected_to_again(world):
    async with world, world.transfer(a_cache(), "puller") as puller:
        async with world.transfer(a_cache(), "first") as first:
            address = first.address
            assert (await puller.connect(address, "first")).incarnation == "first"
        async with world.transfer(a_cache(), "second", address=address):
            with pytest.raises(KvTransferFailed, match="restarted"):
                await puller.connect(address, "first")
            assert (await puller.connect(address, "second")).incarnation == "second"
            assert [link.incarnation for link in puller.links()] == ["second"]


async def test_a_thousand_small_pulls_leak_nothing(world):
    async with a_pair(world, pages_per_part=1) as pair:
        numbers = iter(range(1000))

        async def pull_some(page):
            for number in numbers:
                await pair.pull(pair.offer(f"{number}", (page, 31 - page)), (0, 1), (page, 31 - page))

        await asyncio.gather(*(pull_some(page) for page in range(8)))
        await pair.ends.wait("999")
        assert set(pair.ends.outcomes.values()) == {Outcome.PULLED}
        assert len(pair.ends.outcomes) == 1000
        assert torch.equal(pair.puller_cache.pages[:8], pair.source_cache.pages[:8])


async def test_the_twin_fails_and_breaks_when_told():
    world = LocalWorld()
    async with a_pair(world) as pair:
        world.network.fail_next_pull()
        with pytest.raises(KvTransferFailed):
            await pair.pull(pair.offer("failing"))
        assert await pair.ends.wait("failing") is Outcome.FAILED
        async with world.held_back(pair.source):
            pull = asyncio.create_task(pair.pull(pair.offer("cut")))
            await asyncio.sleep(0.01)
            world.network.cut(pair.puller.address)
            with pytest.raises(KvTransferFailed):
                await pull
        await pair.pull(pair.offer("next"))
