"""Simulated runs by several processes, kept in a file as they end: what is there is not done again."""

import gc
import json
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from math import inf
from pathlib import Path
from queue import PriorityQueue
from typing import Any, NamedTuple, TextIO

from loadgen.simulator.hardware import Hardware
from loadgen.simulator.outcome import Outcome, outcome_of
from loadgen.simulator.policies import Goals, contender
from loadgen.simulator.simulation import Setup, simulate
from loadgen.simulator.workload import Workload
from shared.errors import StartupError
from shared.policy.profile import LinkRate

SAY_EVERY_S = 30.0


class Stream(NamedTuple):
    """Which requests: a trace or the mix of all, its conversations up to a longest prompt, its first rows, copies."""

    trace: str
    max_input: int | None
    num_rows: int | None
    copies: int


class Run(NamedTuple):
    """One simulation.

    Attributes:
        link_bytes_per_s: of the network between workers; None: the profile's link.
    """

    stream: Stream
    ttft_s: float
    tpot_s: float
    link_bytes_per_s: float | None
    num_prefill: int
    num_decode: int
    policy: str
    seed: int
    speed: float


class Simulator:
    """All that a process needs to do runs. It is inherited by forking, not sent."""

    def __init__(self, workloads: Mapping[Stream, Workload], hardware: Hardware) -> None:
        self.workloads = workloads
        self.hardware = hardware

    def outcome(self, run: Run) -> Outcome:
        """Do it."""
        goals = Goals(run.ttft_s, run.tpot_s)
        chosen = contender(run.policy, goals, run.seed)
        hardware = self.hardware
        if run.link_bytes_per_s is not None:
            link = LinkRate(latency_s=1e-3, bytes_per_s=run.link_bytes_per_s)
            hardware = hardware.model_copy(update={"peer_link": link})
        setup = Setup(hardware, run.num_prefill, run.num_decode, speed=run.speed, seed=run.seed, gauges=chosen.gauges)
        return outcome_of(simulate(self.workloads[run.stream], chosen.policy, chosen.lengths, setup), goals)


class Runs:
    """Outcomes of runs: from the file, or done by one of several processes and added to it.

    Args:
        path: None: kept nowhere.
        made_by: what outcomes depend on beside the run. Raises StartupError if the file was made by something else.
    """

    def __init__(self, simulator: Simulator, num_processes: int, path: Path | None, made_by: Mapping[str, Any]) -> None:
        self._known: dict[Run, Outcome] = {}
        self._file: TextIO | None = None
        if path is not None:
            self._known, is_new = _read(path, made_by)
            self._file = path.open("a")
            if is_new:
                self._write(made_by)
        self._lock = threading.Lock()
        self._num_done = 0
        self._began_s = self._said_s = time.monotonic()
        self._waiting: dict[Run, Future[Outcome]] = {}
        gc.freeze()  # pages that forked processes do not write to stay one copy
        context = multiprocessing.get_context("fork")
        self._tasks: Any = context.SimpleQueue()
        self._done: Any = context.SimpleQueue()
        self._processes = [
            context.Process(target=_work, args=(simulator, self._tasks, self._done), daemon=True)
            for _ in range(num_processes)
        ]
        for process in self._processes:
            process.start()
        self._reader = threading.Thread(target=self._take_outcomes, daemon=True)
        self._reader.start()

    def outcome(self, run: Run) -> Outcome:
        """Of this run, whenever it is done; called by several threads. Raises RuntimeError if it failed."""
        with self._lock:
            known = self._known.get(run)
            if known is not None:
                return known
            waiting = self._waiting.get(run)
            if waiting is None:
                waiting = self._waiting[run] = Future()
                self._tasks.put(run)
        return waiting.result()

    def end(self) -> None:
        """Let the processes end; nobody waits for an outcome."""
        for _ in self._processes:
            self._tasks.put(None)
        for process in self._processes:
            process.join()
        self._done.put(None)
        self._reader.join()
        if self._file is not None:
            self._file.close()

    def _take_outcomes(self) -> None:
        while (done := self._done.get()) is not None:
            run, outcome, error = done
            with self._lock:
                waiting = self._waiting.pop(run)
                if error is None:
                    self._known[run] = outcome
                    self._write([run, asdict(outcome)])
                    self._say()
            if error is None:
                waiting.set_result(outcome)
            else:
                waiting.set_exception(RuntimeError(f"{run}: {error}"))

    def _write(self, line: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def _say(self) -> None:
        self._num_done += 1
        now_s = time.monotonic()
        if now_s - self._said_s >= SAY_EVERY_S:
            self._said_s = now_s
            sys.stderr.write(f"{self._num_done} runs after {now_s - self._began_s:.0f} s\n")


def _work(simulator: Simulator, tasks: Any, done: Any) -> None:
    while (run := tasks.get()) is not None:
        try:
            done.put((run, simulator.outcome(run), None))
        except Exception as error:  # noqa: BLE001 - told to whoever waits for it
            done.put((run, None, repr(error)))


def _read(path: Path, made_by: Mapping[str, Any]) -> tuple[dict[Run, Outcome], bool]:
    """What a file holds, and whether it holds nothing. A last line that was cut short is cut off."""
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    lines = [json.loads(line) for line in whole.splitlines()]
    if not lines:
        return {}, True
    if lines[0] != json.loads(json.dumps(made_by)):
        raise StartupError(f"--runs {path}: it was made by {lines[0]}, this is {made_by}")
    return {_run(run): _outcome(outcome) for run, outcome in lines[1:]}, False


def _run(members: list[Any]) -> Run:
    stream, *others = members
    return Run(Stream(*stream), *others)


def _outcome(members: dict[str, Any]) -> Outcome:
    for name in ("ttft_s", "tpot_s"):
        members[name] = tuple(members[name])
    return Outcome(**members)


class Threads:
    """Each does one thing after another, the most urgent first: most of their time they wait for runs."""

    def __init__(self, num: int) -> None:
        self._line: PriorityQueue[tuple[float, int, Future[Any], Callable[[], Any] | None]] = PriorityQueue()
        self._num_asked = 0
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(num)]
        for thread in self._threads:
            thread.start()

    def ask(self, urgency: float, do: Callable[[], Any] | None) -> "Future[Any]":
        """Have it done; what has the lowest `urgency` first. None ends a thread."""
        asked: Future[Any] = Future()
        self._num_asked += 1
        self._line.put((urgency, self._num_asked, asked, do))
        return asked

    def end(self) -> None:
        """When all is done that was asked for."""
        for _ in self._threads:
            self.ask(inf, None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            _, _, asked, do = self._line.get()
            if do is None:
                return
            try:
                asked.set_result(do())
            except Exception as error:  # noqa: BLE001 - raised where it is asked for
                asked.set_exception(error)


def results(asked: Iterable["Future[Any]"]) -> list[Any]:
    """Of all."""
    return [each.result() for each in asked]
