import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from infra.local.process import Child, ProcessSpec, describe_exit, running, start_ticks, tail
from shared.errors import StartupError


async def at_once() -> bool:
    return True


async def never() -> bool:
    return False


def a_spec(code: str, is_ready=at_once, **changes) -> ProcessSpec:
    return ProcessSpec(
        name="child", command=(sys.executable, "-c", code), address="nowhere", is_ready=is_ready, **changes
    )


SLEEP = "import time; print('asleep', flush=True); time.sleep(60)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"


def logged(path: Path, text: str):
    async def look() -> bool:
        return text in path.read_text()

    return look


async def test_a_running_child_ends_with_its_block(tmp_path):
    async with running(a_spec(SLEEP), tmp_path / "log") as child:
        assert start_ticks(child.pid) == child.start_ticks is not None
    assert start_ticks(child.pid) is None


async def test_a_child_that_ignores_sigterm_is_killed(tmp_path):
    log = tmp_path / "log"
    async with running(a_spec(DEAF, logged(log, "asleep"), stop_within_s=0.2), log) as child:
        pass
    assert await child.wait() == -signal.SIGKILL


async def test_what_a_child_started_ends_with_it(tmp_path):
    log = tmp_path / "log"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]).wait()"
    async with running(a_spec(code, logged(log, "asleep")), log) as child:
        (grandchild,) = psutil.Process(child.pid).children()
    grandchild.wait(5)


async def test_a_child_that_dies_at_the_start_is_told_with_the_end_of_its_log(tmp_path):
    spec = a_spec("print('no such file: pages'); raise SystemExit(3)", never)
    with pytest.raises(StartupError, match=r"(?s)child ended with exit status 3.*no such file: pages"):
        async with running(spec, tmp_path / "log"):
            pass


async def test_a_child_that_is_not_ready_in_time_fails_and_is_stopped(tmp_path):
    child = await Child.start(a_spec(SLEEP, never, ready_within_s=0.2), tmp_path / "log")
    with pytest.raises(StartupError, match=r"not ready after 0.2 s"):
        await child.until_ready()
    await child.stop()
    assert start_ticks(child.pid) is None


async def test_a_child_dies_with_a_killed_parent(tmp_path):
    parent = f"""
import asyncio, pathlib
from infra.local.process import Child, ProcessSpec
async def ready(): return True
async def main():
    spec = ProcessSpec(name="c", command=({sys.executable!r}, "-c", {SLEEP!r}), address="", is_ready=ready)
    child = await Child.start(spec, pathlib.Path({str(tmp_path / "log")!r}))
    print(child.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", parent],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
    ) as process:
        child_pid = int(process.stdout.readline())
        assert start_ticks(child_pid) is not None
        process.kill()
    for _ in range(100):
        if start_ticks(child_pid) is None:
            return
        await asyncio.sleep(0.05)
    pytest.fail("the child outlived its parent")


def test_a_pid_is_told_from_its_next_owner():
    assert start_ticks(os.getpid()) != start_ticks(1)
    assert start_ticks(2**22 + 1) is None


def test_exits_in_words():
    assert describe_exit(-9) == "signal SIGKILL"
    assert describe_exit(0) == "exit status 0"
    assert describe_exit(None) == "no exit status yet"


def test_the_tail_of_a_log(tmp_path):
    log = tmp_path / "log"
    log.write_text("".join(f"line {n}\n" for n in range(5000)))
    assert tail(log, 2) == "    line 4998\n    line 4999"
    log.write_text("")
    assert tail(log) == ""
