"""Small trace rows, schedules, jobs and records for the load generator's tests."""

import asyncio

from loadgen.client import Clock
from loadgen.jobs import Job
from loadgen.measure import COMPLETED, Record
from loadgen.schedule import PromptBlock, ScheduledRow
from shared.request import RequestId


def loop_clock() -> Clock:
    loop = asyncio.get_running_loop()
    return Clock(loop.time, lambda: 1_700_000_000 + loop.time())


def scheduled(row: int, at_s: float = 0.0, input_tokens: int = 4, output_tokens: int = 3, blocks=()) -> ScheduledRow:
    return ScheduledRow(
        row, row, round(at_s * 1e6), input_tokens, output_tokens, tuple(PromptBlock(*block) for block in blocks)
    )


def job_of(row: ScheduledRow, timeout_s: float = 60.0) -> Job:
    return Job(row, RequestId(f"replay-test-{row.row}"), b"{}", row.input_tokens, timeout_s)


def record(row: int = 0, at_s: float = 0.0, bucket: str = COMPLETED, **fields) -> Record:
    known = {
        "detail": "",
        "prompt_tokens": 4,
        "sent_s": at_s,
        "first_token_s": None,
        "last_token_s": None,
        "answered_s": None,
        "gaps_s": (),
        "served_prompt_tokens": 4,
        "output_tokens": 3,
        "cached_tokens": None,
        "finish_reason": "length",
        "stamps": {},
    }
    known["ended_s"] = fields.get("answered_s")
    return Record(row=scheduled(row, at_s), bucket=bucket, **(known | fields))
