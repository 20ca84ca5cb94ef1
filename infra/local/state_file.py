"""What runs, on disk: read by `status`, and by `down` when the supervisor itself is gone."""

import json
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from infra.local.process import StartTicks, kill_group, start_ticks


class StackPhase(StrEnum):
    """The life of a stack: starting ─> ready ─> stopping, or starting ─> stopping when a part fails."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"


class ProcessPhase(StrEnum):
    """The life of a supervised process.

    starting ─> ready ─> (died) ─> restarting ─> ready
                             └───> dead, once it has used up its restarts
    """

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """One supervised process as the file tells it."""

    name: str
    address: str
    log: str
    phase: ProcessPhase
    pid: int
    start_ticks: StartTicks | None
    restarts: int = 0

    def lives(self) -> bool:
        """Whether this very process still runs, not another one that was given its pid."""
        return is_alive(self.pid, self.start_ticks)


@dataclass(frozen=True, slots=True)
class StackRecord:
    """The stack as the file tells it.

    Attributes:
        pid, start_ticks: of the supervisor.
    """

    pid: int
    start_ticks: StartTicks | None
    phase: StackPhase
    composition: dict[str, Any]
    processes: tuple[ProcessRecord, ...] = ()

    def lives(self) -> bool:
        """Whether the supervisor still runs."""
        return is_alive(self.pid, self.start_ticks)

    def address_of(self, name: str) -> str | None:
        """Where the process `name` answers."""
        return next((process.address for process in self.processes if process.name == name), None)


def is_alive(pid: int, ticks: StartTicks | None) -> bool:
    """Whether the process `pid` that started at `ticks` still runs."""
    return ticks is not None and start_ticks(pid) == ticks


class StateFile:
    """The record of the stack of one run folder."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "state.json"

    def read(self) -> StackRecord | None:
        """The record, None where no stack runs and none was left behind."""
        try:
            content = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return None
        processes = tuple(
            replace(record, phase=ProcessPhase(record.phase))
            for record in (ProcessRecord(**process) for process in content.pop("processes"))
        )
        record = StackRecord(**content, processes=processes)
        return replace(record, phase=StackPhase(record.phase))

    def write(self, record: StackRecord) -> None:
        """Replaces the record; a reader sees the old one or the new one."""
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(asdict(record), indent=1))
        new.rename(self.path)

    def remove(self) -> None:
        """Says that nothing runs."""
        self.path.unlink(missing_ok=True)


def kill_left_behind(record: StackRecord) -> list[str]:
    """SIGKILL to every process of the record that still runs; their names."""
    left = [process for process in record.processes if process.lives()]
    for process in left:
        kill_group(process.pid)
    return [process.name for process in left]
