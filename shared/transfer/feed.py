"""What of an offer is sent next, and when: the plan of `shared.transfer.plan`, made as the KV is computed.

Pages that are there go at once. Pages that a chunk completes go with it, group of layers by group of layers, each as
soon as the chunk has computed it; so a page that two chunks fill goes with the second.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from shared.blocks import PAGE_TOKENS
from shared.kv.layout import KvLayout
from shared.kv.progress import Chunk
from shared.kv.wire_format import LayerSpan, packed_bytes, page_formats
from shared.transfer.offer import Offer
from shared.transfer.plan import LinkSpeed, Part, choose_format, choose_layer_groups, cut_parts
from shared.wire.wire_format import WireFormat

MAX_POLL_S = 0.02
"""An offer that is settled meanwhile is noticed in this time."""

POLL_SHARE = 0.01
MIN_POLL_S = 1e-3
"""A chunk is asked how many layers it has done after so much of the time that it takes: CUDA tells only when asked, and
who asks takes the interpreter from the engine. uvloop counts in milliseconds: to sleep for less is not to sleep."""


@dataclass(frozen=True, slots=True)
class Load:
    """One part and how to pack it.

    Attributes:
        index: parts of the pull are counted from 0.
        pages: page numbers at the source, in the order of the part's entries.
        last_tokens: valid tokens in the last of them.
    """

    index: int
    part: Part
    format: WireFormat
    pages: tuple[int, ...]
    last_tokens: int
    num_bytes: int


class PartFeed:
    """The loads of one pull, in order, to any number of senders.

    Attributes:
        num_parts: handed out so far.
    """

    def __init__(
        self,
        layout: KvLayout,
        offer: Offer,
        want: Sequence[int],
        *,
        speed: Callable[[], LinkSpeed | None],
        max_part_bytes: int,
    ) -> None:
        """`speed` is that of the link to the puller, as far as known when it is asked for."""
        self.num_parts = 0
        self._layout = layout
        self._offer = offer
        self._progress = offer.progress
        self._want = want
        self._speed = speed
        self._max_part_bytes = max_part_bytes
        self._format: WireFormat | None = None
        self._turn = asyncio.Lock()
        self._planned: deque[tuple[Part, WireFormat, Chunk | None]] = deque()
        self._num_planned = 0  # entries of `want`
        self._num_chunks = 0  # looked at
        self._num_chunks_done = 0

    @property
    def is_empty(self) -> bool:
        """Whether all was handed out."""
        return not self._planned and self._num_planned == len(self._want)

    async def next(self) -> Load | None:
        """The next load, once its KV is computed; None if all was handed out or the offer is settled."""
        async with self._turn:
            if not self._planned:
                await self._plan_more()
            if not self._planned:
                return None
            part, fmt, chunk = self._planned[0]
            if chunk is not None:
                await self._computed(chunk, part.layers.end)
            if self._offer.outcome is not None:
                return None
            self._planned.popleft()
            return self._load(part, fmt)

    def _load(self, part: Part, fmt: WireFormat) -> Load:
        entries = self._want[part.start : part.end]
        self.num_parts += 1
        return Load(
            index=self.num_parts - 1,
            part=part,
            format=fmt,
            pages=tuple(self._offer.pages[index] for index in entries),
            last_tokens=self._tokens_in(entries[-1]),
            num_bytes=packed_bytes(self._layout, fmt, part.num_pages, part.layers.num_layers),
        )

    def _tokens_in(self, index: int) -> int:
        return min(PAGE_TOKENS, self._progress.num_tokens - index * PAGE_TOKENS)

    async def _computed(self, chunk: Chunk, num_layers: int) -> None:
        progress = self._progress
        tokens_per_s = progress.tokens_per_s or math.inf
        poll_s = max(MIN_POLL_S, min(MAX_POLL_S, POLL_SHARE * (chunk.end - chunk.start) / tokens_per_s))
        while not progress.is_over and chunk.layers.num_done() < num_layers:  # noqa: ASYNC110 - see MIN_POLL_S
            await asyncio.sleep(poll_s)

    async def _plan_more(self) -> None:
        """Plan what is there now, or else what is being computed; nothing if nothing is left or wanted."""
        progress = self._progress
        while not self._planned and self._num_planned < len(self._want):
            chunk = await progress.chunk(self._num_chunks)
            if progress.stopped.is_set():
                return
            self._plan_to(self._num_tokens_there(), None)
            if chunk is not None and not self._planned:
                self._num_chunks += 1
                self._plan_to(chunk.end, chunk)

    def _num_tokens_there(self) -> int:
        progress = self._progress
        chunks = progress.chunks
        if progress.completed.is_set() or not chunks:
            return progress.num_tokens
        while self._num_chunks_done < len(chunks) and self._is_done(chunks[self._num_chunks_done]):
            self._num_chunks_done += 1
        return chunks[self._num_chunks_done - 1].end if self._num_chunks_done else chunks[0].start

    def _is_done(self, chunk: Chunk) -> bool:
        return chunk.layers.num_done() >= self._layout.num_layers

    def _plan_to(self, num_tokens: int, chunk: Chunk | None) -> None:
        """Plan the entries from the next one on whose pages are complete with `num_tokens` tokens."""
        start, end = self._num_planned, self._end_of_run(num_tokens)
        if start == end:
            return
        speed = self._speed()
        if self._format is None:
            self._format = choose_format(
                self._layout,
                num_pages=len(self._want),
                compute_left_s=self._progress.compute_left_s,
                link=speed,
                max_loss=self._offer.max_loss,
            )
        for group in self._groups(end - start, chunk, speed, self._format):
            for first, last, fmt in self._runs(start, end, self._format):
                parts = cut_parts(
                    self._layout,
                    start=first,
                    end=last,
                    groups=(group,),
                    fmt=fmt,
                    link=speed,
                    max_part_bytes=self._max_part_bytes,
                )
                self._planned.extend((part, fmt, chunk) for part in parts)
        self._num_planned = end

    def _groups(
        self, num_pages: int, chunk: Chunk | None, speed: LinkSpeed | None, fmt: WireFormat
    ) -> tuple[LayerSpan, ...]:
        if chunk is None:
            return (LayerSpan(0, self._layout.num_layers),)
        compute_s = self._progress.compute_s(chunk.end - chunk.start)
        return choose_layer_groups(self._layout, num_pages=num_pages, compute_left_s=compute_s, link=speed, fmt=fmt)

    def _end_of_run(self, num_tokens: int) -> int:
        if num_tokens >= self._progress.num_tokens:
            return len(self._want)
        num_pages = num_tokens // PAGE_TOKENS
        end = self._num_planned
        while end < len(self._want) and self._want[end] < num_pages:
            end += 1
        return end

    def _runs(self, start: int, end: int, fmt: WireFormat) -> Iterator[tuple[int, int, WireFormat]]:
        """Entries [start, end) as runs of one format, in each of which only the last page may be partial."""
        if fmt is WireFormat.NATIVE:
            yield start, end, fmt
            return
        first = start
        for entry in range(start, end):
            index = self._want[entry]
            own = page_formats(fmt, index)
            is_last = entry + 1 == end or page_formats(fmt, self._want[entry + 1]) is not own
            if is_last or self._tokens_in(index) < PAGE_TOKENS:
                yield first, entry + 1, own
                first = entry + 1
