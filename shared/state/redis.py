"""Coordination on Redis (the commands that Redis 7.0 and Valkey 8 share), by redis-py.

A call that changes something is one script, and each script says at its top why it may be made again. So a lost
connection or answer is dealt with by asking again until the deadline. An await on a connection is never cancelled,
because a reply that nobody takes would be the next caller's: time limits lie inside the client, and a cancelled caller
leaves its call to end by itself.
"""

import asyncio
import ssl
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha1
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import orjson
from pydantic import TypeAdapter, ValidationError
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.maint_notifications import MaintNotificationsConfig

from shared.blocks import BlockHash
from shared.errors import StartupError
from shared.observe.log import logger
from shared.policy.admission import BacklogReport
from shared.policy.limits import Budget, TenantLimits, Verdict
from shared.policy.profile import LinkRate, SpeedProfile
from shared.request import Incarnation, PlacementId, RequestId
from shared.runtime.access import OLDEST_TLS, OPEN_REDIS, RedisAccess
from shared.state import keys
from shared.state.port import (
    BlockFeedEntry,
    BlockNews,
    LiveWorker,
    Placement,
    PlacementKey,
    PublishedBacklog,
    Registry,
    Renewed,
    RequestHint,
    StateUnavailable,
    WorkerCard,
    WorkerLoad,
)
from shared.state.unreadable import Unreadable
from shared.wire.codec import first_problem

CALL_TIMEOUT_S = 1.0
"""A call is not tried again after this; with the last try it may take another ATTEMPT_TIMEOUT_S or two."""

ATTEMPT_TIMEOUT_S = 0.5
"""Limit each of getting a connection from the pool, connecting, and waiting for an answer."""

FIRST_BACKOFF_S = 0.02
NUM_CONNECTIONS = 16
FEED_READ_LENGTH = 8
"""Entries taken of each feed at one read: at most 128 KiB."""

NEWS_FIELDS = ("stored", "evicted", "host_stored", "host_evicted")

WANTS_BLOCKS = 2
"""As beat.lua answers."""

MICROSECONDS = 1_000_000

LOAD_AT = 3
WORKER_ROW = 9
"""Values that workers.lua answers for each."""

VERSION_BYTES = 8

HASHES = struct.Struct("16s")

REFUSED = (AuthenticationError, AuthorizationError, NoPermissionError, ssl.SSLError)
"""Another try does not mend it; whoever gives out the rights must."""

# For a command in a script that the user may not use: the words of Valkey, and of Redis.
SCRIPT_REFUSED_ERRORS = ("ACL failure in script", "The user executing the script can't")

NOT_NOW_ERRORS = (
    "MISCONF",
    "LOADING",
    "MASTERDOWN",
    "CLUSTERDOWN",
    "TRYAGAIN",
    "NOREPLICAS",
    "BUSY ",
    "READONLY",
    "OOM",
)
"""With these words a server answers that is there and cannot serve for now; others tell of a defect."""

AWAY = (RedisConnectionError, RedisTimeoutError, ReadOnlyError, OutOfMemoryError, OSError)

# uvloop's word, a RuntimeError, for a write to a connection that was reset since it was made.
CLOSED_TRANSPORT_ERROR = "the handler is closed"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and the name by which the server caches it."""

    source: str
    sha: str


@dataclass(frozen=True, slots=True)
class Speeds:
    """What a worker measured."""

    profile: SpeedProfile | None = None
    links: Mapping[Incarnation, LinkRate] = field(default_factory=dict[Incarnation, LinkRate])


@dataclass(frozen=True, slots=True)
class Said:
    """What a worker says of itself that seldom changes, and the name of this version of it."""

    version: bytes
    card: WorkerCard
    speeds: Speeds


@dataclass(frozen=True, slots=True)
class Known:
    """A worker as it was last read: what did not change since is neither sent nor read again, and is the same object.

    Attributes:
        told: its row of workers.lua's answer, without card and speeds.
    """

    told: list[Any]
    said: Said
    worker: LiveWorker


def load_script(name: str) -> Script:
    """The script `lua/<name>.lua` behind the prelude."""
    folder = files("shared.state").joinpath("lua")
    source = folder.joinpath("prelude.lua").read_text() + folder.joinpath(f"{name}.lua").read_text()
    return Script(source, sha1(source.encode(), usedforsecurity=False).hexdigest())


@asynccontextmanager
async def redis_state(url: str, access: RedisAccess = OPEN_REDIS) -> AsyncGenerator["RedisState"]:
    """A `State` on the Redis at `url`. Entering does not wait for the server."""
    pool = BlockingConnectionPool.from_url(  # pyright: ignore[reportUnknownMemberType]
        url,
        max_connections=NUM_CONNECTIONS,
        timeout=ATTEMPT_TIMEOUT_S,
        socket_timeout=ATTEMPT_TIMEOUT_S,
        socket_connect_timeout=ATTEMPT_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
        **_access_options(url, access),
    )
    state = RedisState(Redis.from_pool(pool))
    try:
        yield state
    finally:
        await state.close()


def _access_options(url: str, access: RedisAccess) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if access.credentials is not None:
        options["username"] = access.credentials.user
        options["password"] = access.credentials.password.get_secret_value()
    if url.startswith("rediss:"):
        certificates = access.certificates
        options["ssl_cert_reqs"] = "required"
        options["ssl_check_hostname"] = True
        options["ssl_min_version"] = OLDEST_TLS
        options["ssl_ca_certs"] = _path(certificates.ca)
        options["ssl_certfile"] = _path(certificates.cert)
        options["ssl_keyfile"] = _path(certificates.key)
    return options


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)


class RedisState:
    """See `State`.

    Attributes:
        unreadable: what was passed over at the last look.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._running: set[asyncio.Task[Any]] = set()
        self._scripts: dict[str, Script] = {}
        self._load_reader = TypeAdapter(WorkerLoad)
        self._placement_reader = TypeAdapter(Placement)
        self._report_reader = TypeAdapter(BacklogReport)
        self._card_reader = TypeAdapter(WorkerCard)
        self._speeds_reader = TypeAdapter(Speeds)
        self._known: dict[int, Known] = {}
        self.unreadable = Unreadable(logger("state"))

    async def close(self) -> None:
        """Let calls end that somebody gave up, then close the connections."""
        await asyncio.gather(*self._running, return_exceptions=True)
        await self._client.aclose(close_connection_pool=True)

    async def claim_slot(self, card: WorkerCard, load: WorkerLoad, *, num_slots: int, lease_ms: int) -> int | None:
        names = [*_worker_keys(card.incarnation), *(keys.slot(number) for number in range(num_slots))]
        slot = int(await self._run("claim_slot", names, _worker_args(card, load, lease_ms)))
        return slot if slot >= 0 else None

    async def beat(self, slot: int, card: WorkerCard, load: WorkerLoad, *, lease_ms: int) -> Renewed | None:
        names = [*_worker_keys(card.incarnation), keys.slot(slot), keys.blocks_wanted(card.incarnation)]
        answer = int(await self._run("beat", names, _worker_args(card, load, lease_ms)))
        return Renewed(blocks_wanted=answer == WANTS_BLOCKS) if answer else None

    async def release_slot(self, slot: int, incarnation: Incarnation) -> None:
        await self._run("release_slot", [keys.slot(slot), keys.worker(incarnation)], [incarnation])

    async def workers(self, *, num_slots: int) -> Sequence[LiveWorker]:
        return (await self.registry(num_slots=num_slots)).workers

    async def registry(self, *, num_slots: int) -> Registry:
        nobody = Incarnation("")
        known = self._known
        versions = [known[slot].said.version if slot in known else b"" for slot in range(num_slots)]
        answer: list[Any] = await self._run(
            "workers",
            [keys.slot(number) for number in range(num_slots)],
            [keys.worker(nobody), keys.worker_credits(nobody), *versions],
        )
        read: dict[int, Known] = {}
        unreadable: dict[str, str] = {}
        for start in range(0, len(answer), WORKER_ROW):
            *told, card, speeds = answer[start : start + WORKER_ROW]
            slot, incarnation, *_ = told
            try:
                read[slot] = self._read(told, card, speeds, known.get(slot))
            except ValidationError as error:
                unreadable[incarnation.decode()] = first_problem(error)
        self._known = read
        self.unreadable.note("worker", unreadable)
        return Registry([each.worker for each in read.values()], frozenset(map(Incarnation, unreadable)))

    def _read(self, told: list[Any], card: bytes | None, speeds: bytes | None, known: Known | None) -> Known:
        """Raises ValidationError."""
        if known is not None and known.told == told:
            return known
        slot, _, version, load, num_pages, num_credits, work_us = told
        if known is not None and known.said.version == version:
            said = known.said
        else:
            said = Said(
                version, self._card_reader.validate_json(card or b""), self._speeds_reader.validate_json(speeds or b"")
            )
        if known is not None and known.said is said and known.told[LOAD_AT] == load:
            said_load = known.worker.load
        else:
            read_load, measured = self._load_reader.validate_json(load or b""), said.speeds
            said_load = replace(read_load, profile=measured.profile, links=measured.links)
        worker = LiveWorker(slot, said.card, said_load, num_pages, num_credits, work_us / MICROSECONDS)
        return Known(told, said, worker)

    async def up_ms(self, *, lease_ms: int) -> int:
        return int(await self._run("up", [keys.up()], [lease_ms]))

    async def lease_partitions(
        self, group: str, member: Incarnation, *, num_partitions: int, lease_ms: int
    ) -> frozenset[int]:
        names = [keys.up(), keys.members(group), keys.partitions(group)]
        return frozenset(await self._run("lease_partitions", names, [member, num_partitions, lease_ms]))

    async def leave_group(self, group: str, member: Incarnation) -> None:
        await self._run("leave_group", [keys.members(group), keys.partitions(group)], [member])

    async def group_members(self, group: str) -> frozenset[Incarnation]:
        found: list[bytes] = await self._run("group_members", [keys.members(group)], [])
        return frozenset(Incarnation(member.decode()) for member in found)

    async def place(
        self,
        key: PlacementKey,
        placement: Placement,
        *,
        num_prefill_pages: int,
        num_decode_pages: int,
        prefill_s: float,
        keep_ms: int,
    ) -> Placement | None:
        pages = {placement.prefill: num_prefill_pages}
        pages[placement.decode] = pages.get(placement.decode, 0) + num_decode_pages
        work_us = round(prefill_s * MICROSECONDS)
        names = [_placement_key(key)]
        args: list[Any] = [orjson.dumps(placement), placement.id, keep_ms, keys.WORKER_TRACES_MS]
        for worker, num_pages in pages.items():
            names += [keys.slot(worker.slot), keys.worker(worker.incarnation), keys.worker_credits(worker.incarnation)]
            args += [worker.incarnation, num_pages, work_us if worker == placement.prefill else 0]
        standing: bytes | None = await self._run("place", names, args)
        return None if standing is None else self._placement_reader.validate_json(standing)

    async def find_placement(self, key: PlacementKey) -> Placement | None:
        found: bytes | None = await self._ask(lambda: self._client.get(_placement_key(key)))
        return None if found is None else self._placement_reader.validate_json(found)

    async def computed(self, placement: PlacementId, worker: Incarnation) -> None:
        await self._run("computed", [keys.worker_credits(worker)], [placement])

    async def give_back(self, placement: PlacementId, worker: Incarnation) -> None:
        await self._run("give_back", [keys.worker_credits(worker)], [placement])

    async def note_request(self, request_id: RequestId, hint: RequestHint, *, keep_ms: int) -> None:
        value = f"{hint.partition} {hint.offset}"
        await self._ask(lambda: self._client.set(keys.request(request_id), value, nx=True, px=keep_ms))

    async def find_request(self, request_id: RequestId) -> RequestHint | None:
        found: bytes | None = await self._ask(lambda: self._client.get(keys.request(request_id)))
        if found is None:
            return None
        partition, offset = found.split()
        return RequestHint(int(partition), int(offset))

    async def report_backlog(self, member: Incarnation, report: BacklogReport, *, lease_ms: int) -> None:
        await self._run("report_backlog", [keys.backlogs()], [member, orjson.dumps(report), lease_ms])

    async def backlogs(self, *, lease_ms: int) -> Sequence[PublishedBacklog]:
        answer: list[Any] = await self._run("backlogs", [keys.backlogs()], [lease_ms])
        found: list[PublishedBacklog] = []
        unreadable: dict[str, str] = {}
        for member, age_ms, report in zip(answer[::3], answer[1::3], answer[2::3], strict=True):
            try:
                read = self._report_reader.validate_json(report)
            except ValidationError as error:
                unreadable[member.decode()] = first_problem(error)
            else:
                found.append(PublishedBacklog(Incarnation(member.decode()), read, age_ms / 1000))
        self.unreadable.note("backlog", unreadable)
        return found

    async def take_place(
        self, tenant: str, request_id: RequestId, limits: TenantLimits, *, num_tokens: int, keep_ms: int
    ) -> Verdict:
        names = [keys.place_of(request_id), keys.places(tenant), keys.budgets(tenant)]
        bounds = (limits.max_concurrent, limits.requests_per_minute, limits.tokens_per_minute)
        args = [request_id, tenant, num_tokens, keep_ms, *(-1 if bound is None else bound for bound in bounds)]
        why, retry_ms, *rest = await self._run("take_place", names, args)
        budgets = {
            name: Budget(limit, remaining, reset_ms / 1000)
            for name, limit, remaining, reset_ms in zip(
                ("requests", "tokens"), bounds[1:], rest[::2], rest[1::2], strict=True
            )
            if limit is not None
        }
        return Verdict(why.decode() or None, retry_ms / 1000, budgets)

    async def leave_place(self, request_id: RequestId, *, num_tokens: int) -> None:
        prefixes = [keys.places(""), keys.budgets("")]
        await self._run("leave_place", [keys.place_of(request_id)], [request_id, num_tokens, *prefixes])

    async def tenant_of(self, request_id: RequestId) -> str | None:
        found: bytes | None = await self._ask(lambda: self._client.get(keys.place_of(request_id)))
        return None if found is None else found.decode().partition(" ")[2]

    async def announce_blocks(self, incarnation: Incarnation, sequence: int, news: BlockNews) -> None:
        names = [keys.block_feed(incarnation), keys.blocks_wanted(incarnation)]
        kind = "full" if news.is_full else "more"
        args: list[Any] = [sequence, keys.BLOCK_FEED_LENGTH, keys.WORKER_TRACES_MS, kind, "kind", kind]
        for name in NEWS_FIELDS:
            blocks: tuple[BlockHash, ...] = getattr(news, name)
            if blocks:
                args += [name, b"".join(blocks)]
        await self._run("announce_blocks", names, args)

    async def read_block_feeds(self, cursors: Mapping[Incarnation, str]) -> Sequence[BlockFeedEntry]:
        if not cursors:
            return []
        incarnations = {keys.block_feed(incarnation).encode(): incarnation for incarnation in cursors}
        streams = {keys.block_feed(incarnation): cursor for incarnation, cursor in cursors.items()}
        found: list[Any] = await self._ask(lambda: self._client.xread(streams, count=FEED_READ_LENGTH))
        entries: list[BlockFeedEntry] = []
        unreadable: dict[str, str] = {}
        for feed, told in found:
            for entry_id, fields in told:
                try:
                    entries.append(_feed_entry(incarnations[feed], entry_id, fields))
                except (KeyError, struct.error) as error:
                    unreadable[incarnations[feed]] = repr(error)
                await asyncio.sleep(0)  # full lists of many workers at once must not hold up placements
        self.unreadable.note("feed", unreadable)
        return entries

    async def ask_for_blocks(self, incarnation: Incarnation) -> None:
        name = keys.blocks_wanted(incarnation)
        await self._ask(lambda: self._client.set(name, b"1", px=keys.WORKER_TRACES_MS))

    async def check_access(self) -> None:
        """Return if the store lets us in, or does not answer: that may change.

        Raises StartupError if it does not trust us, or we do not trust it.
        """
        try:
            await self._client.ping()
        except (*REFUSED, *AWAY) as error:
            if _is_refusal(error):
                raise StartupError(f"Redis and this process do not come together: {error}") from error

    async def reachable(self) -> bool:
        try:
            return bool(await self._ask(self._client.ping))
        except StateUnavailable:
            return False

    async def _run(self, name: str, names: Sequence[str], args: Sequence[Any]) -> Any:
        script = self._scripts.get(name)
        if script is None:
            script = self._scripts[name] = load_script(name)

        async def run() -> Any:
            try:
                return await self._client.execute_command("EVALSHA", script.sha, len(names), *names, *args)
            except NoScriptError:
                return await self._client.execute_command("EVAL", script.source, len(names), *names, *args)

        return await self._ask(run)

    async def _ask(self, command: Callable[[], Awaitable[T]]) -> T:
        asking = asyncio.create_task(_until_answered(command))
        self._running.add(asking)
        asking.add_done_callback(self._running.discard)
        return await asyncio.shield(asking)


async def _until_answered(command: Callable[[], Awaitable[T]]) -> T:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + CALL_TIMEOUT_S
    backoff_s = FIRST_BACKOFF_S
    while True:
        try:
            return await command()
        except (*REFUSED, ResponseError, *AWAY, RuntimeError) as error:
            if _is_refusal(error):
                raise StateUnavailable(f"refused: {error}") from error
            if not _may_pass(error):
                raise
            if loop.time() + backoff_s > deadline:
                told = f"{type(error).__name__}: {error}"  # the client's own repr leaves the server's words out
                raise StateUnavailable(f"no answer within {CALL_TIMEOUT_S} s: {told}") from error
            await asyncio.sleep(backoff_s)
            backoff_s *= 2


def _may_pass(error: Exception) -> bool:
    """Whether the same call may go well a little later."""
    if isinstance(error, (*AWAY, ClusterError)):
        return True
    return (
        str(error).startswith(NOT_NOW_ERRORS)
        if isinstance(error, ResponseError)
        else CLOSED_TRANSPORT_ERROR in str(error)
    )


def _is_refusal(error: BaseException | None) -> bool:
    """Whether one side does not trust the other; the client says of a failed handshake only that it failed."""
    if error is None:
        return False
    refused = isinstance(error, REFUSED) or any(words in str(error) for words in SCRIPT_REFUSED_ERRORS)
    return refused or _is_refusal(error.__cause__ or error.__context__)


def _placement_key(key: PlacementKey) -> str:
    return keys.placement(key.request_id, key.choice, key.epoch)


def _worker_keys(incarnation: Incarnation) -> list[str]:
    return [keys.up(), keys.worker(incarnation), keys.worker_credits(incarnation), keys.block_feed(incarnation)]


def _worker_args(card: WorkerCard, load: WorkerLoad, lease_ms: int) -> list[Any]:
    """Apart: what readers take only where it changed, what they take each time, and what a placement asks for."""
    said_card, speeds = orjson.dumps(card), orjson.dumps(Speeds(load.profile, load.links))
    fields: dict[str, Any] = {
        "card": said_card,
        "speeds": speeds,
        "version": sha1(said_card + speeds, usedforsecurity=False).hexdigest()[: 2 * VERSION_BYTES],
        "load": orjson.dumps(replace(load, profile=None, links={})),
        "takes_work": int(load.takes_work),
        "num_pages": card.num_pages,
        "max_running": card.max_running,
    }
    return [card.incarnation, lease_ms, keys.WORKER_TRACES_MS, *chain.from_iterable(fields.items())]


def _feed_entry(incarnation: Incarnation, entry_id: bytes, fields: Mapping[bytes, bytes]) -> BlockFeedEntry:
    """Raises KeyError or struct.error for one of another version."""
    cursor = entry_id.decode()
    blocks = {name: _hashes(fields.get(name.encode(), b"")) for name in NEWS_FIELDS}
    return BlockFeedEntry(
        incarnation=incarnation,
        sequence=int(cursor.partition("-")[0]) - 1,
        news=BlockNews(**blocks, is_full=fields[b"kind"] == b"full"),
        cursor=cursor,
    )


def _hashes(joined: bytes) -> tuple[BlockHash, ...]:
    return tuple(block for (block,) in HASHES.iter_unpack(joined))
