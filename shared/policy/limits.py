"""What a tenant may: how many requests at once, and how many and of how many tokens a minute.

`take_place.lua` and `leave_place.lua` hold the limits.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

BYTES_PER_TOKEN = 4
"""Of a body: what a prompt costs is guessed before it is tokenised."""

UNNAMED_MAX_TOKENS = 256
"""An answer that names no length is guessed to have so many tokens."""


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What a tenant may; None: as much as it wants.

    Attributes:
        max_concurrent: requests that have not ended.
        requests_per_minute, tokens_per_minute: also how much may come at once after a quiet minute.
    """

    max_concurrent: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class Budget:
    """What is left of one limit.

    Attributes:
        limit: per minute.
        remaining: now, at least 0.
        reset_s: until all of it is there again.
    """

    limit: int
    remaining: int
    reset_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the limits say to a request.

    Attributes:
        refused_by: the limit that is reached ("concurrent", "requests", "tokens"), or None: a place is taken.
        retry_after_s: 0 for a place.
        budgets: by "requests" and "tokens", those that are limited.
    """

    refused_by: str | None
    retry_after_s: float
    budgets: Mapping[str, Budget]

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that tell the client where it stands."""
        told: dict[str, str] = {}
        for name, budget in self.budgets.items():
            told[f"x-ratelimit-limit-{name}"] = str(budget.limit)
            told[f"x-ratelimit-remaining-{name}"] = str(budget.remaining)
            told[f"x-ratelimit-reset-{name}"] = f"{math.ceil(budget.reset_s * 1000)}ms"
        return told


def estimated_tokens(num_body_bytes: int, max_tokens: int | None, num_choices: int) -> int:
    """What a request will cost, as far as its body tells; corrected when it has ended."""
    answer = UNNAMED_MAX_TOKENS if max_tokens is None else max_tokens
    return -(-num_body_bytes // BYTES_PER_TOKEN) + answer * num_choices
