"""The two processes of a measurement, and the lines of JSON by which they are told what to do."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ANSWER_TIMEOUT_S = 120.0
LAST_WORDS_S = 10.0
"""How long a child that fails may take to say why."""

MAX_LINE_BYTES = 2**26
"""Thousands of tickets are one line."""

OWN_STDOUT = {"UCX_LOG_FILE": "stderr"}
"""A child's stdout is for answers, from its start on."""

Command = Callable[..., Awaitable[object]]


async def obey(commands: Mapping[str, Command]) -> None:
    """In a child: answer each line `{"do": name, **arguments}` of stdin by one line, until stdin ends.

    An error ends the child. What else the process prints, UCX's warnings say, goes to stderr.
    """
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        while line := await asyncio.to_thread(sys.stdin.readline):
            given = json.loads(line)
            answer = await commands[given.pop("do")](**given)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


class Child:
    """One of the processes, seen from the parent."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, do: str, **arguments: object) -> Any:
        """What the command `do` answers; one at a time. Raises RuntimeError if the process ended over it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            await self._process.stdin.drain()
            line = await self._process.stdout.readline()
        if not line:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), LAST_WORDS_S)
            raise RuntimeError(f"a process of the measurement ended over {do!r}")
        return json.loads(line)

    async def end(self) -> None:
        """By the end of its stdin."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            await self._process.wait()

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


@asynccontextmanager
async def children(module: str, jobs: Sequence[object], gpus: Sequence[str] | None) -> AsyncGenerator[list[Child]]:
    """A process of `python -m module JOB` for each job, each masked to its own of `gpus`."""
    started: list[Child] = []
    try:
        for index, job in enumerate(jobs):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", module, json.dumps(job)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=os.environ | OWN_STDOUT | ({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus[index]}),
                cwd=ROOT,
                limit=MAX_LINE_BYTES,
            )
            started.append(Child(process))
        yield started
        for child in started:
            await child.end()
    finally:
        for child in started:
            await child.kill()
