"""One request on its way through the simulated system."""

from loadgen.simulator.pages import Pinned
from loadgen.simulator.workload import SimRow
from shared.policy.placement import Chosen


class Job:
    """What is known of a request; times are virtual seconds.

    Attributes:
        arrived_s: when it was sent; what its latencies count from.
        placed_s: when it got its workers; None while it waits.
        first_token_s, last_token_s: when the client had them.
        num_made: tokens of the answer that are there.
        num_cached: prompt tokens that the worker that computed it had.
        num_fetched: of those, tokens that it fetched from a peer, or read from host memory.
        is_over: the client has all of its answer, or a refusal.
        refusal: why it was never placed; None if it was.
        is_local: its decode worker computed its prompt.
        prefill_ended_s: when the first token was made.
        kv: its pages at the prefill worker.
    """

    __slots__ = (
        "arrived_s",
        "chosen",
        "first_token_s",
        "is_local",
        "is_over",
        "kv",
        "last_token_s",
        "num_cached",
        "num_computed_pages",
        "num_fetched",
        "num_made",
        "num_preemptions",
        "placed_s",
        "prefill_ended_s",
        "refusal",
        "row",
    )

    def __init__(self, row: SimRow, arrived_s: float) -> None:
        self.row = row
        self.arrived_s = arrived_s
        self.placed_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.prefill_ended_s: float | None = None
        self.refusal: str | None = None
        self.chosen: Chosen | None = None
        self.kv: Pinned | None = None
        self.num_computed_pages = 0
        self.num_made = 0
        self.num_cached = 0
        self.num_fetched = 0
        self.num_preemptions = 0
        self.is_local = False
        self.is_over = False

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token behind the first; None for an answer of one token, or none."""
        if self.first_token_s is None or self.last_token_s is None or self.row.num_output < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.row.num_output - 1)
