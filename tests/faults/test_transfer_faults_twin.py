"""The same as `test_transfer_faults` on the twin, under a clock that jumps: thousands of moments in little time.

Real roles and page accounting; a model whose tokens depend on every position of the KV that it finds; workers, engines,
log and wire in one event loop. A schedule strikes up to three times, at moments drawn from its seed.
"""

import asyncio
import os
import random
from collections import Counter
from contextlib import suppress

from services.decode.role import DecodeRole
from services.prefill.role import PrefillRole
from shared.blocks import token_ids
from shared.engine.fake import fake_answer, fake_engine
from shared.request import Incarnation, PlacementId, RequestId, WorkerRef
from shared.transfer.local import LocalNetwork, LocalTransfer
from shared.transfer.offer import OfferState
from shared.transfer.port import Outcome
from shared.wire.to_worker import TO_DECODE_DECODER, Assignment, FirstToken, PrefillWork, Stop
from shared.worker.engine_thread import Step
from tests.engine_driver import greedy
from tests.unit.services.worker_context import InlineEngine, a_context
from tests.virtual_loop import run_virtually

NUM_SCHEDULES = int(os.environ.get("BATON_FAULT_SCHEDULES", "400"))

HOLD_S = 1.5
PULL_TIMEOUT_S = 1.0
DEADLINE_S = 20.0
"""Of virtual time; the longest strike takes 4 s."""

FAULTS = ("kill prefill", "kill decode", "stop prefill", "stop decode", "cut", "withdraw", "cancel", "break off")
SLOTS = {"prefill": 0, "decode": 1}


class Tied(InlineEngine):
    """Steps in the loop, each step taking a while, until its worker is stopped or dead."""

    def __init__(self, engine, step_s):
        super().__init__(engine)
        self.awake = asyncio.Event()
        self.awake.set()
        self._step_s = step_s
        self._called = asyncio.Event()

    def call(self, command):
        self._called.set()
        return super().call(command)

    async def run(self, role):
        loop = asyncio.get_running_loop()
        while True:
            self._called.clear()
            await self.awake.wait()
            if not self.engine.has_work():
                await self._called.wait()
                continue
            started_s = loop.time()
            await asyncio.sleep(self._step_s)
            output = self.engine.step()
            await asyncio.sleep(0)  # what it said of chunks is heard before its tokens, as from a thread
            await role.handle(Step(output, started_s, loop.time()))


class Handoff:
    """The log from prefill to decode."""

    def __init__(self, deliver, delay_s):
        self._deliver = deliver
        self._delay_s = delay_s

    async def send(self, topic, slot, value):
        assert (topic, slot) == ("decode", SLOTS["decode"])
        await asyncio.sleep(self._delay_s)
        self._deliver(TO_DECODE_DECODER.decode(value))
        return 0


class Worker:
    """One worker in a task of its own; killing it ends the task."""

    def __init__(self, scene, name):
        self.scene = scene
        self.name = name
        self.me = WorkerRef(SLOTS[name], Incarnation(f"{name} {next(scene.numbers)}"))
        self.tied = Tied(fake_engine(num_pages=12, max_batch_tokens=64), scene.rng.choice((0.002, 0.01, 0.05)))
        self.transfer = LocalTransfer(
            scene.network,
            self.tied.engine.cache,
            address=f"{self.me.incarnation}:1",
            incarnation=self.me.incarnation,
            clock=asyncio.get_running_loop().time,
            max_part_bytes=scene.rng.choice((1, 2, 8)) * self.tied.engine.model.layout.page_bytes,
        )
        self.role = None
        self.frames = None
        self._up = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    async def up(self):
        await self._up.wait()
        return self

    async def _run(self):
        with suppress(asyncio.CancelledError):
            async with self.transfer, a_context(self.tied, me=self.me) as context:
                context.transfer = self.transfer
                context.random_bytes = self.scene.rng.randbytes
                context.handoff = Handoff(self.scene.to_decode, self.scene.rng.choice((0.0, 0.02, 0.3)))
                self.frames = context.frames
                if self.name == "prefill":
                    self.role = PrefillRole(context, hold_s=HOLD_S)
                else:
                    self.role = DecodeRole(context, pull_timeout_s=PULL_TIMEOUT_S)
                self._up.set()
                await self.tied.run(self.role)

    def take(self, message):
        if message.target == self.me:
            self.role.take(message)

    def free(self):
        """What is not free, as text; nothing if all is."""
        self.tied.engine.check()
        stats = self.tied.engine.stats()
        taken = stats.num_pages - stats.num_free_pages
        at_work = stats.num_waiting + stats.num_running + stats.num_held + stats.num_importing
        offers, left = self.transfer.num_offers, len(self.role.unfinished())
        return "" if taken == at_work == offers == left == 0 else f"{stats}, {offers} offers, {left} unfinished"


class Scene:
    """One schedule."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.numbers = iter(range(100))
        self.network = LocalNetwork(self.rng.choice((0.0, 0.005, 0.05)), self.rng.choice((None, 1e5, 1e6)))
        self.delay_s = self.network.delay_s
        self.works = {}
        self.told_token = set()
        self.excused = set()
        self.gone = []
        self.states = Counter()
        self.faults = Counter()

    async def play(self):
        self.workers = {name: await Worker(self, name).up() for name in SLOTS}
        try:
            await self._play()
        finally:
            for worker in self.workers.values():
                worker.task.cancel()
            await asyncio.wait({worker.task for worker in (*self.workers.values(), *self.gone)})
        for worker in (*self.workers.values(), *self.gone):
            worker.task.result()
        assert not self.network.links

    async def _play(self):
        strikes = asyncio.create_task(self._strike_all())
        for number in range(self.rng.randrange(2, 6)):
            self._submit(f"k{number}")
            await asyncio.sleep(self.rng.choice((0.0, 0.03)))
        await strikes
        await self._settle()
        self.network._num_to_fail = 0  # struck where no pull came any more
        self._submit("proof", token_ids(range(3, 203)))
        await self._settle()
        assert self.workers["prefill"].transfer.offers._ended["proof"].outcome is Outcome.PULLED

    def _submit(self, key, ids=None):
        ids = ids or token_ids(self.rng.randrange(3, 990) for _ in range(self.rng.randrange(1, 260)))
        max_tokens = self.rng.randrange(2, 9)
        salt = self.rng.choice(("", key))
        prefill, decode = self.workers["prefill"].me, self.workers["decode"].me
        assignment = Assignment(
            RequestId(key), 0, 1, PlacementId(key), len(ids), greedy(max_tokens), deadline_s=1e9, cache_salt=salt
        )
        self.works[key] = PrefillWork(assignment, ids, prefill, decode)
        self.workers["prefill"].take(self.works[key])

    def to_decode(self, message):
        if isinstance(message, FirstToken):
            self.told_token.add(message.placement)
        if isinstance(message, Stop):
            self.excused.add(message.placement)
        self.workers["decode"].take(message)

    async def _strike_all(self):
        """Some of them close together: one strikes what the one before has left half done."""
        async with asyncio.TaskGroup() as strikes:
            for _ in range(self.rng.randrange(1, 4)):
                await asyncio.sleep(self.rng.uniform(0, self.rng.choice((0.005, 0.1, 0.5))))
                strikes.create_task(self._strike())

    async def _strike(self):
        rng = self.rng
        fault = rng.choice(FAULTS)
        key = rng.choice(sorted(self.works))
        self.states.update(self._state(key) for key in self.works)
        self.faults[fault] += 1
        kind, _, name = fault.partition(" ")
        if kind == "kill":
            await self._kill(name)
        elif kind == "stop":
            await self._stop(self.workers[name])
        elif fault == "cut":
            self.network.cut(rng.choice(list(self.workers.values())).transfer.address)
        elif fault == "withdraw":
            # A prefill that has handed on only takes its offer back; one that ends tells decode.
            self.workers["prefill"].take(Stop(PlacementId(key), self.workers["prefill"].me))
            if key not in self.told_token:
                self.excused.add(key)
        elif fault == "cancel":
            self.workers["decode"].take(Stop(PlacementId(key), self.workers["decode"].me))
            self.excused.add(key)
        else:
            self.network.fail_next_pull()

    async def _kill(self, name):
        dead = self.workers[name]
        self.network.leave(dead.transfer)
        self.network._transfers[dead.transfer.address] = dead.transfer  # which its own end takes out
        dead.tied.awake.clear()
        self.gone.append(dead)
        lost = [key for key in self.works if name == "decode" or key not in self.told_token]
        self.excused.update(lost)
        self.workers[name] = await self._successor(dead)
        for key in lost:  # as its owner does
            for worker in self.workers.values():
                worker.take(Stop(PlacementId(key), worker.me))

    async def _successor(self, dead):
        dead.task.cancel()
        await asyncio.wait({dead.task})
        return await Worker(self, dead.name).up()

    async def _stop(self, worker):
        pause_s = self.rng.choice((0.05, 0.5, 4.0))
        worker.tied.awake.clear()
        self.network.delay_s = pause_s
        await asyncio.sleep(pause_s)
        self.network.delay_s = self.delay_s
        worker.tied.awake.set()

    def _state(self, key):
        offers = self.workers["prefill"].transfer.offers
        offer = offers._open.get(key) or offers._ended.get(key)
        if offer is None:
            return "no offer"
        if offer.state in (OfferState.CLOSING, OfferState.ENDED):
            return offer.state.name
        state = "SENDING" if offer._num_sending else offer.state.name
        return f"{state}, {'computed' if offer.progress.completed.is_set() else 'computing'}"

    async def _settle(self):
        """All answers are there and right, and all pages free."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not all(self._answered(key) or key in self.excused for key in self.works):
                    await asyncio.sleep(0.05)
                while any(worker.free() for worker in self.workers.values()):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            missing = [key for key in self.works if not (self._answered(key) or key in self.excused)]
            taken = {name: worker.free() for name, worker in self.workers.items()}
            raise AssertionError(f"after {DEADLINE_S} s: no answers to {missing}; not free: {taken}") from None
        for worker in self.workers.values():
            if worker.task.done():
                worker.task.result()

    def _answered(self, key):
        work = self.works[key]
        frames = [entry for worker in (*self.gone, *self.workers.values()) for entry in worker.frames.entries]
        entries = sorted((entry for entry in frames if entry.placement == key), key=lambda entry: entry.index)
        answer = [token for entry in entries for token in entry.ids]
        expected = fake_answer(work.ids, len(work.ids), work.assignment.sampling)
        assert all(entry.error is None for entry in entries), entries
        assert answer == expected[: len(answer)], f"{key}: {answer} instead of {expected}"
        assert [entry.index for entry in entries] == list(range(len(answer)))
        return answer == expected


def test_no_fault_corrupts_leaks_or_hangs():
    tally = Counter()
    for seed in range(NUM_SCHEDULES):
        scene = Scene(seed)
        try:
            run_virtually(scene.play())
        except BaseException as error:
            error.add_note(f"schedule {seed}: {dict(scene.faults)}")
            raise
        tally += scene.states + scene.faults
    computing = ["OFFERED, computing", "PULLING, computing", "SENDING, computing"]
    assert {"no offer", *computing, "OFFERED, computed", "SENDING, computed", "CLOSING", "ENDED", *FAULTS} <= set(tally)
