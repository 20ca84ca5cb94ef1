"""One request inside the engine: its tokens, its pages and where it stands."""

from enum import Enum, auto

from shared.blocks import PAGE_TOKENS, BlockKey, extend_chain, key_chain
from shared.engine.port import EngineRequest

NO_SEAT = -1


class SequenceState(Enum):
    """Where a sequence stands; see the drawing in `shared.engine.port`."""

    WAITING = auto()
    """In the line, without pages: new, or preempted."""
    PREFILLING = auto()
    """Has pages for all its ids; chunks of them are still to be launched."""
    RUNNING = auto()
    """All its ids have been launched; computes its newest token in every batch."""
    HELD = auto()
    """Done but for its pages, which a peer pulls; its token, its end or its failure was handed out."""
    IMPORTING = auto()
    """Its pages are being written by a transfer."""
    ENDED = auto()
    """Forgotten."""


TRANSITIONS: dict[SequenceState, frozenset[SequenceState]] = {
    SequenceState.WAITING: frozenset({SequenceState.PREFILLING, SequenceState.ENDED}),
    SequenceState.PREFILLING: frozenset({SequenceState.RUNNING, SequenceState.WAITING, SequenceState.ENDED}),
    SequenceState.RUNNING: frozenset({SequenceState.HELD, SequenceState.WAITING, SequenceState.ENDED}),
    SequenceState.HELD: frozenset({SequenceState.ENDED}),
    SequenceState.IMPORTING: frozenset({SequenceState.RUNNING, SequenceState.ENDED}),
    SequenceState.ENDED: frozenset(),
}


class Sequence:
    """A request on its way: tokens launched catch up with tokens wanted.

    Attributes:
        request: as it came.
        arrival: rank by arrival; the larger, the younger.
        ids: prompt and answer so far. Grows by one with each token, when the batch that drew it has been collected.
        keys: of full blocks of `ids`, first block first; all that may be found while it waits or is importing.
        state: changed by `move` alone.
        seat: its seat's number; NO_SEAT while it has none.
        number: what runners know it by; another one with each seat.
        pages: in order of position.
        num_launched: tokens whose KV is in the pages or will be when all in flight is done; never beyond `last_end`.
            With a token in flight it is `len(ids)`, at most; the next row then begins with that token.
        num_in_flight: batches in flight with a row of it.
        last_end: where its last row ends. The token drawn there is the last wanted: nobody needs its KV.
        num_published: pages whose block has been published (or found).
        num_cached_tokens: prompt tokens found at the first admission; None before it.
        awaited: the block that the sequence waited for when last looked at, computed by another one.
        is_preempted: it lost its pages and waits to compute them again.
        is_prefilled: its prompt was computed (or found) here rather than imported.
        has_output: a token of it has been handed out.
        is_exact: its KV is what this model makes of its ids. Where a transfer rounded it, nobody else may find it.
    """

    __slots__ = (
        "_root",
        "arrival",
        "awaited",
        "has_output",
        "ids",
        "is_exact",
        "is_preempted",
        "is_prefilled",
        "keys",
        "last_end",
        "num_cached_tokens",
        "num_in_flight",
        "num_launched",
        "num_published",
        "number",
        "pages",
        "request",
        "seat",
        "state",
    )

    def __init__(self, request: EngineRequest, arrival: int, root: BlockKey, state: SequenceState) -> None:
        self.request = request
        self.arrival = arrival
        self.ids = request.ids[:]
        self._root = root
        self.keys = key_chain(root, self.ids)
        self.state = state
        self.seat = NO_SEAT
        self.number = 0
        self.pages: tuple[int, ...] = ()
        self.num_launched = 0
        self.num_in_flight = 0
        self.last_end = len(self.ids) if request.hold_kv else request.prompt_len + request.sampling.max_tokens - 1
        self.num_published = 0
        self.num_cached_tokens: int | None = None
        self.awaited: BlockKey | None = None
        self.is_preempted = False
        self.is_prefilled = False
        self.has_output = False
        self.is_exact = True

    @property
    def index(self) -> int:
        """Position in the answer of the next token to be collected."""
        return len(self.ids) - self.request.prompt_len

    @property
    def num_findable(self) -> int:
        """Blocks that may be found: all of an import's, else those before the last id, computed for its logits."""
        return len(self.ids) // PAGE_TOKENS if self.state is SequenceState.IMPORTING else num_findable(len(self.ids))

    @property
    def line_rank(self) -> tuple[bool, int]:
        """Sorts the waiting line: preempted before new, then by arrival."""
        return (not self.is_preempted, self.arrival)

    def move(self, state: SequenceState) -> None:
        """Change state. Raises ValueError for a change that the table does not have."""
        if state not in TRANSITIONS[self.state]:
            raise ValueError(f"request {self.request.key!r} is {self.state.name}, it cannot become {state.name}")
        self.state = state

    def block_key(self, index: int) -> BlockKey:
        """Key of the full block `index`."""
        self.extend_keys(index + 1)
        return self.keys[index]

    def extend_keys(self, num_blocks: int) -> None:
        """Let `keys` have the first `num_blocks` blocks, which the ids have filled."""
        while len(self.keys) < num_blocks:
            start = len(self.keys) * PAGE_TOKENS
            parent = self.keys[-1] if self.keys else self._root
            self.keys.append(extend_chain(parent, self.ids[start : start + PAGE_TOKENS]))


def num_findable(num_ids: int) -> int:
    """Blocks of a prompt that need not be computed: those before its last id, which is computed for its logits."""
    return (num_ids - 1) // PAGE_TOKENS


def arrival_of(sequence: Sequence) -> int:
    """Sort key of the sequences that have a seat."""
    return sequence.arrival


def line_rank_of(sequence: Sequence) -> tuple[bool, int]:
    """Sort key of the waiting line."""
    return sequence.line_rank
