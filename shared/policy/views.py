"""All that a placement decision may look at, frozen."""

from collections.abc import Mapping
from dataclasses import dataclass

from shared.blocks import BlockHash
from shared.policy.profile import LinkRate, SpeedProfile
from shared.request import Incarnation, RequestId, WorkerRef


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
        max_batch_tokens: prompt tokens that it computes in one step at most.
        page_bytes: of one page of its KV.
        profile: its speeds; None: it has measured none yet.
        links: how fast it pulls from whom; who is missing has not been measured.
        queued_prefill_s: prompts placed on it and not computed yet, as predicted when they were placed.
        num_context_tokens: positions that its decode rows may read, by their credits.
        takes_work: False: it is leaving, or the log is out of its reach.
    """

    ref: WorkerRef
    model: str
    num_pages: int
    num_credit_pages: int
    num_credits: int
    max_running: int
    max_context: int
    layout_fingerprint: str
    max_batch_tokens: int
    page_bytes: int
    profile: SpeedProfile | None
    links: Mapping[Incarnation, LinkRate]
    queued_prefill_s: float
    num_context_tokens: int
    takes_work: bool


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
        expected_new_tokens: how many it will make, in the mean; at most `max_new_tokens`.
        usual_new_tokens: how many others make, in the mean, whoever they are.
        reserve_new_tokens: for how many room is kept: more of them are unlikely; at most `max_new_tokens`.
        blocks: hashes of the full blocks of those tokens.
    """

    request_id: RequestId
    choice: int
    model: str
    num_tokens: int
    max_new_tokens: int
    expected_new_tokens: float
    usual_new_tokens: float
    reserve_new_tokens: int
    blocks: tuple[BlockHash, ...]
