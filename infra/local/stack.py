"""The local stack: Kafka, Redis, the topics and the services as supervised child processes.

Start order is Kafka and Redis, topics, then the services; stop order is the reverse. A process that does not get ready
fails the start. One that dies later is reported at once and started again after a second, on the same port with the
same data, `max_restarts` times; then it is left dead and the rest goes on.
"""

import asyncio
import fcntl
import os
import random
import shutil
import signal
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from pathlib import Path

from infra.kafka.create_topics import create_topics
from infra.local.composition import SERVICES, Composition, Service, service_spec
from infra.local.kafka import MAX_COPIES, kafka_specs
from infra.local.ports import PortPicker
from infra.local.process import Child, ProcessSpec, start_ticks
from infra.local.redis import redis_spec
from infra.local.state_file import ProcessPhase, ProcessRecord, StackPhase, StackRecord, StateFile
from shared.errors import StartupError

RESTART_DELAY_S = 1.0

BROKERS = "kafka"

Report = Callable[[str], None]
"""Receives one message for people at each event."""


class Supervised:
    """A process that the stack keeps running."""

    def __init__(self, spec: ProcessSpec, log_path: Path) -> None:
        self.spec = spec
        self.log_path = log_path
        self.phase = ProcessPhase.STARTING
        self.restarts = 0
        self.child: Child | None = None
        self.keeper: asyncio.Task[None] | None = None

    async def start(self) -> Child:
        """Starts it; the caller awaits its readiness."""
        self.child = await Child.start(self.spec, self.log_path)
        return self.child

    def record(self) -> ProcessRecord:
        """What the state file says of it."""
        pid, ticks = (self.child.pid, self.child.start_ticks) if self.child else (0, None)
        return ProcessRecord(
            self.spec.name, self.spec.address, str(self.log_path), self.phase, pid, ticks, self.restarts
        )


class Stack:
    """A running stack; made by `local_stack`."""

    def __init__(
        self, composition: Composition, run_dir: Path, services: Sequence[Service], report: Report, rng: random.Random
    ) -> None:
        self.composition = composition
        self.run_dir = run_dir
        self.kafka_address = ""
        self.redis_url = ""
        self._services = {service.name: service for service in services}
        self._report = report
        self._ports = PortPicker(rng)
        self._processes: dict[str, Supervised] = {}
        self._phase = StackPhase.STARTING
        self._state_file = StateFile(run_dir)

    def record(self) -> StackRecord:
        """What runs now."""
        return StackRecord(
            os.getpid(),
            start_ticks(os.getpid()),
            self._phase,
            asdict(self.composition),
            tuple(process.record() for process in self._processes.values()),
        )

    def addresses(self, service: str) -> list[str]:
        """HTTP addresses of the processes of one service."""
        return [process.spec.address for process in self._of(service)]

    def pid(self, name: str) -> int:
        """Process id of `name` now; a restarted process has another."""
        return self._child(name).pid

    def send_signal(self, name: str, signal_number: signal.Signals) -> None:
        """Signals one process, as a fault or an operator would."""
        self._child(name).send_signal(signal_number)

    def _child(self, name: str) -> Child:
        child = self._processes[name].child
        if child is None:
            raise StartupError(f"{name} was never started")
        return child

    async def add(self, service: str) -> str:
        """Starts one more process of a service and returns its name when it is ready."""
        process = self._prepare_service(self._services[service])
        try:
            await self._start([process])
        except StartupError:
            await self.remove(process.spec.name)
            raise
        return process.spec.name

    async def remove(self, name: str) -> None:
        """Stops one process for good."""
        await self._stop(self._processes[name])
        del self._processes[name]
        self._write_state()

    async def start(self) -> None:
        """Starts everything and returns when all of it is ready."""
        data = self.run_dir / "data"
        num_brokers, first_port = self.composition.brokers, self.composition.kafka_port
        ports = [self._ports.pick(first_port if n == 0 else None) for n in range(num_brokers)]
        brokers = kafka_specs(data / "kafka", ports, [self._ports.pick() for _ in range(num_brokers)])
        redis = redis_spec(data / "redis", self._ports.pick(self.composition.redis_port))
        self.kafka_address, self.redis_url = ",".join(broker.address for broker in brokers), redis.address
        await self._start([self._prepare(spec) for spec in (*brokers, redis)])
        await create_topics(self.kafka_address, replication_factor=min(MAX_COPIES, num_brokers))
        await self._start(
            [
                self._prepare_service(service)
                for service in self._services.values()
                for _ in range(self.composition.counts.get(service.name, 0))
            ]
        )
        self._phase = StackPhase.READY
        self._write_state()

    async def stop(self) -> None:
        """Stops everything: the services in the reverse order of their start, then Redis and Kafka."""
        self._phase = StackPhase.STOPPING
        self._write_state()
        for service in (*reversed(self._services), BROKERS, ""):
            await asyncio.gather(*(self._stop(process) for process in self._of(service)))

    def _of(self, service: str) -> list[Supervised]:
        """The processes of one service; of "" Redis and the only broker, of BROKERS each of several."""
        return [process for name, process in self._processes.items() if name.rpartition("-")[0] == service]

    def _prepare(self, spec: ProcessSpec) -> Supervised:
        process = Supervised(spec, self.run_dir / "logs" / f"{spec.name}.log")
        self._processes[spec.name] = process
        return process

    def _prepare_service(self, service: Service) -> Supervised:
        index = 0
        while f"{service.name}-{index}" in self._processes:
            index += 1
        return self._prepare(
            service_spec(
                service,
                index,
                self.composition,
                kafka_address=self.kafka_address,
                redis_url=self.redis_url,
                http_port=self._ports.pick(service.default_port + index),
            )
        )

    async def _start(self, processes: Sequence[Supervised]) -> None:
        starts = [asyncio.create_task(self._start_one(process)) for process in processes]
        try:
            await asyncio.gather(*starts)
        finally:
            for task in starts:
                task.cancel()
            await asyncio.gather(*starts, return_exceptions=True)

    async def _start_one(self, process: Supervised) -> None:
        child = await process.start()
        self._write_state()
        await child.until_ready()
        process.phase = ProcessPhase.READY
        self._write_state()
        self._report(f"{process.spec.name} is ready at {process.spec.address}")
        process.keeper = asyncio.create_task(self._keep(process, child))

    async def _keep(self, process: Supervised, child: Child) -> None:
        """Starts a process again each time it dies, until it has used up its restarts."""
        while True:
            await child.wait()
            may_restart = process.restarts < self.composition.max_restarts
            process.phase = ProcessPhase.RESTARTING if may_restart else ProcessPhase.DEAD
            self._write_state()
            self._report(child.obituary())
            if not may_restart:
                self._report(f"{process.spec.name} stays dead after {process.restarts} restarts")
                return
            await asyncio.sleep(RESTART_DELAY_S)
            process.restarts += 1
            child = await process.start()
            self._write_state()
            try:
                await child.until_ready()
            except StartupError:
                await child.stop()  # the next round reports its end
                continue
            process.phase = ProcessPhase.READY
            self._write_state()
            self._report(f"{process.spec.name} is ready again")

    async def _stop(self, process: Supervised) -> None:
        if process.keeper is not None:
            process.keeper.cancel()
            await asyncio.gather(process.keeper, return_exceptions=True)
        if process.child is not None:
            await process.child.stop()

    def _write_state(self) -> None:
        self._state_file.write(self.record())


@asynccontextmanager
async def local_stack(
    composition: Composition,
    run_dir: Path,
    *,
    services: Sequence[Service] = SERVICES,
    report: Report = lambda _: None,
) -> AsyncGenerator[Stack]:
    """Starts a stack that keeps state, logs and data in `run_dir`; enters when it is ready, stops it at the end.

    Raises:
        StartupError: another stack runs in `run_dir`, or a part of this one did not start.
    """
    run_dir = run_dir.resolve()
    with _only_one(run_dir):
        _put_old_logs_aside(run_dir)
        stack = Stack(composition, run_dir, services, report, random.Random())
        try:
            await stack.start()
            yield stack
        finally:
            await stack.stop()
            StateFile(run_dir).remove()


@contextmanager
def _only_one(run_dir: Path) -> Generator[None]:
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartupError(f"a stack runs in {run_dir} already; `make status` shows it") from None
        yield


def _put_old_logs_aside(run_dir: Path) -> None:
    logs = run_dir / "logs"
    if logs.exists():
        shutil.rmtree(run_dir / "logs.previous", ignore_errors=True)
        logs.rename(run_dir / "logs.previous")
