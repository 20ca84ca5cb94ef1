"""Redis over TLS with users: the whole behaviour suite of the state as Baton's user, and whoever is not let in."""

import asyncio
import inspect
import re
from pathlib import Path

import pytest
import pytest_asyncio

from infra.local.redis import CONFIG
from shared.errors import StartupError
from shared.request import RequestId
from shared.runtime.access import OPEN_REDIS
from shared.state.port import RequestHint, StateUnavailable
from shared.state.redis import redis_state
from tests.contract import test_state
from tests.contract.state_worlds import RedisWorld
from tests.security.certificates import Authority
from tests.security.secure_redis import PASSWORD, relay_to, secure_redis

pytestmark = pytest.mark.asyncio(loop_scope="session")

ROOT = Path(__file__).parents[2]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def redis(tmp_path_factory):
    async with secure_redis(tmp_path_factory.mktemp("secure-redis")) as running:
        yield running


class SecuredWorld(RedisWorld):
    """Baton's user must not empty the store: the operator does."""

    lease_ms = 1600  # each call takes a way of its own through TLS, on a busy machine some hundred milliseconds

    def __init__(self, state, operator):
        super().__init__(state)
        self._operator = operator

    async def flush(self):
        await self._operator._client.flushdb()


@pytest_asyncio.fixture(loop_scope="session")
async def world(redis, monkeypatch):
    # Twenty TLS connections at once take longer than that on a busy machine.
    monkeypatch.setattr("shared.state.redis.ATTEMPT_TIMEOUT_S", 5.0)
    monkeypatch.setattr("shared.state.redis.CALL_TIMEOUT_S", 10.0)
    async with redis_state(redis.url, redis.access()) as state, redis_state(redis.url, redis.operator) as operator:
        world = SecuredWorld(state, operator)
        await world.flush()
        yield world


@pytest.fixture
def state(world):
    return world.state


globals().update(
    {
        name: test
        for name, test in vars(test_state).items()
        if name.startswith("test_") and {"world", "state"} & inspect.signature(test).parameters.keys()
    }
)


async def test_the_user_has_the_commands_of_the_scripts_and_of_the_client_and_no_others():
    """A script that needs another one: add it here and to infra/redis/users.acl."""
    scripts = "".join(path.read_text() for path in (ROOT / "shared/state/lua").glob("*.lua"))
    of_scripts = {name.lower() for name in re.findall(r"redis\.p?call\(\s*'(\w+)'", scripts)}
    of_client = {"ping", "eval", "evalsha", "get", "set", "xadd", "pexpire", "xread"}
    (line,) = [line for line in (CONFIG.parent / "users.acl").read_text().splitlines() if line.startswith("user baton")]
    assert set(re.findall(r"\+(\S+)", line)) == of_scripts | of_client
    assert "~{baton}:*" in line.split()


async def test_a_server_that_somebody_else_signed_is_not_spoken_to(redis, tmp_path):
    stranger = redis.access(redis_ca=Authority(tmp_path, "somebody else").cert)
    await refused(redis.url, stranger, "certificate verify failed")


async def test_a_server_of_another_name_is_not_spoken_to(redis):
    port = int(redis.url.rpartition(":")[2].removesuffix("/0"))
    async with await asyncio.start_server(relay_to(port), "127.0.0.2", port):
        await refused(redis.url.replace("127.0.0.1", "127.0.0.2"), redis.access(), "IP address mismatch")


async def test_who_has_no_certificate_is_not_let_in(redis):
    async with redis_state(redis.url, redis.access(redis_cert=None, redis_key=None)) as state:
        with pytest.raises(StateUnavailable):
            await state.workers(num_slots=1)


async def refused(url, access, words):
    async with redis_state(url, access) as state:
        with pytest.raises(StartupError, match=words):
            await state.check_access()
        with pytest.raises(StateUnavailable, match=words) as error:
            await state.workers(num_slots=1)
        assert PASSWORD not in str(error.value)
        assert not await state.reachable()


async def test_a_wrong_password_is_refused_and_not_shown(redis):
    await refused(redis.url, redis.access(password="a-guess-of-it"), "WRONGPASS|invalid username-password")
    await refused(redis.url, redis.access("nobody"), "WRONGPASS|invalid username-password")


async def test_without_a_password_nothing_works(redis):
    certificates = redis.access().certificates
    async with redis_state(redis.url, type(OPEN_REDIS)(certificates)) as state:
        with pytest.raises(StateUnavailable, match=r"refused.*permission"):
            await state.workers(num_slots=1)


async def test_a_server_that_is_away_is_waited_for(redis):
    async with redis_state("rediss://127.0.0.1:1/0", redis.access()) as state:
        await state.check_access()


@pytest.mark.parametrize(
    "command",
    [
        ("FLUSHALL",),
        ("CONFIG", "GET", "*"),
        ("KEYS", "*"),
        ("ACL", "LIST"),
        ("SHUTDOWN",),
        ("SCRIPT", "FLUSH"),
        ("GET", "another application's"),
        ("SET", "another application's", "1"),
        ("EVAL", "return redis.call('GET', KEYS[1])", "1", "another application's"),
        ("EVAL", "return redis.call('KEYS', '*')", "0"),
        ("PUBLISH", "channel", "x"),
    ],
)
async def test_what_baton_never_does_its_user_may_not_do(state, command):
    with pytest.raises(StateUnavailable, match="refused: "):
        await state._ask(lambda: state._client.execute_command(*command))
    await state.note_request(RequestId("r"), RequestHint(0, 1), keep_ms=1000)  # and goes on


async def test_nothing_that_holds_the_password_shows_it(redis, world):
    pool = world.state._client.connection_pool
    access = redis.access()
    assert PASSWORD not in f"{access!r} {world.state._client!r} {pool!r} {pool.make_connection()!r}"
