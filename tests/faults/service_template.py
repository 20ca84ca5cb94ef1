"""The process that services are forked from: it has imported everything, so that one more costs no start of Python.

`python -m tests.faults.service_template`; each line of its input is `{"service": ..., "env": {...}, "log": path}`, each
line of its output the id of the process that was forked for it. The service is "prefill", "decode" (with the fake
engine of `salted_worker`), "ingest" or "edge"; its output is appended to the log. All die with the template.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

import torch

from services.ingest.__main__ import main as run_ingest
from services.stream_out.__main__ import main as run_edge
from tests.faults import salted_worker

SERVICES = {
    "prefill": lambda: salted_worker.work("prefill"),
    "decode": lambda: salted_worker.work("decode"),
    "ingest": run_ingest,
    "edge": run_edge,
}

PR_SET_PDEATHSIG = 1


class ServiceTemplate:
    """The template as who starts services sees it; a context manager that kills all of them at its end."""

    def __enter__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.service_template"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "UCX_WARN_UNUSED_ENV_VARS": "n"},
            cwd=Path(__file__).parents[2],
            text=True,
        )
        assert self._process.stdout.readline() == "ready\n", "the template did not start"
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, service: str, env: Mapping[str, str], log: Path) -> int:
        """Forks a service with these settings; its process id. (Some milliseconds, without an await.)"""
        line = json.dumps({"service": service, "env": dict(env), "log": str(log)})
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def live_as(service: str, env: Mapping[str, str], log: str) -> None:
    """The forked process's life; never returns."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(env)
        # torch makes its thread pool anew after a fork, and not safely if two threads ask for it at the same time.
        torch.set_num_threads(1)
        SERVICES[service]()
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:  # noqa: BLE001 - it is written down, and the process ends
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the dead
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while line := sys.stdin.readline():
        wanted = json.loads(line)
        pid = os.fork()
        if pid == 0:
            live_as(**wanted)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
