import asyncio
import threading

import pytest
import torch

from shared.errors import StartupError
from shared.transfer.staging import BufferPool, Staging, check_allocator, to_completion
from tests.contract.transfer_worlds import a_cache


async def test_buffers_are_lent_in_the_order_of_asking_and_come_back():
    pool = BufferPool(1, 8, torch.device("cpu"))
    order = []

    async def use(name):
        async with pool.lease() as buffer:
            assert buffer.numel() == 8
            order.append(name)
            await asyncio.sleep(0)

    await asyncio.gather(*(use(name) for name in "abcd"))
    assert order == list("abcd")
    assert pool.num_free == 1


async def test_a_waiter_that_gives_up_leaves_no_hole():
    pool = BufferPool(1, 8, torch.device("cpu"))
    async with pool.lease():
        waiter = asyncio.create_task(pool.lease().__aenter__())
        await asyncio.sleep(0)
        waiter.cancel()
    async with asyncio.timeout(5), pool.lease():
        pass
    assert pool.num_free == 1


async def test_pages_go_out_and_in():
    source, cache = a_cache(8, seed=1), a_cache(8)
    out, into = Staging(source, {}, message_bytes=4096), Staging(cache, {}, message_bytes=4096)
    async with out.outgoing.lease() as buffer:
        await out.gather([7, 1], buffer[:2048])
        await into.scatter(buffer[:2048], [0, 3])
    assert torch.equal(cache.pages[[0, 3]], source.pages[[7, 1]])


async def test_a_cancelled_wait_still_sees_the_work_to_its_end():
    go, done = threading.Event(), threading.Event()

    def work():
        go.wait(10)
        done.set()

    waiting = asyncio.create_task(to_completion(asyncio.to_thread(work)))
    await asyncio.sleep(0.01)
    for _ in range(3):
        waiting.cancel()
        await asyncio.sleep(0)
        assert not waiting.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert done.is_set()


async def test_what_the_work_raises_is_raised():
    async def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await to_completion(fail())


def test_buffers_too_small_for_a_page_are_refused_at_start():
    with pytest.raises(StartupError, match="hold no page"):
        Staging(a_cache(8), {}, message_bytes=1023)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize("value", ["expandable_segments:True", "max_split_size_mb:64, expandable_segments: true"])
def test_expandable_segments_are_refused(name, value):
    with pytest.raises(StartupError, match=name):
        check_allocator({name: value})


def test_other_allocator_settings_pass():
    check_allocator({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:False"})
