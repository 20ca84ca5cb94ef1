"""What a worker may ask of an engine, and what it gets back.

One engine runs one model on one device. It is not thread-safe: one thread owns it (`shared.worker`). It knows token
ids, pages and positions; not text, topics or Redis.

    add ─────> waiting ──> prefilling ──> running ──> (finished or failed: pages freed at once)
                  ^               │          │
                  └─ preempted <──┴──────────┘
    with hold_kv: waiting ──> prefilling ──> running ──> held ── abort ──> (pages freed)
                                  └─ on_chunk: each chunk, as it is launched, and the pages of all ids
    reserve ─> importing ── imported, with the token that follows ──> running

Blocks of a prompt that are elsewhere, at a peer or in host memory, come in by a fill. Whoever waits for them in the
line is passed over until they are there; what did not come is computed as any other.

    fill ─> pages written by the caller ─> filled: what came is found, as if it had been computed here
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from shared.blocks import BlockHash, BlockKey, TokenIds
from shared.kv.layout import KvLayout
from shared.kv.loan import Loan
from shared.kv.progress import Chunk
from shared.policy.profile import StepWork
from shared.request import FinishReason, SamplingParams, TokenLogprob

NOTHING = StepWork()


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One choice to run.

    Attributes:
        key: the caller's name for it, unique among those in the engine.
        ids: the tokens whose successor is wanted: the prompt and, behind it, tokens accepted already. To `reserve`:
            those whose KV comes; their successor comes too, with `imported`.
        prompt_len: how many of `ids` are prompt. Their successor has index `len(ids) - prompt_len` in the answer;
            max_tokens, min_tokens and penalties count the answer from there.
        choice: index of the choice; keys the random generator together with seed and token index.
        cache_salt: pages are shared only among requests of one salt.
        hold_kv: stop after one token and keep the pages of `ids` until `abort`, whatever becomes of the request: also
            if the token ends the choice, or if it fails. Once it has pages it is never preempted (the prefill role).
        on_chunk: with hold_kv, told of each chunk of the ids in turn just before it is launched, on the engine's
            thread: (the chunk, the pages of all ids in order of position). The chunks follow one another up to
            `len(ids)`; positions before the first one were found, their KV is there. The pages are the same each time.
            Must not raise: the engine is of no use after it.
    """

    key: str
    ids: TokenIds
    prompt_len: int
    sampling: SamplingParams
    choice: int = 0
    cache_salt: str = ""
    hold_kv: bool = False
    on_chunk: Callable[[Chunk, tuple[int, ...]], None] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Reservation:
    """Pages set aside for KV that comes from a peer.

    Attributes:
        pages: page numbers of positions [0, len(ids)) in order, cached ones first.
        num_cached_pages: how many of them hold the right KV already, or will before the request runs, from host memory;
            they must not be written.
    """

    pages: tuple[int, ...]
    num_cached_pages: int


@dataclass(frozen=True, slots=True, eq=False)
class Fill:
    """Pages set aside for blocks of a prompt that come from elsewhere. Compared by identity: each is one of its own.

    Attributes:
        keys: of those blocks, in order of position; a run of the prompt's. Empty: there is nothing to bring.
        pages: which page each is to be written to.
        found: pages of the blocks before them, kept meanwhile: without those nobody could use what comes.
    """

    keys: tuple[BlockKey, ...]
    pages: tuple[int, ...]
    found: tuple[int, ...] = ()


@dataclass(slots=True)
class TokenOutput:
    """One new token of one request. (Nobody changes it; it is not frozen because that makes it three times as slow.)

    Attributes:
        key: of the request.
        index: position in the answer (0 is the first token after the prompt).
        token_id: the token.
        finish: set if this token ends the choice. FAILED: no token was made (token_id is -1), see `error`.
        num_cached_tokens: prompt tokens whose KV was found rather than computed; set with the request's first output.
        error: what went wrong, with FAILED (for instance NaN logits).
    """

    key: str
    index: int
    token_id: int
    finish: FinishReason | None = None
    logprob: TokenLogprob | None = None
    num_cached_tokens: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step did.

    Attributes:
        tokens: new tokens, at most one a request.
        started: keys of requests whose first chunk was launched in this step; imported ones and those prefilled
            again after preemption are not among them.
        work: what the batch that was waited for computed.
        num_in_flight: batches that were launched and not waited for.
    """

    tokens: tuple[TokenOutput, ...] = ()
    started: tuple[str, ...] = ()
    work: StepWork = NOTHING
    num_in_flight: int = 0

    @property
    def num_batch_tokens(self) -> int:
        """Token rows of the batch that was waited for."""
        return self.work.num_rows + self.work.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class BlockChanges:
    """Full blocks that became shareable, and those that went, since the last time asked: on the device, and in host
    memory. A block may be in both."""

    stored: tuple[BlockHash, ...] = ()
    evicted: tuple[BlockHash, ...] = ()
    host_stored: tuple[BlockHash, ...] = ()
    host_evicted: tuple[BlockHash, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges and lifetime counters.

    Attributes:
        num_free_pages: free plus evictable: what a new request could take.
        num_running: prefilling and running.
        num_held: with hold_kv, after their token.
        num_prefix_queries: tokens looked up in the prefix index, once a request.
        num_prefix_hits: tokens of those that were found.
        num_prompt_tokens: prompt tokens of requests prefilled here (found or computed), once a request.
        num_generated_tokens: tokens handed out.
        num_host_pages: blocks that have a copy in host memory.
        num_host_hits: tokens whose KV was brought back from there, for requests and for peers.
        num_lost_blocks: evicted with no copy in host memory; all that are evicted, where there is none.
        num_saved_bytes, num_restored_bytes: copied to host memory and from it.
    """

    num_pages: int
    num_free_pages: int
    num_waiting: int
    num_running: int
    num_held: int
    num_importing: int
    num_preemptions: int = 0
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_host_pages: int = 0
    num_host_hits: int = 0
    num_lost_blocks: int = 0
    num_saved_bytes: int = 0
    num_restored_bytes: int = 0


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What an engine can take.

    Attributes:
        max_context: positions the model has; prompt and answer together.
        num_pages: pages of its cache; a request must fit them alone.
        max_running: requests decoded at once.
        max_batch_tokens: token rows of one step; longer prompts are prefilled in chunks.
        num_host_pages: pages that host memory has room for; 0: what is evicted is gone.
    """

    max_context: int
    num_pages: int
    max_running: int
    max_batch_tokens: int
    num_host_pages: int = 0


@dataclass(frozen=True, slots=True)
class EngineModel:
    """What others must know of the model an engine runs."""

    name: str
    fingerprint: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    layout: KvLayout


class Engine(Protocol):
    """One model on one device; see the module's drawing."""

    @property
    def model(self) -> EngineModel: ...

    @property
    def limits(self) -> EngineLimits: ...

    def add(self, request: EngineRequest) -> None:
        """Queue a request for prefill.

        Raises ValueError, naming the limit, if the key is in use, the ids are none of the vocabulary or the request
        can never fit: prompt and max_tokens together must fit max_context and, except with hold_kv, num_pages; and
        for more log probabilities, or with min_tokens more ids that end the answer, than a runner takes; and for
        on_chunk without hold_kv.
        """
        ...

    def reserve(self, request: EngineRequest) -> Reservation | None:
        """Set pages aside for the KV of positions [0, len(ids)); None: not enough free pages or seats now.

        The peer may still be computing the token behind the ids. What the first waiting request needs is not given
        away. Raises as `add`, but max_tokens must leave one more token to make behind the one that comes; and
        ValueError with hold_kv.
        """
        ...

    def imported(self, key: str, token_id: int, *, exact: bool = True) -> None:
        """The reserved pages hold their KV: the request joins the running batch at the next step.

        Args:
            token_id: what follows the ids; it does not end the choice. Its own KV is computed by the first step.
            exact: the KV is what the peer computed, bit by bit. If not, no page that the request fills is ever found
                by another one, unless it is preempted: then it computes all again.

        Raises KeyError for a request that is not importing, ValueError for a token that is none of the vocabulary.
        """
        ...

    def fill(self, request: EngineRequest, num_pages: int) -> Fill | None:
        """Set pages aside for those of the first `num_pages` blocks of a prompt that are neither here nor on their way.

        From now on whoever needs the first of them waits for it in the line, and nobody computes it: so before `add`,
        in one command. Blocks that no request could use are left out. None: not enough pages now beyond what the first
        waiting request needs. Each `Fill` that has keys must be `filled`, soon.
        """
        ...

    def filled(self, fill: Fill, num_arrived: int) -> None:
        """The fill is over, and nothing writes to its pages any more: the first `num_arrived` of them hold their
        blocks, bit by bit as this model computes them. Others find them from now on; the rest is free."""
        ...

    def bring(self, names: Sequence[BlockHash], over: Callable[[], None]) -> None:
        """Bring to pages what of the longest run of blocks from the first of `names` on is only in host memory.

        `over` is called once, by whoever uses the engine then, when that is over: before `bring` returns if there is
        nothing to bring, no room now, or others compute or fetch it. Who lends within `over` finds what was brought.
        """
        ...

    def lend(self, names: Sequence[BlockHash]) -> Loan:
        """Keep the pages of the longest run of known blocks from the first of `names` on, until `give_back`."""
        ...

    def give_back(self, loan: Loan) -> None:
        """Nothing reads the loan's pages any more. Once for each loan."""
        ...

    def abort(self, key: str) -> None:
        """Forget a request in any state and free what it has. Unknown keys do nothing.

        Pages that a batch in flight may still write are free when it has been waited for. Those of an importing request
        are freed too, and those that `on_chunk` told of: the caller must have ended transfers into and out of them.
        """
        ...

    def step(self) -> StepOutput:
        """Launch what can be launched now, wait for the oldest batch in flight and take its tokens.

        An empty output if there is nothing to do. A batch may stay in flight between two steps (one, or none: it
        depends on the runner); its tokens, published blocks and free pages come with the next step.
        """
        ...

    def let_in(self, while_waiting: Callable[[], AbstractContextManager[None]]) -> None:
        """From now on each wait of a step for the device is inside a context that `while_waiting` makes: there others
        may `bring`, `lend` and `give_back`, one at a time and on any thread."""
        ...

    def has_work(self) -> bool:
        """Whether anything is in flight or `step` would launch anything."""
        ...

    def take_block_changes(self) -> BlockChanges: ...

    def take_all_blocks(self) -> BlockChanges:
        """All that is shareable, as stored: whoever heard nothing so far knows all, up to the next changes."""
        ...

    def stats(self) -> EngineStats: ...

    def check(self) -> None:
        """Raise AssertionError if the page accounting does not add up."""
        ...
