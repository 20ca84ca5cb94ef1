"""Wire a decode worker and run it: `python -m services.decode`."""

import asyncio

from services.decode.role import DecodeRole
from services.decode.settings import DecodeSettings
from shared.runtime.run import run
from shared.state.port import Role
from shared.worker.process import serve_worker


async def serve(settings: DecodeSettings, stop: asyncio.Event) -> None:
    """Run the worker until `stop` is set."""
    await serve_worker(
        Role.DECODE,
        lambda context: DecodeRole(context, pull_timeout_s=settings.pull_timeout_s),
        settings,
        stop,
    )


def main() -> None:
    run("decode", DecodeSettings.read, serve)


if __name__ == "__main__":
    main()
