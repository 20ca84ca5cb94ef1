"""From a scheduled row to the request that goes out."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import orjson

from loadgen.prompts import PromptMaker
from loadgen.schedule import ScheduledRow
from shared.request import RequestId

COMPLETIONS = "/v1/completions"
CHAT_COMPLETIONS = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class RequestShape:
    """What all requests of a run have in common; part of the schedule's hash.

    Attributes:
        endpoint: path of the OpenAI endpoint whose body is sent, also as a Kafka job.
        ignore_eos: answers have the trace's length exactly (`min_tokens` is sent too).
        stream: ask for server-sent events with usage.
    """

    endpoint: Literal["/v1/completions", "/v1/chat/completions"]
    model: str
    ignore_eos: bool
    temperature: float
    stream: bool


@dataclass(frozen=True, slots=True)
class Job:
    """One request, ready to be sent.

    Attributes:
        body: the OpenAI body as JSON.
        prompt_tokens: length of its prompt by the local count.
        timeout_s: how long its answer is waited for.
    """

    row: ScheduledRow
    request_id: RequestId
    body: bytes
    prompt_tokens: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class JobMaker:
    """Makes the job of a row. `run_id` tells the requests of two runs of one schedule apart."""

    shape: RequestShape
    prompts: PromptMaker
    run_id: str
    timeout_s: float

    def schedule_head(self) -> Mapping[str, object]:
        """All that the bytes of a request depend on beside its row and the seed."""
        return {**asdict(self.shape), "prompts": self.prompts.fingerprint}

    def make(self, row: ScheduledRow) -> Job:
        """The job of `row`."""
        prompt = self.prompts.make(row)
        return Job(
            row=row,
            request_id=RequestId(f"replay-{self.run_id}-{row.row}"),
            body=orjson.dumps(self._body(row, prompt.content)),
            prompt_tokens=prompt.num_tokens,
            timeout_s=self.timeout_s,
        )

    def _body(self, row: ScheduledRow, content: list[int] | str) -> dict[str, Any]:
        shape = self.shape
        body: dict[str, Any] = {"model": shape.model}
        if shape.endpoint == CHAT_COMPLETIONS:
            body["messages"] = [{"role": "user", "content": content}]
        else:
            body["prompt"] = content
        body["max_tokens"] = row.output_tokens
        body["temperature"] = shape.temperature
        if shape.ignore_eos:
            body |= {"ignore_eos": True, "min_tokens": row.output_tokens}
        if shape.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body
