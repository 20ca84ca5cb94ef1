"""The local stack with real Kafka and Redis, from the library and from the command line."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from infra.local.composition import Composition, Service
from infra.local.kafka import kafka_ready
from infra.local.probes import accepts_connections, redis_ready
from infra.local.process import start_ticks
from infra.local.stack import local_stack
from infra.local.state_file import StackPhase, StackRecord, StateFile
from shared.errors import StartupError

ANSWER_READY = """
import http.server, os
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(os.environ["BATON_HTTP_PORT"])), Answer).serve_forever()
"""
SERVICES = (
    Service("first", (sys.executable, "-c", ANSWER_READY), 21_100),
    Service("second", (sys.executable, "-c", ANSWER_READY), 21_200),
)
BROKEN = Service("broken", (sys.executable, "-c", "raise SystemExit('no engine')"), 21_300)
NO_SERVICES = ("--ingest", "0", "--prefill", "0", "--decode", "0", "--edge", "0")


def pids_of(record: StackRecord) -> list[int]:
    return [process.pid for process in record.processes]


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while left := [pid for pid in pids if start_ticks(pid) is not None]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.05)


async def test_a_stack_starts_serves_survives_a_killed_kafka_and_leaves_nothing(tmp_path):
    reports: list[str] = []
    composition = Composition(counts={"first": 1, "second": 2}, model="", kafka_port=None, redis_port=None)
    async with local_stack(composition, tmp_path, services=SERVICES, report=reports.append) as stack:
        record = StateFile(tmp_path).read()
        assert record.phase is StackPhase.READY
        assert [process.name for process in record.processes] == ["kafka", "redis", "first-0", "second-0", "second-1"]
        assert {path.name for path in (tmp_path / "logs").iterdir()} == {f"{p.name}.log" for p in record.processes}
        host, _, redis_port = stack.redis_url.removeprefix("redis://").removesuffix("/0").rpartition(":")
        assert await redis_ready(host, int(redis_port))

        with pytest.raises(StartupError, match=r"runs in .* already"):
            async with local_stack(composition, tmp_path):
                pass

        async with AIOKafkaProducer(bootstrap_servers=stack.kafka_address, acks="all") as producer:
            await producer.send_and_wait("ingest", b"kept", partition=3)
        before = stack.pid("kafka")
        stack.send_signal("kafka", signal.SIGKILL)
        async with AIOKafkaConsumer(
            "ingest", bootstrap_servers=await until_another_kafka(stack, before), auto_offset_reset="earliest"
        ) as consumer:
            assert (await consumer.getone()).value == b"kept"
        pids = pids_of(StateFile(tmp_path).read())
    assert any("kafka ended with signal SIGKILL" in line for line in reports)
    assert_gone(pids)
    assert StateFile(tmp_path).read() is None


async def until_another_kafka(stack, pid_before: int) -> str:
    host, _, port = stack.kafka_address.rpartition(":")
    deadline = time.monotonic() + 60
    while stack.pid("kafka") == pid_before or not await kafka_ready(host, int(port)):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    return stack.kafka_address


async def test_a_part_that_cannot_start_stops_the_rest(tmp_path):
    composition = Composition(counts={"broken": 1, "first": 1}, model="", kafka_port=None, redis_port=None)
    reports: list[str] = []
    with pytest.raises(StartupError, match=r"(?s)broken-0 ended with exit status 1.*no engine"):
        async with local_stack(composition, tmp_path, services=(*SERVICES, BROKEN), report=reports.append):
            pytest.fail("entered")
    address = next(line for line in reports if line.startswith("kafka is ready")).rpartition(" ")[2]
    host, _, port = address.rpartition(":")
    assert not await accepts_connections(host, int(port))
    assert StateFile(tmp_path).read() is None


def baton(*arguments: str, run_dir: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "infra.local", *arguments, "--run-dir", str(run_dir)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_command_line_from_up_over_a_crash_to_down(tmp_path):
    up = baton("up", *NO_SERVICES, run_dir=tmp_path)
    assert up.returncode == 0, up.stdout + up.stderr
    record = StateFile(tmp_path).read()
    assert record.address_of("kafka") in up.stdout
    status = baton("status", run_dir=tmp_path)
    assert status.returncode == 0
    assert all(word in status.stdout for word in ("kafka", "redis", "ready", str(record.processes[0].pid)))

    again = baton("up", *NO_SERVICES, run_dir=tmp_path)
    assert (again.returncode, "the stack runs already" in again.stdout) == (0, True)
    other = baton("up", *NO_SERVICES, "--num-pages", "9", run_dir=tmp_path)
    assert (other.returncode, "another composition" in other.stdout) == (1, True)

    os.kill(record.pid, signal.SIGKILL)
    assert_gone([record.pid, *pids_of(record)])
    crashed = baton("status", run_dir=tmp_path)
    assert (crashed.returncode, "the supervisor is gone" in crashed.stdout) == (1, True)

    up = baton("up", *NO_SERVICES, run_dir=tmp_path)
    assert up.returncode == 0, up.stdout + up.stderr
    record = StateFile(tmp_path).read()
    assert "stopped" in baton("down", run_dir=tmp_path).stdout
    assert_gone([record.pid, *pids_of(record)])
    assert "no stack runs" in baton("down", run_dir=tmp_path).stdout
    assert baton("status", run_dir=tmp_path).returncode == 1


def test_ctrl_c_while_it_starts_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "-m", "infra.local", "up", *NO_SERVICES, "--foreground", "--run-dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as supervisor:
        while (record := StateFile(tmp_path).read()) is None or min(pids_of(record), default=0) == 0:
            assert supervisor.poll() is None
            time.sleep(0.02)
        assert record.phase is StackPhase.STARTING
        supervisor.send_signal(signal.SIGINT)
        assert supervisor.wait(60) == 0
    assert_gone(pids_of(record))
    assert StateFile(tmp_path).read() is None
