"""One stack for all tests that need the whole system: started once, held to its last page at the end."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from shared.text.tokeniser import Tokeniser
from tests.e2e.stack import Serving, serving_stack


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def serving(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Serving]:
    """1 ingest, 1 prefill worker, 2 decode workers and 2 edges with SmolLM2 in float32."""
    async with serving_stack(tmp_path_factory.mktemp("stack"), smollm2) as running:
        yield running
        await running.all_ready()
        await running.pages_free()
        assert running.errors_in_logs() == []
        # One end each; after a take-over it may stand twice, byte for byte.
        ends = {(record.key, record.value) for record in await running.results.read_to_end()}
        assert len(ends) == len({key for key, _ in ends})


@pytest.fixture(scope="session")
def tokeniser(smollm2: Path) -> Tokeniser:
    """The model's tokeniser, to say prompts as ids."""
    return Tokeniser.load(smollm2)
