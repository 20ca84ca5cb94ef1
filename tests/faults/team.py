"""A prefill and a decode worker in processes of their own, the log between them, and a cable that can be cut."""

import asyncio
import json
import os
import signal
import sys
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field

from shared.blocks import token_ids
from shared.request import FinishReason, Incarnation, PlacementId, RequestId, WorkerRef
from shared.wire.codec import encode
from shared.wire.to_worker import Assignment, PrefillWork, Stop
from shared.wire.wire_format import WireFormat
from tests.engine_driver import greedy
from tests.faults.board import Board, Phase, slot_of
from tests.faults.worker import Spec

START_TIMEOUT_S = 60.0
POLL_S = 0.02
SLOTS = {"prefill": 1, "decode": 2}


class Died(Exception):
    """A worker ended that nobody killed."""


class Process:
    """One worker as the test sees it.

    Attributes:
        board: where its hand-overs stand.
        at_point: gets the slot of the hand-over at whose point it stands still.
        is_dead, is_stopped: by the test's doing.
    """

    def __init__(self, spec, board):
        self.spec = spec
        self.board = board
        self.pid = 0
        self.address = ""
        self.is_dead = False
        self.is_stopped = False
        self.at_point = asyncio.get_running_loop().create_future()
        self._talk = None
        self._gate = None
        self._up = asyncio.Event()
        self._answers = {name: asyncio.Queue() for name in ("report", "connected")}

    @property
    def ref(self):
        return WorkerRef(self.spec.slot, Incarnation(self.spec.incarnation))

    def tell(self, **command):
        if not self.is_dead:
            self._talk.write(json.dumps(command).encode() + b"\n")

    async def ask(self, answer, **command):
        self.tell(**command)
        return await self._answers[answer].get()

    def arm(self, phase, num_to_pass):
        self.at_point = asyncio.get_running_loop().create_future()
        self.tell(do="arm", phase=phase, num_to_pass=num_to_pass)

    def disarm(self):
        """It does not stand still any more; if it just began to, it goes on."""
        self.at_point.add_done_callback(lambda _: self.go())
        self.tell(do="arm", phase=None, num_to_pass=0)

    def go(self):
        """Go on after the point."""
        if not self.is_dead:
            self._gate.write(b"g")

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        self.is_dead = True

    def stop(self):
        os.kill(self.pid, signal.SIGSTOP)
        self.is_stopped = True

    def resume(self):
        os.kill(self.pid, signal.SIGCONT)
        self.is_stopped = False

    def end(self):
        for writer in (self._talk, self._gate):
            if writer is not None:
                writer.transport.abort()
        if self.pid and not self.is_dead:
            with suppress(ProcessLookupError):
                self.kill()

    async def up(self):
        async with asyncio.timeout(START_TIMEOUT_S):
            await self._up.wait()

    async def follow_gate(self, reader, writer):
        self._gate = writer
        with suppress(OSError):
            while slot := await reader.read(1):
                self.at_point.set_result(slot[0])

    async def follow_talk(self, reader, writer, heard):
        self._talk = writer
        with suppress(OSError):
            while line := await reader.readline():
                said = json.loads(line)
                match said["said"]:
                    case "up":
                        self.address = said["address"]
                        self._up.set()
                    case "report":
                        self._answers["report"].put_nowait(said["wrong"])
                    case "connected":
                        self._answers["connected"].put_nowait(said["why"])
                    case _:
                        heard(said)
        if not self.is_dead:
            heard({"said": "died"})


class Template:
    """The process that all workers are forked from, and the socket by which they talk to the test.

    Attributes:
        answers: the lone engine's, by ids.
    """

    def __init__(self, folder):
        self._folder = folder
        self._processes = {}
        self._tasks = set()
        self._num_boards = 0
        self.answers = {}

    @asynccontextmanager
    async def running(self, checkpoint):
        path = self._folder / "socket"
        references = self._folder / "references"
        server = await asyncio.start_unix_server(self._welcome, path, limit=2**24)
        with (self._folder / "workers.log").open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "tests.faults.template", str(checkpoint), str(references)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            self._drain = None
            try:
                async with asyncio.timeout(START_TIMEOUT_S):
                    line = await self._process.stdout.readline()
                assert line == b"ready\n", (self._folder / "workers.log").read_text()
                self._drain = asyncio.create_task(self._keep_output())
                self.answers = {
                    bytes.fromhex(ids): answer for ids, answer in json.loads(references.read_text()).items()
                }
                yield self
            except Exception as error:
                error.add_note((self._folder / "workers.log").read_text()[-10_000:])
                raise
            finally:
                server.close()
                for process, _ in self._processes.values():
                    process.end()
                self._process.kill()
                await self._process.wait()
                if self._drain is not None:
                    await self._drain
                self._process._transport.close()
                await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _keep_output(self):
        """UCX and the logs of the workers write to it."""
        with (self._folder / "workers.out").open("wb") as out:
            while text := await self._process.stdout.read(2**16):
                out.write(text)
                out.flush()

    async def start(self, role, incarnation, heard, *, hurries):
        """A new worker, which is up; `heard` gets what it says."""
        board = self._folder / f"board-{self._num_boards}"
        self._num_boards += 1
        spec = Spec(role, incarnation, SLOTS[role], str(self._folder / "socket"), str(board), hurries)
        process = Process(spec, Board.create(board))
        self._processes[incarnation] = (process, heard)
        self._process.stdin.write(json.dumps(asdict(spec)).encode() + b"\n")
        await process.up()
        return process

    async def _welcome(self, reader, writer):
        self._tasks.add(asyncio.current_task())
        hello = json.loads(await reader.readline())
        process, heard = self._processes[hello["incarnation"]]
        process.pid = hello["pid"]
        if hello["channel"] == "gate":
            await process.follow_gate(reader, writer)
        else:
            await process.follow_talk(reader, writer, heard)
        writer.transport.abort()


class Cable:
    """Carries TCP connections to one address, until it is cut or frozen."""

    def __init__(self, target):
        self._target = target
        self._writers = set()
        self._tasks = set()
        self._thawed = asyncio.Event()
        self._thawed.set()

    async def lay(self):
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{port}"

    def cut(self):
        for writer in tuple(self._writers):
            writer.transport.abort()

    def freeze(self):
        self._thawed.clear()

    def thaw(self):
        self._thawed.set()

    async def remove(self):
        self._server.close()
        self.thaw()
        while self._tasks:
            self.cut()
            await asyncio.wait(self._tasks, timeout=POLL_S)

    async def _carry(self, reader, writer):
        task = asyncio.current_task()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        host, _, port = self._target.rpartition(":")
        try:
            there, back = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, back}
        self._writers |= ends
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(reader, back))
                both.create_task(self._pump(there, writer))
        except* OSError:
            pass
        finally:
            self._writers -= ends
            for end in ends:
                end.transport.abort()

    async def _pump(self, reader, writer):
        while data := await reader.read(2**16):
            await self._thawed.wait()
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError  # the other direction goes with it


@dataclass
class HandOver:
    """One request on its way through both workers.

    Attributes:
        tokens: as far as they stand in the log, by index.
        is_excused: nobody waits for its answer: it was stopped, or a worker that held it alone is gone.
        has_ticket, told_token: decode was told.
    """

    key: str
    ids: object
    expected: list[int]
    max_loss: WireFormat
    ticket_delay_s: float = 0.0
    tokens: dict[int, int] = field(default_factory=dict)
    failure: str | None = None
    pull: str | None = None
    format: str | None = None
    outcome: str | None = None
    is_excused: bool = False
    has_ticket: bool = False
    told_token: bool = False
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def is_answered(self):
        return len(self.tokens) == len(self.expected)

    @property
    def is_done(self):
        return self.is_answered or self.is_excused

    def take(self, entry):
        assert entry["error"] is None, f"{self.key}: {entry['error']}"
        for index, token in enumerate(entry["ids"], entry["index"]):
            assert index not in self.tokens, f"{self.key}: token {index} came twice"
            self.tokens[index] = token
            assert self.format == WireFormat.INT8 or token == self.expected[index], (
                f"{self.key}: token {index} is {token}, the lone engine's {self.expected[index]}; "
                f"pull: {self.pull}, {self.format}"
            )
        last = entry["index"] + len(entry["ids"]) == len(self.expected)
        lossy = self.format == WireFormat.INT8
        assert lossy or (entry["finish"] == FinishReason.LENGTH) == last, f"{self.key}: it ends otherwise"
        if lossy and entry["finish"] is not None:
            self.is_excused = True  # other tokens may end it earlier


class Team:
    """One prefill and one decode worker with what is between them."""

    def __init__(self, template, name, *, hurries):
        self._template = template
        self._name = name
        self._hurries = hurries
        self._num_started = 0
        self._tasks = set()
        self.hand_overs = {}
        self.broken = None
        self.changed = asyncio.Event()

    async def start(self):
        self.decode = await self._start("decode")
        await self.new_prefill()

    async def new_prefill(self):
        self.prefill = await self._start("prefill")
        self.cable = Cable(self.prefill.address)
        await self.cable.lay()

    async def replace_dead(self):
        if self.prefill.is_dead:
            self.prefill.end()
            await self.cable.remove()
            await self.new_prefill()
        if self.decode.is_dead:
            self.decode.end()
            self.decode = await self._start("decode")

    async def end(self):
        for process in (self.prefill, self.decode):
            process.end()
        await self.cable.remove()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _start(self, role):
        self._num_started += 1
        incarnation = f"{self._name}-{role}-{self._num_started}"
        return await self._template.start(
            role, incarnation, lambda said: self._hear(incarnation, said), hurries=self._hurries
        )

    @property
    def processes(self):
        return (self.prefill, self.decode)

    def begin(self):
        """A new trial."""
        self.hand_overs = {}
        for process in self.processes:
            process.board.clear()

    def hand_over(self, key, ids, expected, *, max_loss=WireFormat.NATIVE, salt="", deadline_s, ticket_delay_s=0.0):
        """Put work for prefill into the log."""
        over = self.hand_overs[key] = HandOver(key, ids, expected, max_loss, ticket_delay_s)
        assignment = Assignment(
            RequestId(key),
            choice=0,
            epoch=1,
            placement=PlacementId(key),
            prompt_len=len(ids) // 4,
            sampling=greedy(len(expected)),
            deadline_s=time.time() + deadline_s,
            cache_salt=salt,
            max_wire_loss=max_loss,
        )
        self._deliver(self.prefill, PrefillWork(assignment, token_ids_of(ids), self.prefill.ref, self.decode.ref))
        return over

    def stop(self, process, key):
        """Nobody wants it any more; told to one worker."""
        self._deliver(process, Stop(PlacementId(key), process.ref))

    def spawn(self, work):
        """Do that beside; it ends with the team at the latest."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._spawned_ended)

    def _spawned_ended(self, task):
        self._tasks.discard(task)
        if not task.cancelled():
            self.broken = self.broken or task.exception()

    def _deliver(self, process, message):
        process.tell(do="take", message=json.loads(encode(message)))

    async def until(self, condition, timeout_s, what):
        """Wait until `condition()`; raises what broke meanwhile, or AssertionError after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    if self.broken is not None:
                        raise self.broken
                    self.changed.clear()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(0.25):
                            await self.changed.wait()
        except TimeoutError as error:
            raise AssertionError(f"not within {timeout_s} s: {what()}") from error

    async def quiet(self, process, timeout_s):
        """Wait until nothing goes on in it and all it has is free."""
        wrong = ["no report"]
        try:
            async with asyncio.timeout(timeout_s):
                while wrong := await process.ask("report", do="report"):
                    if self.broken is not None:
                        raise self.broken
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            raise AssertionError(f"{process.spec.incarnation} after {timeout_s} s: {wrong}") from error

    def _hear(self, incarnation, said):
        try:
            self._handle(incarnation, said)
        except (AssertionError, Died) as error:
            self.broken = self.broken or error
        self.changed.set()

    def _handle(self, incarnation, said):
        match said["said"]:
            case "died":
                raise Died(incarnation)
            case "sent":
                message = said["message"]
                key = message.get("placement") or message["assignment"]["placement"]
                self.spawn(self._relay(self.hand_overs.get(key), message))
            case _ if said["key"] not in self.hand_overs:
                pass  # of a trial before, by a worker that stood still
            case "entry":
                self.hand_overs[said["key"]].take(said)
            case "pulled":
                over = self.hand_overs[said["key"]]
                over.pull, over.format = "pulled", said["format"]
                assert WireFormat(said["format"]).loss <= over.max_loss.loss
                assert said["error"] < 1, f"{over.key}: pages came as others, {said}"
            case "not pulled":
                self.hand_overs[said["key"]].pull = said["why"]
            case "offer ended":
                self.hand_overs[said["key"]].outcome = said["outcome"]

    async def _relay(self, over, message):
        """What prefill tells decode, in order; the ticket later where the test wants it so."""
        if over is None:
            return
        async with over.turn:
            if message["type"] == "decode_work":
                await asyncio.sleep(over.ticket_delay_s)
                message["ticket"]["address"] = self.cable.address
                over.has_ticket = True
            if message["type"] == "first_token":
                over.told_token = True
            if message["type"] == "stop":
                over.is_excused = True
            self.decode.tell(do="take", message=message)

    def state(self, key):
        """Where a hand-over stands, in words, and whether its KV is being computed."""
        slot = slot_of(key)
        source, computing = self.prefill.board.transfer(slot), self.prefill.board.computing(slot)
        puller = self.decode.board.transfer(slot)
        return state_of(source, computing, puller)


def state_of(source, computing, puller):
    """One of STATES."""
    if puller is Phase.ARRIVED:
        return "arrived, not confirmed"
    if puller in (Phase.CONFIRMING, Phase.PULLED) or source in (Phase.CONFIRMED, Phase.RELEASED):
        return "confirmed"
    if source is Phase.ENDED or puller is Phase.FAILED or source is Phase.FAILED:
        return "over"
    if source is Phase.SENDING or puller is Phase.RECEIVING:
        return "part in flight"
    if source is Phase.ANNOUNCED:
        return "part announced"
    if source in (Phase.LET_IN, Phase.SENT) or puller is Phase.ASKED:
        return "let in"
    if source is Phase.OFFERED:
        return "offered, first chunk" if computing is Phase.FIRST_CHUNK else "offered"
    return "before the offer"


STATES = (
    "before the offer",
    "offered, first chunk",
    "offered",
    "let in",
    "part announced",
    "part in flight",
    "arrived, not confirmed",
    "confirmed",
)


def token_ids_of(ids):
    return token_ids([int.from_bytes(ids[at : at + 4], "little") for at in range(0, len(ids), 4)])
