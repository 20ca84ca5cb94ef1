"""Which pages go in which message. Both ends compute the same plan from the same three numbers."""

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """What a link does, as measured.

    Attributes:
        latency_s: of one message of few bytes.
    """

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, slots=True)
class Message:
    """Pages that travel together: the wanted pages [start, end), counted in the order in which they were asked for."""

    start: int
    end: int

    @property
    def num_pages(self) -> int:
        return self.end - self.start


def plan_messages(num_pages: int, page_bytes: int, message_bytes: int) -> tuple[Message, ...]:
    """Cut `num_pages` pages into as few messages as fit `message_bytes`, of nearly equal size.

    Equal sizes keep two messages of one pull busy to the end, where full ones would leave a small rest.

    Raises:
        ValueError: a page is larger than a message.
    """
    max_pages = message_bytes // page_bytes
    if max_pages < 1:
        raise ValueError(f"a page of {page_bytes} bytes does not fit a message of {message_bytes} bytes")
    num_messages = -(-num_pages // max_pages)
    bounds = [index * num_pages // num_messages for index in range(num_messages)] + [num_pages]
    return tuple(Message(start, end) for start, end in pairwise(bounds))
