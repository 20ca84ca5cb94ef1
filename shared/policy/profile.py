"""How long a worker's engine takes for a step and its link for a pull: measured speeds, and what follows from them.

A step reads all weights once (`base_s`) and computes its prompt tokens (`token_s` each): a GPU meanwhile, so that from
a certain number on these take longer than the reading; a CPU afterwards. Attention comes on top: of prompt tokens over
the positions before them (`pair_s`), of decode rows over their context (`context_s`).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one step computes.

    Attributes:
        num_rows: decode rows.
        num_context_tokens: positions that these rows read, together.
        num_prompt_tokens: tokens of prompt chunks.
        num_pairs: for each of those the positions up to and with itself, summed.
    """

    num_rows: int = 0
    num_context_tokens: int = 0
    num_prompt_tokens: int = 0
    num_pairs: int = 0


@dataclass(frozen=True, slots=True)
class SpeedProfile:
    """Measured speeds of one worker, in seconds.

    Attributes:
        base_s: of any step.
        row_s: for each decode row.
        context_s: for each position that a decode row reads.
        token_s: for each prompt token.
        pair_s: for each pair of a prompt token and a position that it attends to.
        overlap: how much of the shorter of the two, reading weights and computing prompt tokens, is hidden behind the
            longer, from 0 to 1.
    """

    base_s: float
    row_s: float
    context_s: float
    token_s: float
    pair_s: float
    overlap: float = 1.0

    def tokens_s(self, num_prompt_tokens: float) -> float:
        """Predicted time to read the weights and to compute so many prompt tokens, but for their attention."""
        computing_s = self.token_s * num_prompt_tokens
        if self.overlap == 1.0:
            return max(self.base_s, computing_s)
        return max(self.base_s, computing_s) + (1.0 - self.overlap) * min(self.base_s, computing_s)

    def step_s(self, work: StepWork) -> float:
        """Predicted time of one step."""
        return (
            self.tokens_s(work.num_prompt_tokens)
            + self.pair_s * work.num_pairs
            + self.row_s * work.num_rows
            + self.context_s * work.num_context_tokens
        )

    def prefill_s(self, num_new: int, num_before: int) -> float:
        """Predicted time to compute `num_new` prompt tokens behind `num_before` whose KV is there, alone."""
        if num_new <= 0:
            return 0.0
        return self.tokens_s(num_new) + self.pair_s * num_pairs(num_new, num_before)

    def decode_step_s(self, num_rows: int, num_context_tokens: int) -> float:
        """Predicted time of a step of decode rows alone."""
        return self.base_s + self.row_s * num_rows + self.context_s * num_context_tokens


@dataclass(frozen=True, slots=True)
class LinkRate:
    """How fast one worker pulls KV from another.

    Attributes:
        latency_s: of any pull, however small.
        bytes_per_s: of the bytes after that; above 0.
    """

    latency_s: float
    bytes_per_s: float

    def pull_s(self, num_bytes: int) -> float:
        """Predicted time to pull so much; nothing takes no time."""
        return self.latency_s + num_bytes / self.bytes_per_s if num_bytes > 0 else 0.0


def num_pairs(num_new: int, num_before: int) -> int:
    """(token, position) pairs of causal attention of `num_new` tokens behind `num_before`."""
    return num_new * num_before + num_new * (num_new + 1) // 2
