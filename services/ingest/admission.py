"""Admission: a job's body becomes token ids and complete parameters, or a refusal that names field and limit."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Self

from services.ingest.cache_salt import NAMES_ALONE, CacheSalt
from services.ingest.jobs import Job
from shared.blocks import TokenIds
from shared.errors import ContextTooLong, InvalidRequest, ModelNotFound, UnsupportedCheckpoint
from shared.request import RequestId, SamplingParams
from shared.text.tokeniser import Tokeniser
from shared.wire.openai import GenerationSpec, parse_body
from shared.wire.topics import MAX_RECORD_BYTES

BYTES_PER_TOKEN = 8
"""Of a result, for each token of text; of a work record, for each prompt token as base64."""

BYTES_PER_LOGPROB = 160
"""Of a result, for each token that is reported with its log probability."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model's folder says that admission needs."""

    name: str
    max_context: int
    vocab_size: int

    @classmethod
    def load(cls, folder: Path, name: str) -> Self:
        """Raises UnsupportedCheckpoint, naming the field that is missing."""
        config = json.loads((folder / "config.json").read_text())
        return cls(name, _positive(config, "max_position_embeddings"), _positive(config, "vocab_size"))


@dataclass(frozen=True, slots=True)
class Admitted:
    """A job that may run.

    Attributes:
        prompt_ids: what the model is to continue.
        unknown_fields: fields of the body that mean nothing here.
        cache_salt: its KV is shared only with requests of this salt.
    """

    job: Job
    spec: GenerationSpec
    prompt_ids: TokenIds
    sampling: SamplingParams
    unknown_fields: tuple[str, ...]
    cache_salt: str


def default_seed(request_id: RequestId) -> int:
    """The seed of a request that names none."""
    return int.from_bytes(sha256(f"seed {request_id}".encode()).digest()[:8], "big") >> 1


class Admission:
    """Checks jobs against one model. Thread-safe."""

    def __init__(self, tokeniser: Tokeniser, facts: ModelFacts, cache_salt: CacheSalt = NAMES_ALONE) -> None:
        self._tokeniser = tokeniser
        self._facts = facts
        self._cache_salt = cache_salt

    @property
    def model_name(self) -> str:
        return self._facts.name

    def admit(self, job: Job, capacity_tokens: int | None) -> Admitted:
        """Raises RequestError.

        Args:
            capacity_tokens: prompt and answer together that the roomiest workers could take, if any are there.
        """
        parsed = parse_body(job.body, chat=None)
        spec = parsed.spec
        if spec.model != self._facts.name:
            raise ModelNotFound(f"model {spec.model!r} is not served here; {self._facts.name!r} is", param="model")
        prompt_ids = self._prompt_ids(job, spec)
        self._check_ids(spec.stop_token_ids, "stop_token_ids")
        limit = min(self._facts.max_context, capacity_tokens or self._facts.max_context)
        room = self._room_for_answer(spec, len(prompt_ids), limit)
        sampling = spec.sampling(room=room, default_seed=default_seed(job.request_id))
        _refuse_too_large_records(spec, len(prompt_ids), sampling)
        cache_salt = self._cache_salt.of(job.tenant)
        return Admitted(job, spec, prompt_ids, sampling, parsed.unknown_fields, cache_salt)

    def _prompt_ids(self, job: Job, spec: GenerationSpec) -> TokenIds:
        match spec.prompt:
            case str():
                ids = self._tokeniser.encode(spec.prompt)
            case tuple():
                # The job's own time, not the clock's: placed again, it must give the same ids.
                ids = self._tokeniser.encode_chat(spec.prompt, now=datetime.fromtimestamp(job.accepted_s, UTC))
            case _:
                ids = spec.prompt
        if not ids:
            raise InvalidRequest("the prompt must have at least 1 token", param=_prompt_field(spec))
        self._check_ids(ids, _prompt_field(spec))
        return ids

    def _check_ids(self, ids: Iterable[int], field: str) -> None:
        largest = max(ids, default=0)
        if largest >= self._facts.vocab_size:
            raise InvalidRequest(
                f"token id {largest} is not below the model's vocabulary size, {self._facts.vocab_size}", param=field
            )

    def _room_for_answer(self, spec: GenerationSpec, num_prompt_tokens: int, limit: int) -> int:
        if num_prompt_tokens >= limit:
            raise ContextTooLong(
                f"the prompt has {num_prompt_tokens} tokens; prompt and answer together may have {limit}",
                param=_prompt_field(spec),
            )
        room = limit - num_prompt_tokens
        if spec.max_tokens is not None and spec.max_tokens > room:
            raise ContextTooLong(
                f"the prompt has {num_prompt_tokens} tokens and max_tokens is {spec.max_tokens}; "
                f"prompt and answer together may have {limit}",
                param="max_tokens",
            )
        if spec.min_tokens > room:
            raise InvalidRequest(f"min_tokens must be at most {room}, what the context leaves", param="min_tokens")
        return room


def _prompt_field(spec: GenerationSpec) -> str:
    return "messages" if spec.chat else "prompt"


def _refuse_too_large_records(spec: GenerationSpec, num_prompt_tokens: int, sampling: SamplingParams) -> None:
    """Every record of the request must fit the topics: bounded here, so that none fails later."""
    if num_prompt_tokens * BYTES_PER_TOKEN > MAX_RECORD_BYTES:
        raise ContextTooLong(
            f"the prompt has {num_prompt_tokens} tokens, the limit is {MAX_RECORD_BYTES // BYTES_PER_TOKEN}",
            param=_prompt_field(spec),
        )
    per_token = BYTES_PER_TOKEN
    if sampling.logprobs is not None:
        per_token += BYTES_PER_LOGPROB * (1 + sampling.logprobs)
    limit = MAX_RECORD_BYTES // (per_token * spec.n)
    if sampling.max_tokens > limit:
        raise InvalidRequest(
            f"with n {spec.n} and logprobs {sampling.logprobs} max_tokens must be at most {limit}", param="max_tokens"
        )


def _positive(config: dict[str, object], field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or value <= 0:
        raise UnsupportedCheckpoint(field, f"must be a positive integer, is {value!r}")
    return value
