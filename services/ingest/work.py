"""What ingest has in hand: the record of a job, and the choices of it that wait for workers."""

from dataclasses import dataclass

from services.ingest.admission import Admitted
from shared.blocks import TokenIds
from shared.policy.placement import Chosen
from shared.request import Priority, RequestId
from shared.state.port import Placement
from shared.wire.to_ingest import LogPosition
from shared.wire.to_worker import FetchTicket


@dataclass(slots=True)
class InHand:
    """A record that is being dealt with.

    Attributes:
        num_bytes: of its value.
        num_open_choices: neither dispatched nor refused yet; at 0 the record is dealt with.
        request_id: once it is read.
        is_batch: it needs a hand of those for batch jobs.
    """

    topic: str
    position: LogPosition
    num_bytes: int = 0
    num_open_choices: int = 1
    request_id: RequestId | None = None
    is_batch: bool = False


@dataclass(frozen=True, slots=True)
class Waiting:
    """One admitted choice in the backlog.

    Attributes:
        accepted_ids: the answer so far; empty at epoch 1.
        admitted_s: unix seconds.
    """

    record: InHand
    admitted: Admitted
    choice: int
    epoch: int
    accepted_ids: TokenIds
    admitted_s: float

    @property
    def is_resumed(self) -> bool:
        """Whether it ran before and lost its workers."""
        return self.epoch > 1

    @property
    def is_batch(self) -> bool:
        return self.admitted.job.priority is Priority.BATCH

    @property
    def since_s(self) -> float:
        """When it began to wait for workers (unix seconds): a batch job long before its admission, if it was parked."""
        return self.admitted.job.accepted_s if self.is_batch and not self.is_resumed else self.admitted_s

    @property
    def ids(self) -> TokenIds:
        """The tokens whose successor is wanted."""
        return self.admitted.prompt_ids + self.accepted_ids

    @property
    def num_ids(self) -> int:
        """Without making them."""
        return len(self.admitted.prompt_ids) + len(self.accepted_ids)


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a choice runs.

    Attributes:
        chosen: the decision behind it; None if the placement stood already, made by an ingest that died or by a call
            whose answer was lost.
        fetch: what whoever computes the prompt is to get rather than compute.
    """

    placement: Placement
    chosen: Chosen | None
    fetch: FetchTicket | None = None
