import os
import subprocess
import sys

from infra.local.process import start_ticks
from infra.local.state_file import ProcessPhase, ProcessRecord, StackPhase, StackRecord, StateFile, kill_left_behind


def a_record(*processes: ProcessRecord) -> StackRecord:
    return StackRecord(os.getpid(), start_ticks(os.getpid()), StackPhase.READY, {"counts": {"edge": 1}}, processes)


def a_process(pid: int, ticks) -> ProcessRecord:
    return ProcessRecord("edge-0", "http://127.0.0.1:1", "log", ProcessPhase.READY, pid, ticks)


def test_what_is_written_is_read(tmp_path):
    file = StateFile(tmp_path)
    assert file.read() is None
    record = a_record(a_process(7, None))
    file.write(record)
    read = file.read()
    assert read == record
    assert read.lives()
    assert read.processes[0].phase is ProcessPhase.READY
    file.remove()
    assert file.read() is None


def test_only_the_recorded_process_is_killed():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as process:
        ticks = start_ticks(process.pid)
        assert kill_left_behind(a_record(a_process(process.pid, ticks - 1))) == []
        assert process.poll() is None
        assert kill_left_behind(a_record(a_process(process.pid, ticks))) == ["edge-0"]
        assert process.wait() == -9
    assert kill_left_behind(a_record(a_process(process.pid, ticks))) == []
