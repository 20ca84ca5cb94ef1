import asyncio

from shared.kv.progress import Chunk, KvProgress


class Done:
    def num_done(self):
        return 0


async def test_chunks_are_waited_for_by_any_number():
    progress = KvProgress(100)
    chunk = Chunk(0, 60, Done())
    waiting = [asyncio.create_task(progress.chunk(0)) for _ in range(3)]
    later = asyncio.create_task(progress.chunk(1))
    await asyncio.sleep(0)
    progress.launched(chunk)
    assert await asyncio.gather(*waiting) == [chunk] * 3
    assert await progress.chunk(0) is chunk
    assert not later.done()
    progress.complete()
    assert await later is None
    assert progress.chunks == (chunk,)


async def test_whoever_waits_is_let_go_of_when_all_is_completed_or_stopped():
    for end in (KvProgress.complete, KvProgress.stop):
        progress = KvProgress(100)
        waiting = asyncio.gather(progress.over(), progress.chunk(0))
        await asyncio.sleep(0)
        assert not progress.is_over
        end(progress)
        assert await waiting == [None, None]


async def test_compute_left_is_counted_from_the_newest_chunk():
    progress = KvProgress(100, tokens_per_s=10.0)
    assert progress.compute_left_s is None
    progress.launched(Chunk(20, 60, Done()))
    assert progress.compute_left_s == 8.0
    assert progress.compute_s(40) == 4.0
    progress.launched(Chunk(60, 100, Done()))
    assert progress.compute_left_s == 4.0
    progress.complete()
    assert progress.compute_left_s == 0.0


async def test_a_worker_that_has_measured_nothing_estimates_nothing():
    progress = KvProgress(100)
    progress.launched(Chunk(0, 100, Done()))
    assert progress.compute_left_s is None
    assert KvProgress.all_there(100).compute_left_s == 0.0
