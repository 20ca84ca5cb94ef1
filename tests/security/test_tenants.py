"""One tenant's cache says nothing about another's prompts, neither by its times nor by what workers announce."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from pydantic import SecretStr

from services.ingest.cache_salt import CacheSalt
from shared.blocks import PAGE_TOKENS, hash_chain, root_hash, token_ids
from shared.errors import StartupError
from shared.state.memory import MemoryState
from tests.flow.system import MODEL, System

SECRET = "a secret of the deployment"
PROMPT = list(range(300, 300 + 3 * PAGE_TOKENS + 1))
NUM_PAGES = 3


@asynccontextmanager
async def a_system(**options):
    system = System(**options)
    try:
        await system.start(decodes=1)
        yield system
    finally:
        await system.close()


async def cached_tokens(system, tenant):
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    result = await system.result(await system.submit(body, headers=[("tenant", tenant.encode())]))
    return result.response["usage"]["prompt_tokens_details"]["cached_tokens"]


async def announced(system):
    """Hashes of all blocks that workers have told of."""
    state = MemoryState(system.store)
    feeds = await state.read_block_feeds({worker.incarnation: "0" for worker in system.workers})
    return {block for entry in feeds for block in entry.news.stored}


def guess(system, salt):
    """What an outsider computes who guesses the prompt."""
    return set(hash_chain(root_hash(system.workers[0].engine.model.fingerprint, salt), token_ids(PROMPT)))


@pytest.mark.parametrize("secret", [None, SecretStr(SECRET)], ids=["names alone", "with a secret"])
async def test_a_prompt_that_another_tenant_sent_is_computed_anew(secret):
    async with a_system(cache_salt=CacheSalt(secret)) as system:
        assert await cached_tokens(system, "acme") == 0
        assert await cached_tokens(system, "acme") == NUM_PAGES * PAGE_TOKENS
        assert await cached_tokens(system, "rival") == 0
        assert await cached_tokens(system, "acm") == 0


async def test_announced_blocks_do_not_betray_a_guessed_prompt():
    async with a_system(cache_salt=CacheSalt(SecretStr(SECRET))) as system:
        await cached_tokens(system, "acme")
        await until_announced(system)
        for salt in ("acme", "", SECRET, CacheSalt(SecretStr("another secret, of a rival")).of("acme")):
            assert not await announced(system) & guess(system, salt)
        assert await announced(system) >= guess(system, CacheSalt(SecretStr(SECRET)).of("acme"))


async def test_without_a_secret_they_do_to_who_knows_the_name():
    """Why BATON_CACHE_SALT_FILE is there; docs/security.md says so."""
    async with a_system() as system:
        await cached_tokens(system, "acme")
        await until_announced(system)
        assert await announced(system) >= guess(system, "acme")


async def until_announced(system):
    async with asyncio.timeout(10):
        while len(await announced(system)) < NUM_PAGES:
            await asyncio.sleep(0.02)


def test_a_salt_is_the_same_in_every_process_and_another_for_every_tenant():
    first, second = (CacheSalt(SecretStr(SECRET)) for _ in range(2))
    assert first.of("acme") == second.of("acme") != first.of("rival")
    assert "acme" not in first.of("acme")
    assert SECRET not in f"{first!r} {first}"


@pytest.mark.parametrize("text", ["", "too short", "\n"])
def test_a_secret_that_can_be_guessed_is_refused(tmp_path, text):
    path = tmp_path / "salt"
    path.write_text(text)
    with pytest.raises(StartupError, match=str(path)) as error:
        CacheSalt.read(path)
    assert "too short" not in str(error.value)


def test_a_secret_is_read_without_its_line_end(tmp_path):
    path = tmp_path / "salt"
    path.write_text(SECRET + "\n")
    assert CacheSalt.read(path) == CacheSalt(SecretStr(SECRET))
    assert CacheSalt.read(None) == CacheSalt()
