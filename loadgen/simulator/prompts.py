"""How an engine works off prompts: a line, and the chunks of those whose turn it is.

The rules are those of `shared/engine/scheduler.py`: served in order, pages for the whole prompt at admission, nobody
overtakes but one whose next page is being computed by another steps aside until it is there.
"""

from collections import deque
from collections.abc import Callable

from loadgen.simulator.job import Job
from loadgen.simulator.pages import Found, PagePool, Pinned
from shared.blocks import PAGE_TOKENS, pages_for
from shared.policy.profile import num_pairs


class Prompt:
    """Tokens whose KV one worker is to compute.

    Attributes:
        num_tokens: prompt, and what was made of the answer before, if it was preempted.
        segments: of the full pages of those tokens.
        kv: pages; None while it waits for them.
        num_computed: tokens whose KV is there.
        num_published: segments that others can find, of those that it did not find itself.
    """

    __slots__ = ("ends", "job", "kv", "num_computed", "num_published", "num_tokens", "segments")

    def __init__(self, job: Job, num_tokens: int, segments: tuple[int, ...], lengths: tuple[int, ...]) -> None:
        self.job = job
        self.num_tokens = num_tokens
        self.kv: Pinned | None = None
        self.num_computed = 0
        self.num_published = 0
        ends: list[int] = []
        end = 0
        for segment in segments:
            end += lengths[segment]
            if end > num_tokens // PAGE_TOKENS:
                break
            ends.append(end)
        self.segments = segments[: len(ends)]
        self.ends = ends

    @property
    def num_pages(self) -> int:
        return pages_for(self.num_tokens)

    @property
    def num_findable(self) -> int:
        """Pages that it may find: the last token is always computed."""
        return (self.num_tokens - 1) // PAGE_TOKENS


class PromptQueue:
    """Prompts of one worker.

    Args:
        take_seat: takes a seat of the worker's; False if there is none.
        admitted: told of each prompt whose first chunk is in the next step.
    """

    def __init__(self, pool: PagePool, take_seat: Callable[[], bool], admitted: Callable[[Prompt], None]) -> None:
        self._pool = pool
        self._take_seat = take_seat
        self._admitted = admitted
        self.line: deque[Prompt] = deque()
        self.active: list[Prompt] = []
        self._computing: dict[int, Prompt] = {}

    def __bool__(self) -> bool:
        return bool(self.active or self.line)

    def need_of_first(self) -> int:
        """Pages that the first in line needs."""
        if not self.line or self.line[0].kv is not None:
            return 0
        head = self.line[0]
        found = self._pool.find(head.segments)
        return found.cost + head.num_pages - min(found.num_pages, head.num_findable)

    def try_acquire(self, prompt: Prompt, found: Found) -> bool:
        """Take pages for all of the prompt, of which `found` is there; False if they do not fit."""
        num_cached = min(found.num_pages, prompt.num_findable)
        num_new = prompt.num_pages - num_cached
        if not self._pool.fits(found, num_new):
            return False
        prompt.kv = self._pool.acquire(prompt.segments, found, num_new)
        prompt.num_computed = num_cached * PAGE_TOKENS
        prompt.num_published = len(prompt.segments[: found.num_segments])
        if prompt.num_published and found.num_pages < prompt.ends[prompt.num_published - 1]:
            prompt.num_published -= 1  # the last one is here in part
        for segment in prompt.segments[prompt.num_published :]:
            self._computing.setdefault(segment, prompt)
        return True

    def is_awaited(self, prompt: Prompt, found: Found) -> bool:
        """Whether what the prompt lacks next is on its way here."""
        place = found.num_segments
        if place and found.num_pages < prompt.ends[place - 1]:
            place -= 1
        return place < len(prompt.segments) and prompt.segments[place] in self._computing

    def chunks(self, budget: int) -> tuple[list[tuple[Prompt, int]], int, int]:
        """What the next step computes: (prompt, tokens) each; their tokens and pairs in all."""
        chunks: list[tuple[Prompt, int]] = []
        tokens = pairs = 0
        for prompt in self.active:
            if tokens >= budget:
                break
            count = min(prompt.num_tokens - prompt.num_computed, budget - tokens)
            chunks.append((prompt, count))
            tokens += count
            pairs += num_pairs(count, prompt.num_computed)
        if self.line and tokens < budget:
            for prompt in self._admit(budget - tokens):
                count = min(prompt.num_tokens - prompt.num_computed, budget - tokens)
                chunks.append((prompt, count))
                tokens += count
                pairs += num_pairs(count, prompt.num_computed)
        return chunks, tokens, pairs

    def _admit(self, budget: int) -> list[Prompt]:
        admitted: list[Prompt] = []
        waiting: deque[Prompt] = deque()
        line = self.line
        while line and budget > 0:
            prompt = line[0]
            if prompt.kv is None:
                found = self._pool.find(prompt.segments)
                if self.is_awaited(prompt, found):
                    waiting.append(line.popleft())
                    continue
                fits = self._pool.fits(found, prompt.num_pages - min(found.num_pages, prompt.num_findable))
                if not fits or not self._take_seat():
                    break
                self.try_acquire(prompt, found)
            elif not self._take_seat():
                break
            line.popleft()
            self._admitted(prompt)
            self.active.append(prompt)
            admitted.append(prompt)
            budget -= prompt.num_tokens - prompt.num_computed
        line.extendleft(reversed(waiting))
        return admitted

    def computed(self, prompt: Prompt, count: int) -> bool:
        """`count` more tokens are computed; whether the prompt is through."""
        prompt.num_computed += count
        self.publish(prompt)
        if prompt.num_computed < prompt.num_tokens:
            return False
        self.active.remove(prompt)
        return True

    def publish(self, prompt: Prompt) -> None:
        """Let others find the segments that are complete."""
        assert prompt.kv is not None
        num_pages = prompt.num_computed // PAGE_TOKENS
        while prompt.num_published < len(prompt.segments) and prompt.ends[prompt.num_published] <= num_pages:
            segment = prompt.segments[prompt.num_published]
            self._pool.publish(prompt.kv, segment)
            if self._computing.get(segment) is prompt:
                del self._computing[segment]
            prompt.num_published += 1
