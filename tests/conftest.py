"""The real servers, each started once for the whole run when the first test asks for it.

A machine that cannot start them fails these tests with the reason; nothing is skipped.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from infra.kafka.create_topics import create_topics
from infra.local.kafka import kafka_server
from infra.local.model import smollm2_folder
from infra.local.redis import redis_server
from tests.triton_interpreter import use_interpreter_without_cuda

use_interpreter_without_cuda()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def kafka_address(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """host:port of a real Kafka with Baton's topics; a test that needs empty ones makes its own."""
    async with kafka_server(tmp_path_factory.mktemp("kafka")) as address:
        await create_topics(address)
        yield address


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def redis_url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """URL of a real Redis, shared by the run: keys of other tests may be in it."""
    async with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct, bf16; fetched and converted once into the cache."""
    return smollm2_folder()
