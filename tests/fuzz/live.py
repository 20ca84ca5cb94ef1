"""All services on the twins in a thread of their own, for tests that are no coroutines."""

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from services.ingest.admission import ModelFacts
from shared.blocks import token_ids
from shared.bus.memory import MemoryBus
from shared.engine.fake import FAKE_VOCAB_SIZE, fake_answer
from shared.request import REQUEST_ID_PATTERN, SamplingParams
from shared.wire.topics import INGEST, RESULTS
from tests.flow.system import MODEL, System

MAX_CONTEXT = 256
"""Short, so that an answer of any length is quickly made."""

GOOD_PROMPT = list(range(10, 90))
NUM_GOOD_TOKENS = 5


class Live:
    """A running system and what must stay true of it, whatever it was sent."""

    def __init__(self, system: System, loop: asyncio.AbstractEventLoop) -> None:
        self.system = system
        self._loop = loop

    def run(self, work: Any, timeout_s: float = 60.0) -> Any:
        """The outcome of a coroutine on the system's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def send(self, topic: str, partition: int, value: bytes, *, key: bytes | None = None, headers=()) -> None:
        """Append a record as anybody may who reaches the log."""

        async def append():
            async with MemoryBus(self.system.log, client_id="stranger").producer() as producer:
                await producer.send(topic, partition, value, key=key, headers=tuple(headers))

        self.run(append())

    def check_alive(self) -> None:
        """No service has ended."""
        for running in [*self.system.ingests, *self.system.workers, *self.system.edges]:
            if running.task.done():
                running.task.result()
                raise AssertionError(f"{running.name} ended")

    def check_good_request(self) -> None:
        """A request that is right is answered rightly."""
        body = {
            "model": MODEL,
            "prompt": GOOD_PROMPT,
            "max_tokens": NUM_GOOD_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        result = self.run(self._result_of(body))
        sampling = SamplingParams(max_tokens=NUM_GOOD_TOKENS, temperature=0.0, ignore_eos=True)
        wanted = fake_answer(token_ids(GOOD_PROMPT), len(GOOD_PROMPT), sampling, 0, NUM_GOOD_TOKENS)
        assert result.status == "completed", result
        assert result.response["choices"][0]["text"].strip() == self.system.tokeniser.decode(wanted).strip()
        self.check_alive()

    async def _result_of(self, body: dict) -> Any:
        return await self.system.result(await self.system.submit(body), timeout_s=30)

    async def change_edges(self) -> None:
        """All edges leave; another takes their partitions over."""
        for edge in self.system.edges:
            await edge.leave()
        self.system.edges.clear()
        edge = await self.system.start_edge()
        async with asyncio.timeout(30):
            await edge.until_ready()

    def accepted(self) -> set[bytes]:
        """Keys of all jobs under which they can be answered."""
        partitions = range(INGEST.num_partitions)
        keys = {r.key for partition in partitions for r in self.system.log.records(INGEST.name, partition)}
        return {key for key in keys if key is not None and usable(key)}

    def num_results(self) -> Counter[bytes]:
        """How many results stand under each key."""
        partitions = range(RESULTS.num_partitions)
        return Counter(r.key for partition in partitions for r in self.system.log.records(RESULTS.name, partition))

    def check_each_has_one_result(self, keys: set[bytes]) -> None:
        """Each job got its one end."""
        self.check_numbers_of_results(Counter(keys))

    def check_numbers_of_results(self, wanted: Counter[bytes], timeout_s: float = 60.0) -> None:
        async def wait():
            async with asyncio.timeout(timeout_s):
                while wanted - self.num_results():
                    await asyncio.sleep(0.1)

        with contextlib.suppress(TimeoutError):
            self.run(wait(), timeout_s + 5)
        found = self.num_results()
        assert {key: found[key] for key in wanted} == wanted

    def check_quiet(self) -> None:
        """All pages are back, and all is counted rightly."""
        self.run(self.system.quiet(timeout_s=30))
        self.check_alive()


def usable(key: bytes | None) -> bool:
    """Whether a record of `ingest` under this key can be answered under it."""
    return key is not None and REQUEST_ID_PATTERN.fullmatch(key.decode("utf-8", "replace")) is not None


@contextmanager
def live_system(**counts: int) -> Iterator[Live]:
    """A small system with short answers and little patience for clients that are gone."""
    runner = asyncio.Runner()
    loop = runner.get_loop()
    thread = threading.Thread(target=loop.run_forever, name="system", daemon=True)
    thread.start()

    async def start() -> System:
        system = System(facts=ModelFacts(MODEL, MAX_CONTEXT, FAKE_VOCAB_SIZE), grace_s=0.2, hold_s=1.0)
        await system.start(**({"decodes": 1} | counts))
        return system

    try:
        system = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
        live = Live(system, loop)
        yield live
        live.run(system.close())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        runner.close()
