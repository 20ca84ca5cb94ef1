"""Who waits for news of a request, and when it comes."""

import asyncio

from services.stream_out.streams import Story
from shared.request import RequestId
from tests.fake_tokeniser import fake_tokeniser


async def test_all_who_wait_hear_of_it_and_who_gave_up_leaves_nothing():
    story = Story(RequestId("r"), fake_tokeniser())
    waiting = [asyncio.create_task(story.news()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[1].cancel()
    await asyncio.wait({waiting[1]})
    assert len(story._waiting) == 2
    story.wake()
    await asyncio.gather(waiting[0], waiting[2])
    assert not story._waiting


async def test_who_gives_up_in_the_turn_of_the_news_is_no_trouble():
    story = Story(RequestId("r"), fake_tokeniser())
    waiting = asyncio.create_task(story.news())
    await asyncio.sleep(0)
    waiting.cancel()
    story.wake()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
