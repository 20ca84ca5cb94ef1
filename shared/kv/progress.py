"""What of a prompt's KV has been computed so far, for whoever sends it while the rest is computed."""

import asyncio
from dataclasses import dataclass
from typing import Protocol

MAX_MARKS = 8
"""Points of a batch, evenly spread over its layers, at which an engine says at the least how far it is. (On a GPU each
takes the host a few microseconds.)"""


def layers_a_mark(num_layers: int) -> int:
    """Layers between two marks; the last mark is behind the last layer."""
    return -(-num_layers // MAX_MARKS)


class LayersDone(Protocol):
    """How far a batch is."""

    def num_done(self) -> int:
        """Layers, counted from the first, whose KV of the batch is in the pages. Does not wait; asked by any thread."""
        ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions [start, end) of a prompt, which are being computed."""

    start: int
    end: int
    layers: LayersDone


class KvProgress:
    """The chunks of one prompt in the order of their launch; used on one event loop.

    Positions before the first chunk were found, not computed: they are there from the beginning.

    Attributes:
        num_tokens: length of the prompt.
        tokens_per_s: how fast this worker prefills; None if it has not measured that yet.
        completed: set when all KV is in the pages.
        stopped: set when nobody waits for the rest any more.
    """

    def __init__(self, num_tokens: int, *, tokens_per_s: float | None = None) -> None:
        self.num_tokens = num_tokens
        self.tokens_per_s = tokens_per_s
        self.completed = asyncio.Event()
        self.stopped = asyncio.Event()
        self._chunks: list[Chunk] = []
        self._changed = asyncio.Event()

    @classmethod
    def all_there(cls, num_tokens: int) -> "KvProgress":
        """Of a prompt whose KV is in the pages."""
        progress = cls(num_tokens)
        progress.complete()
        return progress

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """Those launched so far."""
        return tuple(self._chunks)

    def launched(self, chunk: Chunk) -> None:
        """`chunk` is being computed now; it begins where the one before it ended."""
        self._chunks.append(chunk)
        self._changed.set()

    def complete(self) -> None:
        """All KV is in the pages."""
        self.completed.set()
        self._changed.set()

    def stop(self) -> None:
        """Let go of everybody who waits here."""
        self.stopped.set()
        self._changed.set()

    @property
    def is_over(self) -> bool:
        """Whether nothing is to be waited for: completed or stopped."""
        return self.completed.is_set() or self.stopped.is_set()

    async def chunk(self, index: int) -> Chunk | None:
        """The chunk `index`, once it is launched; None if all is over before."""
        while len(self._chunks) <= index:
            if self.is_over:
                return None
            await self._wait_for_change()
        return self._chunks[index]

    async def over(self) -> None:
        """Wait until all is completed or stopped."""
        while not self.is_over:
            await self._wait_for_change()

    def compute_s(self, num_tokens: int) -> float | None:
        """Estimated seconds that computing so many positions takes; None if not known."""
        return None if self.tokens_per_s is None else num_tokens / self.tokens_per_s

    @property
    def compute_left_s(self) -> float | None:
        """Estimated seconds until all is computed, as if nothing of the newest chunk were; None if not known."""
        if self.completed.is_set():
            return 0.0
        return self.compute_s(self.num_tokens - self._chunks[-1].start) if self._chunks else None

    async def _wait_for_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
