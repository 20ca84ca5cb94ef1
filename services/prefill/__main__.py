"""Wire a prefill worker and run it: `python -m services.prefill`."""

import asyncio

from services.prefill.role import PrefillRole
from shared.runtime.run import run
from shared.state.port import Role
from shared.worker.process import serve_worker
from shared.worker.settings import WorkerSettings


async def serve(settings: WorkerSettings, stop: asyncio.Event) -> None:
    """Run the worker until `stop` is set."""
    await serve_worker(
        Role.PREFILL,
        lambda context: PrefillRole(context, hold_s=settings.hold_s),
        settings,
        stop,
    )


def main() -> None:
    run("prefill", WorkerSettings.read, serve)


if __name__ == "__main__":
    main()
