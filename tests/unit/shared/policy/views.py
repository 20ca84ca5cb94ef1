"""Workers and requests to decide about."""

import dataclasses
from math import ceil

from shared.blocks import BlockHash
from shared.policy.costs import UNMEASURED
from shared.policy.views import RequestView, WorkerView
from shared.request import Incarnation, RequestId, WorkerRef

BLOCKS = tuple(BlockHash(bytes([n]) * 16) for n in range(64))


def a_worker(slot, **changes) -> WorkerView:
    """Idle, of the speeds of an 8B model on an H200, unless changed."""
    view = WorkerView(
        ref=WorkerRef(slot, Incarnation(f"w{slot}")),
        model="m",
        num_pages=1000,
        num_credit_pages=0,
        num_credits=0,
        max_running=64,
        max_context=64_000,
        layout_fingerprint="l",
        max_batch_tokens=2048,
        page_bytes=8 << 20,
        profile=UNMEASURED,
        links={},
        queued_prefill_s=0.0,
        num_context_tokens=0,
        takes_work=True,
    )
    return dataclasses.replace(view, **changes)


def a_request(num_tokens=512, max_new_tokens=64) -> RequestView:
    """One that is expected to use all of its new tokens, up to 256."""
    likely = min(max_new_tokens, 256)
    blocks = BLOCKS[: num_tokens // 64] * ceil(num_tokens / 64 / len(BLOCKS))
    return RequestView(RequestId("r"), 0, "m", num_tokens, max_new_tokens, float(likely), float(likely), likely, blocks)
