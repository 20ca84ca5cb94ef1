from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.simulator.holders import SegmentHolders
from loadgen.simulator.pages import Ends, HostTier, PagePath, PagePool, Watcher, cut_into_segments
from shared.blocks import BlockHash
from shared.kv.block_pool import BlockPool
from shared.policy.holders import Holders
from shared.request import Incarnation


def block(page: int) -> BlockHash:
    return BlockHash(page.to_bytes(16, "big"))


@st.composite
def trees(draw):
    """Paths of pages in which equal names have equal names before them; (path, prompt pages) each."""
    paths = []
    next_name = 0
    for _ in range(draw(st.integers(1, 6))):
        beginning = []
        if paths and draw(st.booleans()):
            other = draw(st.sampled_from(paths))[0]
            beginning = other[: draw(st.integers(0, len(other)))]
        new = draw(st.integers(0 if beginning else 1, 4))
        path = [*beginning, *range(next_name, next_name + new)]
        next_name += new
        paths.append((path, draw(st.integers(1, len(path)))))
    return paths


def segmented(paths):
    return cut_into_segments([path for path, _ in paths], [Ends(prompt, len(path)) for path, prompt in paths])


@given(trees())
def test_segments_put_together_are_the_paths(paths):
    cut = segmented(paths)
    pages_of: dict[int, list[int]] = {}
    for (path, prompt), segments, in_prompt in zip(paths, cut.paths, cut.num_prompt_segments, strict=True):
        start = 0
        for segment in segments:
            pages = path[start : start + cut.lengths[segment]]
            assert pages_of.setdefault(segment, pages) == pages
            start += len(pages)
        assert start == len(path)
        assert sum(cut.lengths[segment] for segment in segments[:in_prompt]) == prompt


@settings(max_examples=60)
@given(trees(), st.integers(12, 40), st.data())
def test_a_pool_of_segments_evicts_and_finds_what_the_pool_of_pages_does(paths, num_pages, data):
    cut = segmented(paths)
    pool, pages = PagePool(num_pages, cut.lengths, Watcher()), BlockPool(num_pages)
    running = {}
    for number in range(data.draw(st.integers(1, 25))):
        if running and data.draw(st.booleans()):
            ended = data.draw(st.sampled_from(sorted(running)))
            pinned, held = running.pop(ended)
            pool.release(pinned)
            pages.release(held)
        index = data.draw(st.integers(0, len(paths) - 1))
        if any(index == other for other, _ in running):
            continue  # two that compute the same at once: the scheduler makes one of them wait
        hashes = [block(page) for page in paths[index][0]]
        found, found_pages = pool.find(cut.paths[index]), pages.find(hashes)
        assert found.num_pages == len(found_pages)
        num_new = len(hashes) - len(found_pages)
        assert pool.fits(found, num_new) == (pages.cost(found_pages, num_new) <= pages.num_free)
        if pool.fits(found, num_new):
            pinned = pool.acquire(cut.paths[index], found, num_new)
            held = pages.acquire(found_pages, num_new)
            for segment in cut.paths[index]:
                pool.publish(pinned, segment)
            for page, block_hash in zip(held, hashes, strict=True):
                if page not in found_pages:
                    pages.publish(page, block_hash)
            running[index, number] = pinned, held
        assert pool.num_free == pages.num_free
        pool.check(pinned for pinned, _ in running.values())
        pages.check([held for _, held in running.values()])


def test_what_does_not_fit_is_refused_and_changes_nothing():
    pool = PagePool(4, (3,), Watcher())
    with pytest.raises(ValueError, match="5 new pages wanted, 4 can be taken"):
        pool.acquire((0,), pool.find((0,)), 5)
    pool.check(())
    assert pool.num_free == 4


@given(trees(), st.data())
def test_holders_by_segment_answer_as_holders_by_page(paths, data):
    cut = segmented(paths)
    by_segment, by_page = SegmentHolders(cut.lengths), Holders()
    pages_of = {}
    for (path, _), segments in zip(paths, cut.paths, strict=True):
        start = 0
        for segment in segments:
            pages_of[segment] = path[start : start + cut.lengths[segment]]
            start += cut.lengths[segment]
    for worker in ("a", "b", "c"):
        stored = []
        for segment, pages in pages_of.items():
            held = data.draw(st.integers(0, len(pages)))
            by_segment.note(Incarnation(worker), segment, held, on_host=False)
            stored += [block(page) for page in pages[:held]]
        host_stored = []
        if worker != "c":
            for segment, pages in pages_of.items():
                held = data.draw(st.integers(0, len(pages)))
                by_segment.note(Incarnation(worker), segment, held, on_host=True)
                host_stored += [block(page) for page in pages[:held]]
        by_page.update(Incarnation(worker), 0, stored, (), host_stored, ())
    for (path, _), segments in zip(paths, cut.paths, strict=True):
        limit = data.draw(st.integers(0, len(path)))
        found = by_segment.matches(PagePath(segments, len(path))[:limit])
        told = by_page.matches([block(page) for page in path[:limit]])
        assert {holder: run for holder, run in found.items() if run[1]} == told


def test_host_memory_keeps_the_youngest_and_joins_what_touches():
    held: dict[int, int] = OrderedDict()

    class Told(Watcher):
        def held(self, segment, num_pages):
            held[segment] = num_pages

    tier = HostTier(5, Told())
    tier.store(0, 2, 4)
    tier.store(0, 0, 2)
    assert tier.run(0) == (0, 4)
    tier.store(1, 0, 3)
    assert (tier.run(0), tier.run(1)) == ((0, 2), (0, 3)), "the last pages of the oldest go first"
    tier.use(0)
    tier.store(2, 0, 2)
    assert (tier.run(0), tier.run(1), tier.run(2)) == ((0, 2), (0, 1), (0, 2))
    assert held == {0: 2, 1: 1, 2: 2}
