"""A small OpenAI streaming server that answers with a known delay before the first token and between tokens."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

TTFT_S = 0.03
GAP_S = 0.005
HANDOFF_S = 0.02


class FakeServer:
    """Answers every completion as `misdeed` says; keeps the bodies it got.

    Misdeeds: {number of the request: "refuse" | "break" | "short" | "double" | "error" | "hang"}.
    """

    def __init__(self, misdeeds: dict[int, str] | None = None) -> None:
        self.misdeeds = misdeeds or {}
        self.bodies: list[dict] = []
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
            ]
        )

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "fake-model", "object": "model"}]})

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        misdeed = self.misdeeds.get(len(self.bodies))
        self.bodies.append(body)
        if misdeed == "refuse":
            return JSONResponse({"error": {"message": "busy", "type": "server_error"}}, status_code=429)
        return StreamingResponse(self._stream(body, misdeed), media_type="text/event-stream")

    async def _stream(self, body: dict, misdeed: str | None):
        accepted = time.time()
        num_tokens = body["max_tokens"] - (misdeed == "short")
        await asyncio.sleep(3600 if misdeed == "hang" else TTFT_S)
        first_token = time.time()
        if misdeed == "error":
            yield _event({"error": {"message": "worker lost", "type": "server_error", "code": "worker_lost"}})
            return
        for index in range(num_tokens):
            if index > 0:
                await asyncio.sleep(HANDOFF_S if index == 1 else GAP_S)
            reason = "length" if index == num_tokens - 1 else None
            yield _event({"choices": [_choice(body, f" t{index}", reason)]})
            if misdeed == "break":
                return
        if misdeed == "double":
            yield _event({"choices": [_choice(body, " again", "length")]})
        timings = {"accepted": accepted, "first_token": first_token, "finished": time.time()}
        usage = {"prompt_tokens": _prompt_tokens(body), "completion_tokens": num_tokens}
        usage["prompt_tokens_details"] = {"cached_tokens": 1}
        yield _event({"choices": [], "usage": usage, "baton": {"timings": timings}})
        yield "data: [DONE]\n\n"


def _choice(body: dict, text: str, reason: str | None) -> dict:
    piece = {"delta": {"content": text}} if "messages" in body else {"text": text}
    return {"index": 0, "finish_reason": reason, **piece}


def _prompt_tokens(body: dict) -> int:
    if "messages" in body:
        return len(body["messages"][0]["content"].split()) + 3
    return len(body["prompt"]) if isinstance(body["prompt"], list) else len(body["prompt"].split())


def _event(chunk: dict) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


@contextmanager
def serving(fake: FakeServer) -> Iterator[str]:
    """Serves `fake` in a thread of this process; the value is its base URL."""
    server = uvicorn.Server(uvicorn.Config(fake.app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
