"""The nouns of a request: ids, sampling parameters, finish reasons, the events of its life."""

import re
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Annotated, NewType
from zlib import crc32

from pydantic import Field

RequestId = NewType("RequestId", str)
"""Names one request for ever; chosen by whoever submits it."""

PlacementId = NewType("PlacementId", str)
"""Names one attempt to run one choice of a request on chosen workers."""

Incarnation = NewType("Incarnation", str)
"""Random name of one process start; a restarted process has another."""

REQUEST_ID_PATTERN = re.compile(r"[A-Za-z0-9_.\-]{1,128}")

NUM_REQUEST_PARTITIONS = 16
"""Partitions of `ingest`, `ingest-resume`, `stream-out` and `results`."""


NUM_SLOTS = 64
"""Worker slots; slot n reads partition n of `prefill` and of `decode`."""

MAX_CHOICES = 8
"""Choices that one request may ask for."""

MAX_INT32 = 2**31 - 1

# Bounds of what is read from the log: nobody computes with a number out of them.
Slot = Annotated[int, Field(ge=0, lt=NUM_SLOTS)]
ChoiceIndex = Annotated[int, Field(ge=0, lt=MAX_CHOICES)]
Epoch = Annotated[int, Field(ge=0, le=MAX_INT32)]
Count = Annotated[int, Field(ge=0, le=MAX_INT32)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
StopString = Annotated[str, Field(min_length=1)]
UnixSeconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]


def partition_of(request_id: RequestId) -> int:
    """The `stream-out` and `results` partition in which the request lives."""
    return crc32(request_id.encode()) % NUM_REQUEST_PARTITIONS


def keyed_request_id(tenant: str, idempotency_key: str) -> RequestId:
    """The id of every request that `tenant` sends under `idempotency_key`."""
    digest = sha256(f"{len(tenant)}:{tenant}{idempotency_key}".encode()).hexdigest()
    return RequestId(f"key-{digest[:32]}")


class FinishReason(StrEnum):
    """How a choice ended. The first two are a worker's word, the others also end it by a `cut`."""

    STOP = "stop"
    LENGTH = "length"
    FAILED = "failed"
    REJECTED = "rejected"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Priority(StrEnum):
    """Who goes first of those that wait for workers. Batch fills what the others leave idle."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"


class Event(StrEnum):
    """The life of a request; each is a time stamp in unix seconds, by the clock of the host named.

        accepted ─> admitted ─> placed ─> prefilling ─> first_token ─> transferring ─> decoding ─> finished ─> delivered
        (broker)    (ingest)   (ingest)   (prefill)      (prefill)      (decode)       (decode)    (worker)    (edge)

    A first token that ends the request goes from `first_token` straight to `finished`. Where a decode worker computes
    the prompt itself, `prefilling` and `first_token` are by its host, and it is `decoding` with the first token.
    """

    ACCEPTED = "accepted"
    ADMITTED = "admitted"
    PLACED = "placed"
    PREFILLING = "prefilling"
    FIRST_TOKEN = "first_token"
    TRANSFERRING = "transferring"
    DECODING = "decoding"
    FINISHED = "finished"
    DELIVERED = "delivered"


Stamps = dict[Event, UnixSeconds]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the engine picks tokens. Complete after admission: `seed` is always set.

    Token `i` of choice `c` draws from a generator keyed by (seed, c, i), so a sampled answer does not depend on
    the batch, the worker or how often it was moved.

    Attributes:
        max_tokens: tokens to make at most, 1 or more.
        min_tokens: neither EOS nor a stop id may end the choice before this many tokens.
        temperature: 0 is greedy; the filters below then do nothing.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches p.
        min_p: keep tokens at least this fraction as likely as the likeliest.
        repetition_penalty: above 1 divides (multiplies, if negative) the logits of tokens seen in prompt or answer.
        presence_penalty, frequency_penalty: subtracted from logits of tokens in the answer, once and per occurrence.
        stop_token_ids: end the choice as EOS does.
        ignore_eos: EOS is an ordinary token.
        logprobs: number of alternatives to report per token beside the chosen one; None reports nothing.
    """

    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT32)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    min_tokens: Count = 0
    temperature: Finite = 1.0
    top_k: Count = 0
    top_p: Finite = 1.0
    min_p: Finite = 0.0
    repetition_penalty: Finite = 1.0
    presence_penalty: Finite = 0.0
    frequency_penalty: Finite = 0.0
    stop_token_ids: tuple[TokenId, ...] = ()
    ignore_eos: bool = False
    logprobs: Count | None = None

    @property
    def has_penalty(self) -> bool:
        """Whether what was seen before changes a token's logit."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def ends(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        """The ids that end the choice, with the EOS ids of its model."""
        eos = frozenset[int]() if self.ignore_eos else eos_token_ids
        return eos.union(self.stop_token_ids) if self.stop_token_ids else eos


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability (natural, of the unfiltered distribution after penalties) of one token and its rivals.

    Attributes:
        logprob: of the chosen token.
        top: (token id, logprob) of the likeliest tokens, best first.
    """

    logprob: Finite
    top: tuple[tuple[TokenId, Finite], ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerRef:
    """One process start of a worker: the slot it reads and the name of this start."""

    slot: Slot
    incarnation: Incarnation
