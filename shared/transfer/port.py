"""What a worker may ask of the part that moves KV pages between workers.

A pull moves pages from the cache of one worker, the source, into the cache of another, the puller:

    source                                    puller
    offer ──> ticket ─── (decode topic) ───>  pull(ticket, pages it lacks)
      │  tells its progress: chunks, layers     │  pages arrive in its cache as they are computed
      │  <──────────── confirmed ───────────────┤
    on_end(PULLED): free the pages            returns: the pages hold the peer's KV

A fetch moves pages that nobody offered: those that a peer happens to have of a prompt whose keys the puller knows.

    puller ──── fetch(keys) ────> peer: keeps the pages of the first ones that it has ── pages ──> puller

The offer may be made before its KV is computed. What is not there yet is sent when it is; in what form, and in how many
parts, follows from the speed of the link between the two, which `connect` measures.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Protocol, Self

from shared.blocks import BlockHash, BlockKey
from shared.kv.loan import Loan
from shared.kv.progress import KvProgress
from shared.request import Incarnation
from shared.transfer.plan import LinkSpeed
from shared.wire.to_worker import KvTicket
from shared.wire.wire_format import WireFormat


class Outcome(StrEnum):
    """How an offer ended. In each case nothing reads the offered pages any more."""

    PULLED = "pulled"
    """The puller confirmed that it has what it wanted."""
    FAILED = "failed"
    """A pull began and broke off: the puller died, gave up, or could not be reached."""
    EXPIRED = "expired"
    """The hold's time ran out first."""
    WITHDRAWN = "withdrawn"
    """The source took the offer back, or closed."""


class Refusal(StrEnum):
    """Why a source sends nothing, or nothing more, to a puller that asked."""

    UNKNOWN_KEY = "no such offer here"
    WRONG_SECRET = "the secret is not that of the offer"
    WRONG_PULLER = "the offer is for another worker"
    WRONG_PAGES = "pages outside the offer, or named twice"
    ALREADY_PULLED = "the offer was pulled before"
    EXPIRED = "the offer has expired"
    WITHDRAWN = "the offer was withdrawn"
    FAILED = "the pull broke off"
    WRONG_SOURCE = "it is for another worker, or this one has restarted"
    WRONG_LAYOUT = "the puller's pages are laid out otherwise"
    OVERSIZED = "a control message over the limit"
    PROTOCOL = "a message that has no place here"
    UNPROVEN_BLOCKS = "the puller does not show that it knows what is in the blocks"


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a pull that succeeded took.

    Attributes:
        format: the most lossy form in which any of its pages came; NATIVE means that the pages are exact.
        wire_bytes: of pages, as they travelled.
    """

    format: WireFormat
    wire_bytes: int

    def plus(self, fmt: WireFormat, num_bytes: int) -> "Pulled":
        """With one more part."""
        return Pulled(max(self.format, fmt, key=lambda form: form.loss), self.wire_bytes + num_bytes)


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a fetch that succeeded took.

    Attributes:
        num_pages: the peer had so many of the blocks, from the first on, and they are here now.
        wire_bytes: of pages, as they travelled.
    """

    num_pages: int
    wire_bytes: int


class Lender(Protocol):
    """Who keeps pages of this worker's cache for peers that fetch them."""

    async def lend(self, names: Sequence[BlockHash]) -> Loan:
        """Keep what is here of the run that begins with the first of `names`. Cancelled, it keeps nothing."""
        ...

    def give_back(self, loan: Loan) -> None:
        """Nothing reads the pages any more; once for each loan. Must not raise."""
        ...


@dataclass(frozen=True, slots=True)
class LinkReport:
    """A connection to a source, as its self-test found it.

    Attributes:
        address: of the source.
        incarnation: of the source.
        transport: what the bytes travel by, as proven: "cuda_ipc", "rdma", "tcp"; "unknown" if nothing proved it.
        speed: as measured; None before the self-test.
        warning: what is wrong with the link and how to mend it; None if it is as good as it should be.
    """

    address: str
    incarnation: Incarnation
    transport: str
    speed: LinkSpeed | None
    warning: str | None = None


MAX_FETCH_BLOCKS = 16_384
"""In one fetch: a million tokens, whose names and proofs fit a control message."""

OnEnd = Callable[[Outcome], None]
"""Called once, on the event loop, when an offer has ended and its pages may be freed. Must not raise."""

Clock = Callable[[], float]
"""Seconds since some moment, never going back; in step with the event loop's own waiting."""


class Transfer(Protocol):
    """One worker's end of all its hand-overs: an async context manager, used on one event loop."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Withdraw every offer, break off every pull, stop listening. Every `on_end` has been called after it."""
        ...

    @property
    def address(self) -> str:
        """Where peers reach this worker, "host:port"; stands in its tickets."""
        ...

    @property
    def num_offers(self) -> int:
        """Offers that have not ended."""
        ...

    def offer(
        self,
        key: str,
        pages: Sequence[int],
        *,
        num_tokens: int,
        secret: bytes,
        puller: Incarnation,
        hold_s: float,
        on_end: OnEnd,
        progress: KvProgress | None = None,
        max_loss: WireFormat = WireFormat.NATIVE,
    ) -> KvTicket:
        """Hold `pages` ready for one pull.

        Args:
            key: names the offer; unique among those that have not ended.
            pages: page numbers of positions [0, num_tokens), in order; not freed until `on_end`, and written only by
                what `progress` tells of.
            secret: what the puller must show; random, 16 bytes or more.
            puller: the only worker that may pull.
            hold_s: seconds after which the offer expires, counted from when all its KV is computed.
            on_end: learns how it ended.
            progress: what of the KV is computed; None: all. If the rest will never come, `withdraw`.
            max_loss: the most lossy form in which the pages may travel.

        Raises:
            ValueError: the key is in use, a page is outside the cache, pages and tokens do not match, short secret.
        """
        ...

    def withdraw(self, key: str) -> None:
        """Take an offer back: nothing more is sent, and it ends when nothing is in flight. Unknown keys do nothing."""
        ...

    async def pull(self, ticket: KvTicket, *, want: Sequence[int], into: Sequence[int], timeout_s: float) -> Pulled:
        """Fetch page `want[i]` of the offer into page `into[i]` of our cache, for each i.

        After a normal return the pages hold the peer's KV and the source has been told; `want` may be empty, which
        only tells the source. However the call ends, cancellation included, nothing writes to `into` afterwards;
        for this an ending call may wait for what is in flight, though no longer than the time in which a peer has to
        answer: then the connection is cut.

        Args:
            want: indexes of pages in the offer.
            into: page numbers of our cache, each once.

        Raises:
            LayoutMismatch: the peer's pages do not fit ours.
            KvTransferFailed: refused (the message says why), broken off, or not done within `timeout_s`.
            ValueError: `want` and `into` do not match, or name pages that do not exist.
        """
        ...

    def lend_from(self, lender: Lender) -> None:
        """From now on peers may fetch what `lender` keeps for them; before, there is nothing to be had here."""
        ...

    async def fetch(
        self, address: str, source: Incarnation, keys: Sequence[BlockKey], into: Sequence[int], *, timeout_s: float
    ) -> Fetched:
        """Fetch blocks from a peer that may have them: the block `keys[i]` into page `into[i]` of our cache.

        The peer sends the longest run from the first one on that it has, in native form, or nothing. After a normal
        return the first `num_pages` pages hold it, bit by bit as the peer computed it. However the call ends, nothing
        writes to `into` afterwards, as with `pull`.

        Args:
            keys: of blocks that follow one another in one prompt, `MAX_FETCH_BLOCKS` at most. They prove that we know
                the prompt, and are not shown.
            into: page numbers of our cache, each once.

        Raises:
            LayoutMismatch: the peer's pages do not fit ours.
            KvTransferFailed: refused (the message says why), broken off, or not done within `timeout_s`.
            ValueError: `keys` and `into` do not match, are too many, or name pages that do not exist.
        """
        ...

    async def connect(self, address: str, incarnation: Incarnation) -> LinkReport:
        """Connect to a source and measure the link, so that no pull pays for what happens once.

        A pull connects by itself where this was not done; its link then has no speed.

        Raises:
            LayoutMismatch: the peer's pages do not fit ours.
            KvTransferFailed: nobody answers, somebody else does, or the link broke.
        """
        ...

    def links(self) -> tuple[LinkReport, ...]:
        """The sources that we are connected to."""
        ...

    @property
    def refusals(self) -> Counter[Refusal]:
        """What this source did not serve, by reason, since its start."""
        ...
