"""All that a placement decision may look at, frozen."""

from dataclasses import dataclass

from shared.blocks import BlockHash
from shared.request import RequestId, WorkerRef


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One live worker as a decision sees it.

    Attributes:
        num_pages: of its cache.
        num_credit_pages: taken by placements made and not given back, by whichever ingest.
        num_credits: how many placements that are.
        max_running: requests it runs at once.
        max_context: positions of its model.
        layout_fingerprint: KV moves only between equal ones.
    """

    ref: WorkerRef
    model: str
    num_pages: int
    num_credit_pages: int
    num_credits: int
    max_running: int
    max_context: int
    layout_fingerprint: str
    takes_work: bool = True


@dataclass(frozen=True, slots=True)
class ClusterView:
    """The live workers by role."""

    prefill: tuple[WorkerView, ...]
    decode: tuple[WorkerView, ...]


@dataclass(frozen=True, slots=True)
class RequestView:
    """One choice to place.

    Attributes:
        num_tokens: prompt and accepted tokens, whose KV prefill computes or finds.
        max_new_tokens: tokens it may still make.
        blocks: hashes of the full blocks of those tokens.
    """

    request_id: RequestId
    choice: int
    model: str
    num_tokens: int
    max_new_tokens: int
    blocks: tuple[BlockHash, ...]
