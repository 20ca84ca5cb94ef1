"""How long answers are expected to be: learnt from what ended, on the topic `results`.

Each ingest learns from all answers, those of the last minutes before its start among them, so that a process that took
over predicts as the one before it did. Nothing depends on it: an answer that is missed is one less to learn from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import orjson

from services.ingest.work import Waiting
from shared.bus.port import Record
from shared.observe.metrics import IngestMetrics
from shared.policy.lengths import Expected, LengthKey, LengthPredictor, expect
from shared.request import MAX_INT32, FinishReason
from shared.wire.openai_answers import FINISH_REASONS
from shared.wire.to_ingest import TENANT_PATTERN

MAX_READ_BYTES = 256 * 1024
"""A longer result, of tens of thousands of tokens or with log probabilities, is not worth the time it takes to read."""

MAX_MODEL_CHARS = 256
"""Names are kept: a stranger's must not fill the memory."""

CHAT = "chat"
COMPLETION = "completion"
_ENDPOINTS = {"chat.completion": CHAT, "text_completion": COMPLETION}


@dataclass(frozen=True, slots=True)
class Ended:
    """The answers of one request.

    Attributes:
        num_tokens: of each answer; of several the mean.
        is_cut: they would have been longer without their limit.
    """

    key: LengthKey
    num_answers: int
    num_tokens: int
    is_cut: bool


class Lengths:
    """Predicts, and learns."""

    def __init__(self, metrics: IngestMetrics) -> None:
        self._metrics = metrics
        self._predictor = LengthPredictor()

    def expect(self, waiting: Waiting) -> Expected:
        """What is still to come of a choice."""
        admitted, sampling = waiting.admitted, waiting.admitted.sampling
        endpoint = CHAT if admitted.spec.chat else COMPLETION
        key = LengthKey(admitted.job.tenant, admitted.spec.model, endpoint, len(admitted.prompt_ids))
        at_least = sampling.max_tokens if sampling.ignore_eos and not admitted.spec.stop else sampling.min_tokens
        prediction = self._predictor.predict(key, sampling.max_tokens)
        return expect(prediction, num_made=len(waiting.accepted_ids), at_least=at_least)

    def usual_tokens(self) -> float:
        """Of an answer, on average, whoever's."""
        return self._predictor.usual_tokens()

    def learn(self, result: Record) -> None:
        """From a record of `results`."""
        ended = read_ended(result.value)
        if ended is None:
            self._metrics.results_passed_over.inc()
            return
        self._compare(ended)
        for _ in range(ended.num_answers):
            self._predictor.observe(ended.key, ended.num_tokens, is_cut=ended.is_cut)
        self._metrics.answers_learnt.inc(ended.num_answers)

    def _compare(self, ended: Ended) -> None:
        """With what would have been predicted. One that was cut is covered by whoever expected it to come so far."""
        prediction = self._predictor.predict(ended.key, ended.num_tokens if ended.is_cut else MAX_INT32)
        for quantile, answers_within in self._metrics.answers_within.items():
            if ended.num_tokens <= prediction.quantile(quantile):
                answers_within.inc(ended.num_answers)


def read_ended(result: bytes) -> Ended | None:
    """What a record of `results` tells of lengths; None: nothing, or nobody of ours wrote it."""
    if len(result) > MAX_READ_BYTES:
        return None
    try:
        body: Any = orjson.loads(result)
        return _ended(body) if isinstance(body, dict) else None
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None


def _ended(body: Mapping[str, Any]) -> Ended | None:
    response: Any = body.get("response")
    if response is None:
        return None  # it failed, or was cancelled: how long it would have been is not known
    usage, choices = response["usage"], cast("list[dict[str, Any]]", response["choices"])
    tenant, model = body.get("tenant", ""), response["model"]
    num_prompt_tokens, num_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    if not (isinstance(tenant, str) and TENANT_PATTERN.fullmatch(tenant) and choices):
        return None
    if not (isinstance(model, str) and len(model) <= MAX_MODEL_CHARS):
        return None
    if not all(isinstance(num, int) and 0 <= num <= MAX_INT32 for num in (num_prompt_tokens, num_tokens)):
        return None
    is_cut = all(choice["finish_reason"] == FINISH_REASONS[FinishReason.LENGTH] for choice in choices)
    key = LengthKey(tenant, model, _ENDPOINTS[response["object"]], num_prompt_tokens)
    return Ended(key, len(choices), round(num_tokens / len(choices)), is_cut)
