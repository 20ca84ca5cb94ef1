"""Finds stop strings in text that arrives in pieces."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopDelta:
    """What a piece of text made certain.

    Attributes:
        text: may be shown now; never holds any part of the stop string that ends it.
        stopped: the stop string that was found, or None.
    """

    text: str
    stopped: str | None = None


class StopMatcher:
    """Shows text as soon as no stop string can begin in it.

    The match that ends first counts, since it is the first that can be known; of several that end there, the longest.
    All that was shown and is held back is a pure function of the text so far, however it was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._held = ""
        self._stopped: str | None = None

    def feed(self, text: str, *, armed: bool = True) -> StopDelta:
        """Take the next piece. A stop string counts only if it is completed by an armed piece.

        Text after a match is void: it is neither shown nor searched.
        """
        if self._stopped is not None:
            return StopDelta("", self._stopped)
        window = self._held + text
        match = self._first_match(window, num_old=len(self._held)) if armed else None
        if match is not None:
            start, self._stopped = match
            self._held = ""
            return StopDelta(window[:start], self._stopped)
        num_safe = len(window) - max((_overlap(window, stop) for stop in self._stops), default=0)
        self._held = window[num_safe:]
        return StopDelta(window[:num_safe])

    def flush(self) -> str:
        """The end: what was held back for a stop string that never came."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, window: str, *, num_old: int) -> tuple[int, str] | None:
        """Start of the match in `window` that ends first, behind the first `num_old` characters, and its string."""
        found: list[tuple[int, int, str]] = []
        for stop in self._stops:
            start = window.find(stop, max(0, num_old - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        if not found:
            return None
        _, start, stop = min(found)
        return start, stop


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
