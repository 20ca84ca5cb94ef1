"""What of a prompt's KV has been computed so far, for whoever sends it while the rest is computed."""

import asyncio
from dataclasses import dataclass
from typing import Protocol


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
    """

    def __init__(self, num_tokens: int, *, tokens_per_s: float | None = None) -> None:
        self.num_tokens = num_tokens
        self.tokens_per_s = tokens_per_s
        self._chunks: list[Chunk] = []
        self._launched = asyncio.Event()
        self.completed = asyncio.Event()

    def launched(self, chunk: Chunk) -> None:
        """`chunk` is being computed now; it begins where the one before it ended."""
        self._chunks.append(chunk)
        self._launched.set()

    def complete(self) -> None:
        """All KV is in the pages."""
        self.completed.set()

    async def chunk(self, index: int) -> Chunk:
        """The chunk `index`, once it is launched."""
        while len(self._chunks) <= index:
            self._launched.clear()
            await self._launched.wait()
        return self._chunks[index]

    @property
    def compute_left_s(self) -> float | None:
        """Estimated seconds until all is computed, as if nothing of the newest chunk were; None if not known."""
        if self.completed.is_set():
            return 0.0
        if self.tokens_per_s is None or not self._chunks:
            return None
        return (self.num_tokens - self._chunks[-1].start) / self.tokens_per_s
