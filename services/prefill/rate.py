"""How fast this worker computes prompts, from the steps it has run."""

from shared.blocks import PAGE_TOKENS

KEPT_SHARE = 0.9
"""Of what was counted before, with each step that counts: the last ten or so decide."""


class PrefillRate:
    """Tokens a second over the latest steps, each weighing by its length. Steps of less than a page tell nothing."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        """A step has computed `num_tokens` of prompts in `seconds`."""
        if num_tokens >= PAGE_TOKENS:
            self._tokens = KEPT_SHARE * self._tokens + num_tokens
            self._seconds = KEPT_SHARE * self._seconds + seconds

    @property
    def tokens_per_s(self) -> float | None:
        """None before the first step that counts."""
        return self._tokens / self._seconds if self._seconds > 0 else None
