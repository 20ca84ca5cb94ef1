"""The process that a cluster's services are forked from: it has imported them, so a restart costs milliseconds.

`python -m tests.faults.cluster.template SERVICE...`; each line of its input is a `Spec` as JSON, each line of its
output says `{"pid": ..., "name": ...}` when one was forked and `{"pid": ..., "status": ...}` when one has ended. All
die with it.
"""

import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1

MODULES = {
    "edge": "services.stream_out.__main__",
    "ingest": "services.ingest.__main__",
    "prefill": "tests.faults.cluster.worker",
    "decode": "tests.faults.cluster.worker",
}


@dataclass(frozen=True, slots=True)
class Spec:
    """A process to be."""

    name: str
    service: str
    env: dict[str, str]
    log: str


def become(spec, libc):
    """The child's life; it does not return."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(spec.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.closerange(3, 256)
    os.environ.update(spec.env)
    status = 1
    try:
        importlib.import_module(MODULES[spec.service]).main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - it is written down, and the process ends
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def say(**words):
    os.write(1, json.dumps(words).encode() + b"\n")


def reap():
    """Tell of all that ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        say(pid=pid, status=os.waitstatus_to_exitcode(status))


def main():
    for service in sys.argv[1:]:
        importlib.import_module(MODULES[service])
    libc = ctypes.CDLL(None)
    num_threads = len(list(Path("/proc/self/task").iterdir()))
    assert num_threads == 1, f"{num_threads} threads: a fork would have one of them"
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    gc.collect()
    gc.freeze()
    say(ready=True)
    looking = selectors.DefaultSelector()
    looking.register(0, selectors.EVENT_READ)
    looking.register(woken, selectors.EVENT_READ)
    rest = b""
    while True:
        for key, _ in looking.select():
            read = os.read(key.fd, 2**16)
            if key.fd == woken:
                reap()
                continue
            if not read:
                return
            *lines, rest = (rest + read).split(b"\n")
            for line in lines:
                spec = Spec(**json.loads(line))
                pid = os.fork()
                if pid == 0:
                    looking.close()
                    become(spec, libc)
                say(pid=pid, name=spec.name)


if __name__ == "__main__":
    main()
